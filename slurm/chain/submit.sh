#!/bin/bash
# The chain of stages: each starts when the runs that it reads have ended well, and is dropped when they cannot any more.
set -euo pipefail
job_0=$(sbatch --parsable /shared/megatron-ext/runs/llama32_1b/pretrain/pretrain.sbatch)
echo pretrain "${job_0%%;*}"
job_1=$(sbatch --parsable --dependency="afterok:${job_0%%;*}" --kill-on-invalid-dep=yes /shared/megatron-ext/runs/llama32_1b/sft/sft.sbatch)
echo sft "${job_1%%;*}"
job_2=$(sbatch --parsable --dependency="afterok:${job_1%%;*}" --kill-on-invalid-dep=yes /shared/megatron-ext/runs/llama32_1b/reward/reward.sbatch)
echo reward "${job_2%%;*}"
job_3=$(sbatch --parsable --dependency="afterok:${job_1%%;*}:${job_2%%;*}" --kill-on-invalid-dep=yes /shared/megatron-ext/runs/llama32_1b/ppo/ppo.sbatch)
echo ppo "${job_3%%;*}"
