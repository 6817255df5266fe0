#!/usr/bin/env bash
# Train on several nodes under SLURM's time limit: the job saves before it ends, queues itself again, and continues the same run.
#
#     sbatch --nodes 2 examples/slurm_nodes.sh --dataset_id ISdept/piper_arm --output_dir outputs/my_run --batch_size 256
#
# --output_dir must be on a disk that all nodes share. For FSDP or DeepSpeed: CONFIG=examples/accelerate/fsdp.yaml sbatch ...
#
#SBATCH --job-name=armature
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
export MAIN=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) CONFIG=${CONFIG:-examples/accelerate/ddp.yaml}
export PROCESSES=$((SLURM_NNODES * ${SLURM_GPUS_ON_NODE:-8}))
asked=0

# Signal only this node's training processes: all ranks then save and stop together. The launcher would die of the signal.
trap 'asked=1; pkill -USR1 -f "python[0-9.]* (-u )?src/train.py"' USR1

export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not inherit it from the job

# auto: the newest complete checkpoint in --output_dir, or a fresh start
srun bash -c '.venv/bin/accelerate launch --config_file "$CONFIG" --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$MAIN" --main_process_port 29500 --num_processes "$PROCESSES" src/train.py "$@" --resume_from_checkpoint auto' _ "$@" &
while wait $!; status=$?; [ $status -gt 128 ] && kill -0 $! 2>/dev/null; do :; done # a trapped signal ends `wait` early
if [ $asked -eq 1 ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit $status
