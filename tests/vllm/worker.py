"""What vLLM's worker process needs on a CPU so that verl can send it weights. For the tests of this folder only.

vLLM's CPU build packs the weights of linear layers into oneDNN's own format after loading and leaves an empty tensor in
their place; verl's weight sync then has nothing to write into and never answers. Without the packing vLLM computes with
torch's own linear layer. The class is named to vLLM by a setting (tests/vllm/settings.py), which loads it in vLLM's
worker process and nowhere else; the rest of verl's server, replica and weight transfer runs as it is.
"""

from __future__ import annotations

from typing import Any

import vllm._custom_ops as custom_ops
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension


class CpuWorkerExtension(vLLMColocateWorkerExtension):
    """verl's own worker extension, without oneDNN's packing."""

    def __new__(cls, **kwargs: Any) -> CpuWorkerExtension:
        # Before the model is built. The flag says whether the build has oneDNN.
        custom_ops._supports_onednn = False
        return super().__new__(cls, **kwargs)
