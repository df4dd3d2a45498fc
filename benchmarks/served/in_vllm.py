"""Models and adapters in vLLM on a CPU. It tells log-probabilities: logits less a constant."""

import os

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # errors arrive here
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from jobs import Answer, answer
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)

engines: dict = {}
numbers: dict = {}


def run(job: dict) -> Answer:
    """Load the adapter into the engine of its base; one engine is kept."""
    rank = next((size for size in RANKS if size >= job["rank"]), RANKS[-1])
    key = job["model"], job["context"], rank if job["adapter"] else 0
    if key not in engines:
        engines.clear()
        lora = {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1} if key[2] else {}
        engines[key] = LLM(
            model=job["model"],
            dtype="float32",
            max_model_len=job["context"],
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_logprobs=-1,
            max_num_seqs=1,
            enable_prefix_caching=False,
            disable_log_stats=True,
            **lora,
        )
    engine, request = engines[key], None
    if job["adapter"]:
        request = LoRARequest(job["id"], len(numbers) + 1, job["adapter"])
        numbers[job["id"]] = request
        engine.llm_engine.add_lora(request)
    settings = SamplingParams(
        temperature=0, max_tokens=job["steps"], ignore_eos=True, logprobs=-1, detokenize=False
    )
    (out,) = engine.generate(
        {"prompt_token_ids": job["prompt"]}, settings, lora_request=request, use_tqdm=False
    )
    vocabulary = engine.llm_engine.model_config.get_vocab_size()
    rows = [[row[i].logprob for i in range(vocabulary)] for row in out.outputs[0].logprobs]
    return out.outputs[0].token_ids, rows


answer(run)
