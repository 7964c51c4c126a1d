#!/usr/bin/env bash
# Train one stage or all three with torchrun's agents, on one node or on several. See --help.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source examples/instellavl/launch_common.sh

usage() {
    cat <<'HELP'
Usage: examples/instellavl/launch_torchrun.sh --data-root DIR [NAMED ARGUMENTS] [-- SETTINGS OF THE TRAINER]

Start the same command on every node. Whatever ends, it is started again from its newest checkpoint: a rank, by the
agent of its node; an agent, by this script. Wrong settings are not. A node that dies may come back, or another
in its place.

  --data-root DIR          folder or s3:// prefix of the data sets in the mixes
  --stage STAGE            warmup, pretrain, instruct, or all (default): each from the checkpoint of the one before
  --checkpoints DIR        default: checkpoints. Has start/ (the imported model); each stage saves into DIR/STAGE.
                           On storage that all nodes see
  --recipes DIR            folder of STAGE.yaml; default: examples/instellavl
  --gpus N                 ranks per node; default: 8
  --nodes N | MIN:MAX      default: 1. With MIN:MAX training continues with fewer nodes while one is missing, and with
                           more when it is back; every number of nodes must fit the parallel layout
  --rendezvous HOST:PORT   the first node, the same on all; needed with several nodes
  --run-name NAME          of the rendezvous, the same on all nodes; default: instellavl
  --max-restarts N         restarts of ranks by an agent; default: 3
  --max-failures N         starts in a row that may fail without a newer checkpoint; default: 3
  --help

SIGTERM, SIGUSR1 and Ctrl-C save a checkpoint and end the script.
HELP
}

stage=all nodes=1 rendezvous='' run_name=instellavl
while [[ $# -gt 0 ]]; do
    case $1 in
        --data-root | --stage | --checkpoints | --recipes | --gpus | --max-restarts | --max-failures) set_common "$@" ;;
        --nodes) nodes=$(value "$@") ;;
        --rendezvous) rendezvous=$(value "$@") ;;
        --run-name) run_name=$(value "$@") ;;
        --help | -h) usage && exit ;;
        --) shift && break ;;
        *) wrong "unknown argument $1; settings of the trainer come after --" ;;
    esac
    shift 2
done
[[ -n $data_root ]] || wrong "--data-root is missing"
[[ $nodes =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || wrong "--nodes is $nodes, which is neither N nor MIN:MAX"
if [[ $nodes == 1 ]]; then
    meeting=(--standalone)
else
    [[ $rendezvous =~ ^[^:]+:[0-9]+$ ]] || wrong "several nodes need --rendezvous HOST:PORT"
    # A node waits ten minutes for the first one, and half an hour for enough others.
    meeting=(
        --nnodes "$nodes" --rdzv-backend c10d --rdzv-endpoint "$rendezvous"
        --rdzv-conf "read_timeout=600,join_timeout=1800"
    )
fi
if [[ $stage == all ]]; then stages=(warmup pretrain instruct); else stages=("$stage"); fi
for stage in "${stages[@]}"; do set_train_arguments "$stage" "$recipes" "$data_root" "$checkpoints"; done

agent='' stopped='' interrupted=''
# pass_on SIGNAL SENT: the agent is in a process group of its own, so that Ctrl-C reaches it here only.
pass_on() {
    stopped=$1 interrupted=yes
    [[ -z $agent ]] || kill -s "$2" "$agent" 2>/dev/null || true
}
trap 'pass_on TERM TERM' TERM
trap 'pass_on INT TERM' INT
trap 'pass_on USR1 USR1' USR1
set -m

# run_agent ARGUMENTS: sets code. A trapped signal ends `wait` with a code of its own, even when the agent ends at once.
run_agent() {
    local again
    python -m megatron_vlm.launch "$@" &
    agent=$!
    [[ -z $stopped ]] || kill -s TERM "$agent"
    interrupted='' code=0
    wait "$agent" || code=$?
    while [[ -n $interrupted ]]; do
        interrupted='' again=0
        wait "$agent" || again=$?
        ((again == 127)) || code=$again # 127: the wait before had the agent's code already
    done
    agent=''
}

for stage in "${stages[@]}"; do
    set_train_arguments "$stage" "$recipes" "$data_root" "$checkpoints"
    failures=0
    while true; do
        before=$(newest_iteration "$checkpoints/$stage")
        run_agent "${meeting[@]}" --rdzv-id "$run_name-$stage" --nproc-per-node "$gpus" \
            --max-restarts "$max_restarts" "${train_arguments[@]}" "$@"
        [[ $code != "$FINISHED" ]] || break
        if [[ -n $stopped ]]; then
            echo "SIG$stopped was received during $stage: the same command resumes." >&2
            exit "$code"
        fi
        failures=$(count_failures "$code" "$before" "$(newest_iteration "$checkpoints/$stage")" "$failures")
        may_start_again "$code" "$failures" "$max_failures" || exit "$code"
        echo "$stage ended with exit code $code: starting again from the newest checkpoint." >&2
    done
done
