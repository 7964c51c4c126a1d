#!/usr/bin/env bash
# Train one stage on several nodes under Slurm: one agent per node, one process per GPU. See --help.
#SBATCH --job-name megatron-vlm
#SBATCH --ntasks-per-node 1
#SBATCH --gpus-per-node 8
#SBATCH --exclusive
#SBATCH --signal USR1@300
#SBATCH --requeue
#SBATCH --open-mode append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}" # Slurm runs a copy of this script, elsewhere
if [[ ! -f examples/instellavl/launch_common.sh ]]; then
    echo "launch_slurm.sh: submit it in the root of the repository, not in $PWD" >&2
    exit 2
fi
source examples/instellavl/launch_common.sh

usage() {
    cat <<'HELP'
Usage: sbatch --nodes N [FLAGS OF SBATCH] examples/instellavl/launch_slurm.sh --data-root DIR --stage STAGE
           [NAMED ARGUMENTS] [-- SETTINGS OF THE TRAINER]

Submit it in the root of the repository. Five minutes before the time limit the run saves, and the job is queued again;
so it is after a failure, until several starts in a row have failed without a newer checkpoint. A finished run, wrong
settings and scancel end the job.

  --data-root DIR          folder or s3:// prefix of the data sets in the mixes
  --stage STAGE            warmup, pretrain or instruct
  --checkpoints DIR        default: checkpoints. Has start/ (the imported model); the stage saves into DIR/STAGE.
                           On storage that all nodes see
  --recipes DIR            folder of STAGE.yaml; default: examples/instellavl
  --gpus N                 ranks per node; default: 8, as in --gpus-per-node above
  --min-nodes N            continue with so many nodes while others are lost; default: all of the job. Submit with
                           --no-kill then. Every number of nodes must fit the parallel layout
  --port N                 of the rendezvous on the first node; default: 29500
  --max-restarts N         restarts of ranks by an agent within the job; default: 3
  --max-failures N         starts in a row that may fail without a newer checkpoint; default: 3
  --help
HELP
}

min_nodes='' port=29500
while [[ $# -gt 0 ]]; do
    case $1 in
        --data-root | --stage | --checkpoints | --recipes | --gpus | --max-restarts | --max-failures) set_common "$@" ;;
        --min-nodes) min_nodes=$(number 1 "$@") ;;
        --port) port=$(number 1 "$@") ;;
        --help | -h) usage && exit ;;
        --) shift && break ;;
        *) wrong "unknown argument $1; settings of the trainer come after --" ;;
    esac
    shift 2
done
[[ -n $data_root ]] || wrong "--data-root is missing"
[[ -n $stage ]] || wrong "--stage is missing: warmup, pretrain or instruct"
[[ -n ${SLURM_JOB_ID:-} ]] || wrong "this is a job script: start it with sbatch"
set_train_arguments "$stage" "$recipes" "$data_root" "$checkpoints"
nodes=$SLURM_JOB_NUM_NODES
[[ -z $min_nodes || $min_nodes -le $nodes ]] || wrong "--min-nodes is $min_nodes, and the job has $nodes nodes"
if [[ -z $min_nodes || $min_nodes == "$nodes" ]]; then
    steps=(--wait 120) # without one agent the others cannot continue
else
    nodes=$min_nodes:$nodes
    steps=(--wait 0 --no-kill)
fi
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# Across the starts of this job: failed starts in a row.
state=slurm-$SLURM_JOB_ID.failures
failures=$(cat "$state" 2>/dev/null || echo 0)
before=$(newest_iteration "$checkpoints/$stage")
code=0
# Not killed by the first agent that ends: those that saved, too, end with their own exit code.
# shellcheck disable=SC2016  # the node's own number
srun "${steps[@]}" --kill-on-bad-exit=0 --cpu-bind=none --ntasks-per-node 1 \
    bash -c 'exec python -m megatron_vlm.launch --rdzv-conf "is_host=$((SLURM_NODEID == 0))" "$@"' agent \
    --nnodes "$nodes" --nproc-per-node "$gpus" --max-restarts "$max_restarts" \
    --rdzv-backend c10d --rdzv-endpoint "$head_node:$port" --rdzv-id "$SLURM_JOB_ID" \
    "${train_arguments[@]}" "$@" || code=$?
if [[ $code == "$FINISHED" ]]; then
    rm -f "$state"
    exit 0
fi
failures=$(count_failures "$code" "$before" "$(newest_iteration "$checkpoints/$stage")" "$failures")
echo "$failures" >"$state"
may_start_again "$code" "$failures" "$max_failures" || exit "$code"
if ! scontrol show job "$SLURM_JOB_ID" --oneliner | grep -q 'JobState=RUNNING'; then
    echo "The job was cancelled or is at its end: not queued again." >&2
    exit "$code"
fi
echo "$stage ended with exit code $code: the job is queued again and resumes from its newest checkpoint." >&2
scontrol requeue "$SLURM_JOB_ID"
