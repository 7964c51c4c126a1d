# Read by launch_torchrun.sh and launch_slurm.sh: the trainer's arguments of a stage, and whether to start again.
# shellcheck shell=bash

# Exit codes of megatron_vlm/runtime/exit_codes.py.
# shellcheck disable=SC2034
FINISHED=0 FAILED=1 WRONG_SETTINGS=2 SAVED=75

wrong() {
    echo "$(basename "$0"): $1. See --help." >&2
    exit "$WRONG_SETTINGS"
}

# value FLAG VALUE...: the value of a flag, which must not be missing or look like the next flag.
value() {
    [[ $# -ge 2 && -n $2 && $2 != --* ]] || wrong "$1 needs a value"
    printf '%s\n' "$2"
}

# number LEAST FLAG VALUE...
number() {
    local found least=$1
    shift
    found=$(value "$@")
    [[ $found =~ ^[0-9]+$ && $found -ge $least ]] || wrong "$1 is $found, which is no number of at least $least"
    printf '%s\n' "$found"
}

# Defaults of the flags that both scripts have.
# shellcheck disable=SC2034  # used by the other scripts
data_root='' stage='' checkpoints=checkpoints recipes=examples/instellavl gpus=8 max_restarts=3 max_failures=3

# set_common FLAG VALUE...: one of these flags.
# shellcheck disable=SC2034
set_common() {
    case $1 in
        --data-root) data_root=$(value "$@") ;;
        --stage) stage=$(value "$@") ;;
        --checkpoints) checkpoints=$(value "$@") ;;
        --recipes) recipes=$(value "$@") ;;
        --gpus) gpus=$(number 1 "$@") ;;
        --max-restarts) max_restarts=$(number 0 "$@") ;;
        --max-failures) max_failures=$(number 1 "$@") ;;
    esac
}

# previous STAGE: the folder of checkpoints that the stage starts from.
previous() {
    case $1 in
        warmup) echo start ;;
        pretrain) echo warmup ;;
        instruct) echo pretrain ;;
        *) wrong "--stage is $1; known are warmup, pretrain and instruct" ;;
    esac
}

# set_train_arguments STAGE RECIPES DATA_ROOT CHECKPOINTS
set_train_arguments() {
    local start
    start=$(previous "$1")
    # shellcheck disable=SC2034  # used by the other scripts
    train_arguments=(
        -m megatron_vlm.train --config "$2/$1.yaml" --data-root "$3" --tokenizer-model "$4/start/tokenizer"
        --pretrained-checkpoint "$4/$start" --save "$4/$1"
    )
    [[ -f $2/$1.yaml ]] || wrong "$2/$1.yaml does not exist: start this in the root of the repository, or give --recipes"
}

# newest_iteration SAVE: what was saved last. Of an object store it is not known here.
newest_iteration() {
    cat "$1/latest_checkpointed_iteration.txt" 2>/dev/null || echo none
}

# count_failures CODE BEFORE AFTER FAILURES: failed starts in a row, BEFORE and AFTER being the newest iteration then.
# One that saved its state, or failed with a newer checkpoint than it started from, is none.
count_failures() {
    if [[ $1 == "$SAVED" ]]; then
        echo 0
    elif [[ $2 != "$3" ]]; then
        echo 1
    else
        echo $(($4 + 1))
    fi
}

# may_start_again CODE FAILURES MAX_FAILURES
may_start_again() {
    if [[ $1 == "$SAVED" ]]; then
        return 0
    elif [[ $1 == "$WRONG_SETTINGS" ]]; then
        echo "The settings are wrong or losses stay NaN: not started again." >&2
        return 1
    elif [[ $1 != "$FAILED" && $1 -le 128 ]]; then
        echo "Exit code $1 is not the trainer's: not started again." >&2
        return 1
    elif [[ $2 -ge $3 ]]; then
        echo "$2 starts in a row failed without a newer checkpoint, the last with exit code $1: not started again." >&2
        return 1
    fi
    return 0
}
