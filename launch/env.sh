# The environment of the ranks of a SLURM job; train.sbatch reads it. What is set already wins, so a site or a user
# changes any of these with `export NAME=...` before `megadpo launch`.

default() { [ -n "${!1+set}" ] || export "$1=$2"; }

# ---- processes

# srun of SLURM 22.05 to 23.02 does not hand the job's --cpus-per-task to its steps.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || default SRUN_CPUS_PER_TASK "$SLURM_CPUS_PER_TASK"
# Left alone, each rank starts a thread per core of the node, and the ranks of a node get in each other's way.
default OMP_NUM_THREADS "${SLURM_CPUS_PER_TASK:-1}"
# Lines reach the job's log when they are written, not when a buffer is full.
default PYTHONUNBUFFERED 1
# A crash in compiled code leaves Python's stack in the rank's log.
default PYTHONFAULTHANDLER 1
# A core file per rank, each as large as its memory, fills the run folder.
ulimit -S -c 0
# A rank holds a socket per peer and a descriptor per file of a checkpoint; the usual 1024 is little at 100 nodes.
ulimit -S -n "$(ulimit -H -n)" 2>/dev/null || true
# Kernels compiled into a shared home are written by every node at once, slowly.
default TRITON_CACHE_DIR "${TMPDIR:-/tmp}/triton-$(id -u)"

# ---- CUDA

# Megatron-Core's tensor parallelism overlaps collectives with matrix products in the order they were launched; with one
# hardware queue that is the order they run in.
default CUDA_DEVICE_MAX_CONNECTIONS 1

# ---- NCCL

# Says why, where it fails, and nothing else.
default NCCL_DEBUG WARN
# The last collectives of each rank are kept, and written when one times out: they show which rank was missing.
default TORCH_FR_BUFFER_SIZE 2000
default TORCH_NCCL_DUMP_ON_TIMEOUT 1
default TORCH_NCCL_DEBUG_INFO_TEMP_FILE "${folder:+${folder%/*}/logs/}nccl-trace-rank-"

# Not set here: NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME, NCCL_IB_HCA. NCCL finds the fabric by itself; where it takes a
# wrong interface, name the right one (docs/slurm.md).
