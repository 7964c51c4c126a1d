#!/usr/bin/env bash
# Evaluate a model on the 14 published benchmarks with lmms-eval, and print the scores beside the published ones.
set -euo pipefail

tasks=gqa,scienceqa_img,pope,mmbench_en_dev,seedbench,mmmu_val,realworldqa,mmstar
tasks+=,ocrbench,textvqa_val,ai2d,chartqa,docvqa_val,infovqa_val
model='' output='' processes=1 limit=()

usage() {
    cat <<EOF
usage: examples/instellavl/evaluate.sh --model DIR --output DIR [options]

  --model DIR      a Megatron checkpoint, or an exported folder
  --output DIR     folder for results and logs; benchmarks that have results there are not evaluated again
  --tasks A,B,...  benchmarks, by default all 14: $tasks
  --processes N    processes, one for each GPU; by default 1
  --limit N        ask only the first N questions of each benchmark

lmms-eval downloads each benchmark's data when it is first used. It needs: pip install 'megatron-vlm[eval]'
EOF
}

fail() {
    echo "evaluate.sh: $1 (--help lists all arguments)" >&2
    exit 2
}

while (($#)); do
    case $1 in
    -h | --help)
        usage
        exit
        ;;
    --model | --output | --tasks | --processes | --limit)
        (($# > 1)) || fail "$1 needs a value"
        case $1 in
        --model) model=$2 ;;
        --output) output=$2 ;;
        --tasks) tasks=$2 ;;
        --processes) processes=$2 ;;
        --limit) limit=(--limit "$2") ;;
        esac
        shift 2
        ;;
    *) fail "unknown argument $1" ;;
    esac
done
[[ -n $model ]] || fail "--model is missing"
[[ -n $output ]] || fail "--output is missing"
[[ -d $model ]] || fail "--model $model is not a folder"

# One call for each benchmark, so that one whose data cannot be downloaded does not lose the others. lmms-eval ends with
# exit code 0 even then: the table says what is missing.
IFS=, read -ra names <<<"$tasks"
for task in "${names[@]}"; do
    if [[ -n $(find "$output/$task" -name '*results.json' -print -quit 2>/dev/null) ]]; then
        echo "$task: has results in $output/$task"
        continue
    fi
    accelerate launch --num_processes="$processes" \
        -m lmms_eval \
        --model instellavl \
        --model_args "pretrained=$model,conv_template=instella,model_name=instellavl" \
        --tasks "$task" \
        --batch_size 1 \
        --log_samples \
        --log_samples_suffix instellavl \
        "${limit[@]}" \
        --output_path "$output/$task" || echo "evaluate.sh: $task failed" >&2
done
megatron-vlm benchmark-table "$output" --tasks "$tasks"
