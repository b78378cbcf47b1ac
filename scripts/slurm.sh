#!/usr/bin/env bash
#SBATCH --job-name=graft
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
# A training that outlives its time limit and preemptions, one task a GPU, without torchrun:
#   sbatch scripts/slurm.sh finetune_tinyfusion.py <flags>
# Five minutes before the limit, or when preempted, the tasks get a signal, write a checkpoint and
# exit with 75; the job is then queued again and goes on by --resume auto. So it is when the signal
# came before a task could hear it, while Python was starting, and ended it: 128 + 10 (USR1) or 15
# (TERM). Latents, weights and --results-dir lie on a file system that all nodes see; the environment
# is activated beforehand.
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:?submit with sbatch from the repository}"
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# --wait: when one task has ended, the others may take a minute to; then they are killed
srun --gpu-bind=none --wait=60 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    exec python "$@"' task "$@" --resume auto
code=$?
case "$code" in
    75 | 138 | 143) scontrol requeue "$SLURM_JOB_ID" ;;
esac
exit "$code"
