#!/bin/bash
# Two nodes with eight GPUs each. Folders must be on storage that both see.
#SBATCH --job-name=phi3
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --signal=TERM@120
#SBATCH --requeue
# The last lines above: two minutes before the time is up the run saves and ends with 143; this
# script queues itself again then, and goes on from there.
set -euo pipefail
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun tune run --nnodes 2 --nproc_per_node 8 \
  --rdzv_backend c10d --rdzv_endpoint "$head_node:29500" --rdzv_id "$SLURM_JOB_ID" \
  phi3_lora_finetune --config phi3_mini_lora_8gpu \
  checkpoint_dir=/shared/Phi-3-mini-4k output_dir=/shared/my_adapter \
  dataset.source=/shared/my_chats.jsonl || code=$?
if [ "${code:-0}" -eq 143 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "${code:-0}"
