#!/usr/bin/env bash
# Train on several nodes under Slurm, one task per node; torchrun starts one process per GPU. A requeued job resumes.
#   DATA_ROOT=s3://bucket/instella sbatch --nodes 4 --export ALL,STAGE=pretrain examples/instellavl/launch_slurm.sh
#SBATCH --job-name megatron-vlm
#SBATCH --ntasks-per-node 1
#SBATCH --gpus-per-node 8
#SBATCH --requeue
set -euo pipefail
: "${DATA_ROOT:?folder or s3:// prefix of the datasets in the mixes}" "${STAGE:?warmup, pretrain or instruct}"
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 \
    --rdzv-backend c10d --rdzv-endpoint "$head_node:29500" --rdzv-id "$SLURM_JOB_ID" \
    -m megatron_vlm.train --config "examples/instellavl/$STAGE.yaml" --data-root "$DATA_ROOT" "$@"
