#!/usr/bin/env bash
# Label many volumes with all GPUs of one machine: process i of N takes every N-th volume on cuda:i.
#
#   cd <repository>
#   sbatch --time=12:00:00 --gres=gpu:4 --cpus-per-task=16 scripts/slurm/infer_volume_4gpu.sh \
#       --config tutorials/nnunet_mito_inference.yaml --checkpoint MODEL \
#       inference.volume_mode.file_pattern='/data/*.h5' inference.data.output_path=/results
#   GPUS=4 bash scripts/slurm/infer_volume_4gpu.sh ...                # the same without SLURM
#   GPUS=2 DEVICE=cpu bash scripts/slurm/infer_volume_4gpu.sh ...     # to try it where there is no GPU
#
# The words after the script are those of `connectomics infer-volume`, options first. Added here: each process's share
# (start_index and step), its system.device, and, unless stated, its part of the CPUs as system.num_cpus.
#
# Each process writes LOGS/infer_volume_4gpu_<job>_<i>.log. SIGUSR1, SIGTERM and SIGINT (as SIGTERM) go to all of them.
# 120 s before SLURM's time limit the work stops, what is finished is on disk, and the job is requeued and continues.
# Exit code: the worst (highest) of the processes: 0 done, 2 wrong usage, 3 some volumes failed; 138 stopped, but not
# requeued; 143 preempted, cancelled or interrupted.
#
# Environment (all optional)
#   GPUS                       processes; default: as many as CUDA_VISIBLE_DEVICES lists, else 4
#   DEVICE                     the device of every process instead of cuda:0, cuda:1, ...
#   LOGS                       folder of the processes' logs (default: the working directory)
#   CONNECTOMICS_PYTHON, CONNECTOMICS_HOME, CONNECTOMICS_MAX_RESTARTS   as for infer_volume_array.sh
#SBATCH --job-name=infer-volume
#SBATCH --output=infer_volume_4gpu_%j.log
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gres=gpu:4
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
set -euo pipefail

readonly STOPPED=138  # 128 + SIGUSR1: connectomics was asked to stop and can continue
say() { echo "infer_volume_4gpu: $*" >&2; }
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

# Set gpus, the number of processes.
count_processes() {
  local listed
  IFS=, read -ra listed <<<"${CUDA_VISIBLE_DEVICES:-}"
  gpus=${GPUS:-$((${#listed[@]} > 0 ? ${#listed[@]} : 4))}
  [[ $gpus =~ ^[1-9][0-9]*$ ]] || refuse "GPUS is '$gpus'; expected a number of processes of at least 1"
}

# Send signal $1 to the processes that live; a dead one's number may be another's by now.
pass_on() {
  local running
  read -ra running <<<"$(jobs -pr | tr '\n' ' ')"
  say "SIG$1: connectomics (processes ${running[*]}) is told to stop"
  kill -s "$1" "${running[@]}" 2>/dev/null || true
}

# shellcheck disable=SC2317  # called by the traps
forward() {
  asked=$1
  signals=$((signals + 1))
  ((${#children[@]} < gpus)) || pass_on "$1"
}

# Set code to the exit status of child $1, however many signals interrupt the waiting.
await() {
  local seen=-1
  while ((seen != signals)); do
    seen=$signals
    code=0
    wait "$1" || code=$?
  done
}

# Put this job back into the queue, from where it continues.
requeue() {
  if ((${SLURM_RESTART_COUNT:-0} >= ${CONNECTOMICS_MAX_RESTARTS:-100})); then
    say "job $SLURM_JOB_ID was restarted $SLURM_RESTART_COUNT times and is not requeued; give it more time and" \
      "submit it again"
    exit "$STOPPED"
  fi
  trap '' TERM  # SLURM ends a job that it requeues
  scontrol requeue "$SLURM_JOB_ID" || {
    say "job $SLURM_JOB_ID could not be requeued; submit it again, it continues"
    exit "$STOPPED"
  }
  say "job $SLURM_JOB_ID is requeued and continues"
}

[[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || refuse "each task of an array would label every volume; for several machines" \
  "use infer_volume_array.sh with one task a GPU"
for key in inference.volume_mode.start_index inference.volume_mode.step system.device; do
  ! stated "$key" "$@" || refuse "$key is set for each process by this script (GPUS, DEVICE); leave it out"
done
find_program
count_processes
cpus=$((${SLURM_CPUS_PER_TASK:-$(nproc)} / gpus))
cpus=$((cpus < 1 ? 1 : cpus > 8 ? 8 : cpus))  # 8: nnU-Net's own bound
logs=${LOGS:-.}
mkdir -p -- "$logs"
asked='' children=() signals=0
trap 'forward USR1' USR1
trap 'forward TERM' TERM INT
for ((i = 0; i < gpus; i++)); do
  words=("inference.volume_mode.start_index=$i" "inference.volume_mode.step=$gpus" "system.device=${DEVICE:-cuda:$i}")
  stated system.num_cpus "$@" || words+=("system.num_cpus=$cpus")
  log=$logs/infer_volume_4gpu_${SLURM_JOB_ID:-local}_$i.log
  "${program[@]}" infer-volume "$@" "${words[@]}" >>"$log" 2>&1 &
  children+=($!)
  say "share $i of $gpus on $HOSTNAME, ${DEVICE:-cuda:$i}, process $!, log $log"
done
[[ -z $asked ]] || pass_on "$asked"  # a signal that came before all were started
worst=0
for i in "${!children[@]}"; do
  await "${children[i]}"
  say "share $i of $gpus ended with exit code $code"
  if ((code > worst)); then worst=$code; fi
done
if ((worst == STOPPED)) && [[ -n ${SLURM_JOB_ID:-} ]]; then
  requeue
  exit 0
fi
exit "$worst"
