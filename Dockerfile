# A machine with an NVIDIA GPU and its container toolkit: torch brings CUDA's libraries itself.
#   docker build -t phi3 .
#   docker run --rm --gpus all --shm-size 1g -v "$PWD:/data" -v "$HOME/.cache/huggingface:/root/.cache/huggingface" \
#     phi3 train my_chats.csv
# Built by hand: no test builds it.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/phi3
ENV PATH=/opt/phi3/bin:$PATH

WORKDIR /opt/phi3/src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY phi3_plugin phi3_plugin
COPY recipes recipes
COPY configs configs
RUN pip install --no-cache-dir -c constraints.txt '.[hf,eval]'

WORKDIR /data
ENTRYPOINT ["phi3-tune"]
