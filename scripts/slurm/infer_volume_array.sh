#!/usr/bin/env bash
# Label many volumes with a SLURM array: task i of n takes every n-th volume.
#
#   cd <repository>
#   sbatch --array=0-7 --time=04:00:00 --gres=gpu:1 --cpus-per-task=4 scripts/slurm/infer_volume_array.sh \
#       --config tutorials/nnunet_mito_inference.yaml --checkpoint MODEL \
#       inference.volume_mode.file_pattern='/data/*.h5' inference.data.output_path=/results
#
# The words after the script are those of `connectomics infer-volume`, options first. Added here: the task's share
# (start_index and step), and, unless stated, system.device=cuda where SLURM gave a GPU and system.num_cpus of
# --cpus-per-task. Relative paths are relative to the folder of submission.
#
# 120 s before the time limit the work stops, what is finished is on disk, and the task is requeued and continues.
# Give a limit of several minutes at least; SLURM may send the signal up to a minute early.
# Exit codes: those of connectomics (0 done, 2 wrong usage, 3 some volumes failed); 138 stopped, but not requeued;
# 143 preempted or cancelled.
#
# Environment (all optional)
#   CONNECTOMICS_PYTHON        the Python to use; else .venv/bin/python of CONNECTOMICS_HOME, or of the folder of
#                              submission where that is the repository; else `connectomics` on PATH
#   CONNECTOMICS_HOME          the repository
#   CONNECTOMICS_MAX_RESTARTS  a task restarted so often is not requeued again (default 100)
#SBATCH --job-name=infer-volume
#SBATCH --output=infer_volume_%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
set -euo pipefail

readonly STOPPED=138  # 128 + SIGUSR1: connectomics was asked to stop and can continue
say() { echo "infer_volume_array: $*" >&2; }
refuse() { say "$*"; exit 2; }

# Whether key $1 is among the words that follow.
stated() {
  local key=$1 word
  shift
  for word in "$@"; do [[ $word != "$key="* ]] || return 0; done
  return 1
}

# Set program to the command that is connectomics. (SLURM runs a copy of this file, so where it lies says nothing.)
find_program() {
  local home
  if [[ -n ${CONNECTOMICS_PYTHON:-} ]]; then
    program=("$CONNECTOMICS_PYTHON" -m connectomics.cli)
    return
  fi
  for home in "${CONNECTOMICS_HOME:-}" "${SLURM_SUBMIT_DIR:-$PWD}"; do
    if [[ -n $home && -f $home/pyproject.toml && -x $home/.venv/bin/python ]]; then
      program=("$home/.venv/bin/python" -m connectomics.cli)
      return
    fi
  done
  program=(connectomics)
  command -v connectomics >/dev/null || refuse "no connectomics found: CONNECTOMICS_PYTHON is not set, no" \
    ".venv/bin/python in a repository at CONNECTOMICS_HOME (${CONNECTOMICS_HOME:-not set}) or at the folder of" \
    "submission (${SLURM_SUBMIT_DIR:-$PWD}), and no connectomics on PATH; run make in the repository or set one of them"
}

# Set index and count: this task's place in the array, counted from 0 without gaps.
find_share() {
  local first=${SLURM_ARRAY_TASK_MIN:-0} last=${SLURM_ARRAY_TASK_MAX:-0} id=${SLURM_ARRAY_TASK_ID:-0} stride=1
  count=${SLURM_ARRAY_TASK_COUNT:-1}
  if ((count > 1)); then stride=$(((last - first) / (count - 1))); fi
  index=$(((id - first) / stride))
  if ((first + stride * (count - 1) != last || first + stride * index != id)); then
    refuse "the array's $count task ids from $first to $last are not evenly spaced; use --array=0-$((count - 1))"
  fi
}

# shellcheck disable=SC2317  # called by the traps
forward() {
  asked=$1
  signals=$((signals + 1))
  say "SIG$1: connectomics is told to stop"
  [[ -z $child ]] || kill -s "$1" "$child" 2>/dev/null || true
}

# Run a command and set code to its exit status, however many signals interrupt the waiting.
run() {
  local seen=-1
  asked='' child='' signals=0
  trap 'forward USR1' USR1
  trap 'forward TERM' TERM
  "$@" &
  child=$!
  [[ -z $asked ]] || kill -s "$asked" "$child" 2>/dev/null || true  # a signal that came before the child
  while ((seen != signals)); do
    seen=$signals
    code=0
    wait "$child" || code=$?
  done
}

# Put this task back into the queue, from where it continues: by array and task, for the last task's own number is also
# that of the whole array.
requeue() {
  local task=$SLURM_JOB_ID
  if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then task=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
  if ((${SLURM_RESTART_COUNT:-0} >= ${CONNECTOMICS_MAX_RESTARTS:-100})); then
    say "$task was restarted $SLURM_RESTART_COUNT times and is not requeued; give it more time and submit it again"
    exit "$STOPPED"
  fi
  trap '' TERM  # SLURM ends a task that it requeues
  scontrol requeue "$task" || { say "$task could not be requeued; submit it again, it continues"; exit "$STOPPED"; }
  say "$task is requeued and continues"
}

for key in inference.volume_mode.start_index inference.volume_mode.step; do
  ! stated "$key" "$@" || refuse "$key is set by the array; leave it out"
done
find_program
find_share
words=("inference.volume_mode.start_index=$index" "inference.volume_mode.step=$count")
if [[ -n ${CUDA_VISIBLE_DEVICES:-} && $CUDA_VISIBLE_DEVICES != NoDevFiles ]] && ! stated system.device "$@"; then
  words+=(system.device=cuda)
fi
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]] && ! stated system.num_cpus "$@"; then
  words+=("system.num_cpus=$((SLURM_CPUS_PER_TASK < 8 ? SLURM_CPUS_PER_TASK : 8))")  # 8: nnU-Net's own bound
fi
say "share $index of $count on $HOSTNAME, restarts ${SLURM_RESTART_COUNT:-0}: ${program[*]}"
run "${program[@]}" infer-volume "$@" "${words[@]}"
if ((code == STOPPED)) && [[ -n ${SLURM_JOB_ID:-} ]]; then
  requeue
  exit 0
fi
exit "$code"
