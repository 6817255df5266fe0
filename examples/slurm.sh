#!/usr/bin/env bash
# Train under SLURM's time limit: the job saves before it ends, queues itself again, and continues the same run.
#
#     sbatch examples/slurm.sh --dataset_id ISdept/piper_arm --output_dir outputs/my_run --steps 100000
#
#SBATCH --job-name=armature
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@120
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not inherit it from the job

# auto: the newest complete checkpoint in --output_dir, or a fresh start. srun forwards USR1, 120 s before the limit.
srun .venv/bin/python src/train.py "$@" --resume_from_checkpoint auto
status=$?
if [ $status -eq 138 ]; then # stopped by SIGUSR1, with a checkpoint
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit $status
