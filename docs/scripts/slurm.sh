#!/usr/bin/env bash
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=01:00:00
#SBATCH --output=slurm-%j.log
# sbatch docs/scripts/slurm.sh -m jaxfw.launch --config=configs/pretrain.py --config.data=/shared/text --workdir=/shared/runs/pretrain
set -euo pipefail

# One process a node, with all its GPUs. For one a GPU: --ntasks-per-node=8, and no --gpus-per-task (see below).
srun --kill-on-bad-exit=1 --cpu-bind=none "${PYTHON:-python}" "$@"
