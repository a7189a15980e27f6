"""Settings that let verl's own vllm rollout run on the CPU build of vLLM."""

from __future__ import annotations

from importlib import metadata

import pytest

WORKER = "tests.vllm.worker.CpuWorkerExtension"

# verl's overrides, on top of hardware=cpu.
VLLM_ON_CPU = [
    "actor_rollout_ref.rollout.name=vllm",
    # A CPU has no sleep mode: the server keeps its memory while the trainer updates, and gets new weights in place.
    "+actor_rollout_ref.rollout.enable_sleep_mode=False",
    "actor_rollout_ref.rollout.free_cache_engine=False",
    # Compiling a small model costs more than it gives.
    "actor_rollout_ref.rollout.enforce_eager=True",
    # A prompt in two chunks takes back a random number of its request, which torch's generator cannot do on a CPU.
    "actor_rollout_ref.rollout.enable_chunked_prefill=False",
    # Weights travel in shared memory; verl's default is a segment of 2 GB.
    "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes=16",
    # Else vLLM takes half of the machine's memory for its cache.
    f"+actor_rollout_ref.rollout.engine_kwargs.vllm.kv_cache_memory_bytes={256 << 20}",
    f"+actor_rollout_ref.rollout.engine_kwargs.vllm.worker_extension_cls={WORKER}",
]

# Environment of vLLM's processes.
ENVIRONMENT = {
    # Threads are not tied to cores: other processes of the run use them too.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # The sampler is compiled on its first use otherwise, with enforce_eager too.
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


def _missing() -> str | None:
    try:
        metadata.version("vllm-cpu")
        version = metadata.version("vllm")
    except metadata.PackageNotFoundError as error:
        return f"no distribution {error.name}"
    return None if version.endswith("+cpu") else f"vllm {version} is not a CPU build"


def needs_vllm_on_cpu() -> list[pytest.MarkDecorator]:
    """Marks of a test module that runs vLLM's CPU build; skipped where it is not installed."""
    missing = _missing()
    skip = pytest.mark.skipif(
        missing is not None, reason=f"{missing}: bash scripts/test.sh --vllm installs and runs it"
    )
    return [pytest.mark.vllm, pytest.mark.integration, skip]
