#!/usr/bin/env bash
# Train the three stages in order on one node with several GPUs; each starts from the checkpoint of the one before.
#   GPUS=8 DATA_ROOT=/data/instella examples/instellavl/launch_torchrun.sh
set -euo pipefail
: "${DATA_ROOT:?folder or s3:// prefix of the datasets in the mixes}"
for stage in warmup pretrain instruct; do
    torchrun --standalone --nproc-per-node "${GPUS:-8}" -m megatron_vlm.train \
        --config "examples/instellavl/$stage.yaml" --data-root "$DATA_ROOT" "$@"
done
