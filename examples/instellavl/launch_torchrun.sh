#!/usr/bin/env bash
# One machine with several GPUs: the three stages one after the other, each from the last one's checkpoint.
#   GPUS=8 DATA_ROOT=/data/instella examples/instellavl/launch_torchrun.sh
set -euo pipefail
: "${DATA_ROOT:?folder or s3:// prefix that holds the datasets of the mixes}"
for stage in warmup pretrain instruct; do
    torchrun --standalone --nproc-per-node "${GPUS:-8}" -m megatron_vlm.train \
        --config "examples/instellavl/$stage.yaml" --data-root "$DATA_ROOT" "$@"
done
