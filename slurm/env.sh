# shellcheck shell=bash
# The environment of the jobs that slurm/run.sbatch starts; change it as your cluster needs it. What is set here reaches
# every rank. Nothing secret belongs here: SLURM keeps scripts and environments on disk. `wandb login` writes ~/.netrc.

# module load cuda/13.0
# source "$HOME/megalm-env/bin/activate"
PYTHON=${PYTHON:-$(command -v python)}
export PYTHONSAFEPATH=1 # a folder that happens to be named like a module must not stand in for it

# Set by each node's task where nothing is set here (megalm/launchers/slurm/task.py):
#   OMP_NUM_THREADS         the node's CPUs shared evenly by its ranks
#   GLOO_SOCKET_IFNAME      the interface that leads to the other nodes
#   NCCL_SOCKET_IFNAME      the same, for NCCL's first meeting; its data goes over InfiniBand where there is any
#   NCCL_DEBUG              WARN
#   TRITON_CACHE_DIR        a folder of yours in the node's own /tmp: on a shared disk ranks wait for each other's locks
#
# Some clusters need more, for example:
# export NCCL_IB_HCA=mlx5 NCCL_IB_TIMEOUT=22
# export TRITON_CACHE_DIR=/local/$USER/triton
