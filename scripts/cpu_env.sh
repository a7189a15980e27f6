# Sourced: settings for training small models on a CPU.
# One thread per process (several processes share the cores), and a glibc allocator that keeps big blocks instead of
# giving them back to the system after every tensor.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export MALLOC_TOP_PAD_=1000000000 MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000
export TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1
# Ray runs its workers at niceness 15, where anything else on the machine starves them.
export RAY_worker_niceness=0
# On a machine that has a GPU, too: the quick start and the tests run on the CPU.
export VERL_PLATFORM=cpu
source "$(dirname "${BASH_SOURCE[0]}")/home.sh"
