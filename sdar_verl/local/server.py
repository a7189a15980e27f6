"""The CPU rollout server: one Ray actor with a transformers model behind verl's token-in, token-out interface.

It offers the methods that verl's trainer, checkpoint manager and agent loops call on vLLM's and SGLang's servers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from verl.utils import normalize_token_ids
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.config import HFModelConfig, RolloutConfig
from verl.workers.engine.fsdp.utils import unfuse_moe_params
from verl.workers.rollout.replica import TokenOutput

from sdar_verl.local.requests import Completion
from sdar_verl.local.sampling import SamplingParams
from sdar_verl.local.scheduler import BatchScheduler
from sdar_verl.local.slot_cache import attends_fully, verify_slot_cache
from sdar_verl.rollout.answers import eos_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# verl's TokenOutput.stop_reason of a finish reason (verl/workers/rollout/vllm_rollout/vllm_async_server.py).
_STOP_REASONS = {"stop": "completed", "length": "completed", "abort": "aborted"}


class TransformersServer:
    """One rollout replica.

    The weights are random until the first ``update_weights``, which verl does before any generation.

    Args:
        config: ``actor_rollout_ref.rollout``. Read: limits (prompt_length, response_length,
            max_model_len, max_num_seqs, max_num_batched_tokens), dtype, seed, free_cache_engine, ignore_eos and
            ``custom.threads`` (CPU threads of this server; null follows OMP_NUM_THREADS).
        model_config: ``actor_rollout_ref.model``.
        replica_rank: rank of this replica; part of its seed.
    """

    def __init__(self, config: RolloutConfig, model_config: Any, replica_rank: int) -> None:
        from transformers import AutoModelForCausalLM

        threads = (config.custom or {}).get("threads")
        if threads is not None:
            torch.set_num_threads(int(threads))
        self.config = config
        self.model_config: HFModelConfig = omega_conf_to_dataclass(model_config, dataclass_type=HFModelConfig)
        hf_config = self.model_config.hf_config
        self._model = AutoModelForCausalLM.from_config(
            hf_config,
            dtype=PrecisionType.to_dtype(config.dtype),
            attn_implementation="sdpa" if attends_fully(hf_config) else hf_config._attn_implementation,
            trust_remote_code=self.model_config.trust_remote_code,
        ).eval()
        self._scheduler = BatchScheduler(
            self._model,
            eos_token_ids=eos_token_ids(
                self.model_config.path, self.model_config.tokenizer, self.model_config.generation_config
            ),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            seed=config.seed + replica_rank,
        )
        self._context = min(
            config.max_model_len or hf_config.max_position_embeddings, hf_config.max_position_embeddings
        )
        self._global_steps: int | None = None
        self._loaded = False
        self._awake = True
        self._admitting = asyncio.Event()
        self._admitting.set()
        self._rejecting = False

    async def ready(self) -> bool:
        """Answers once the model is built."""
        return True

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling_params: Mapping[str, Any],
        request_id: str,
        image_data: list[Any] | None = None,
        video_data: list[Any] | None = None,
        **unsupported: Any,
    ) -> TokenOutput:
        """Sample one response.

        Args:
            prompt_ids: token ids of the prompt.
            sampling_params: see ``SamplingParams.from_request``.
            request_id: only for error messages.
            image_data, video_data: must be empty; this server is for text.
            unsupported: options of other engines; must be None.

        Raises:
            RuntimeError: while the server sleeps, before its first weights, or once its sampling loop has failed.
            ValueError: for input it cannot serve.
        """
        extra = {"image_data": image_data, "video_data": video_data, **unsupported}
        if any(value is not None for value in extra.values()):
            given = sorted(name for name, value in extra.items() if value is not None)
            raise ValueError(f"rollout.name=transformers serves text only, but the request carries {given}")
        prompt = normalize_token_ids(prompt_ids)
        vocabulary = self._model.get_input_embeddings().weight.shape[0]
        if foreign := [token for token in prompt if not 0 <= token < vocabulary]:
            raise ValueError(f"a prompt has token {foreign[0]}, the model {vocabulary} of them; check the tokenizer")
        room = self._context - len(prompt)
        if room < 1:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens leaves no room in the model's context of {self._context}: lower "
                "data.max_prompt_length or raise rollout.max_model_len (up to the model's max_position_embeddings)"
            )
        params = SamplingParams.from_request(
            {"ignore_eos": self.config.ignore_eos, **sampling_params},
            default_max_tokens=min(
                self.config.response_length, self.config.prompt_length + self.config.response_length - len(prompt)
            ),
            room=room,
        )
        if not self._admitting.is_set() and self._rejecting:
            return self._output(Completion([], None, "abort"))
        await self._admitting.wait()
        if not self._awake:
            raise RuntimeError(f"request {request_id} reached rollout replica while it sleeps (weights not in sync)")
        if not self._loaded:
            raise RuntimeError(f"request {request_id} reached rollout replica before its first weights")
        completion = await asyncio.wrap_future(self._scheduler.submit(prompt, params))
        return self._output(completion)

    def _output(self, completion: Completion) -> TokenOutput:
        extra_fields: dict[str, Any] = {"global_steps": self._global_steps}
        if completion.scored is not None:
            # As verl's vLLM and SGLang servers shape them: entry i is about token i + 1, the last one is a dummy.
            ids, log_probs = completion.scored
            width = len(ids[0]) if ids else 1
            extra_fields["prompt_ids"] = [*ids, [0] * width]
            extra_fields["prompt_logprobs"] = [*log_probs, [0.0] * width]
        return TokenOutput(
            token_ids=completion.token_ids,
            log_probs=completion.log_probs,
            stop_reason=_STOP_REASONS[completion.finish_reason],
            num_preempted=0,
            extra_fields=extra_fields,
        )

    async def update_weights(self, tensors: Mapping[str, torch.Tensor], global_steps: int | None) -> None:
        """Replace all weights.

        Args:
            tensors: every parameter by its name in the model's state dict; tied ones may be left out.
            global_steps: the trainer's step these weights belong to.

        Raises:
            ValueError: when names are missing or unknown.
        """
        first = not self._loaded

        def load() -> None:
            missing, unexpected = load_weights(self._model, tensors)
            if missing or unexpected:
                raise ValueError(
                    f"the trainer's weights do not fit the rollout model {self.model_config.path}: missing "
                    f"{sorted(missing)[:3]}, unexpected {sorted(unexpected)[:3]}"
                )
            if first and attends_fully(self._model.config):
                verify_slot_cache(self._model)

        await asyncio.wrap_future(self._scheduler.call(load))
        self._loaded = True
        await self.set_global_steps(global_steps)

    async def set_global_steps(self, global_steps: int | None) -> None:
        """Name the trainer's step that the weights belong to; every response carries it."""
        self._global_steps = global_steps

    async def wake_up(self, tags: list[str] | None = None) -> None:
        """Serve again; verl wakes the weights first, and the key-value cache once they are in sync."""
        if tags is None or "kv_cache" in tags:
            self._awake = True

    async def sleep(self) -> None:
        """Stop serving while the trainer updates (``free_cache_engine``); there is no memory worth giving back."""
        if self.config.free_cache_engine:
            self._awake = False

    async def abort_all_requests(self, reject_request: bool = False) -> int:
        """End the requests under way with what they have, and hold or reject new ones until ``resume_generation``."""
        self._admitting.clear()
        self._rejecting = reject_request
        return await asyncio.wrap_future(self._scheduler.abort_all())

    async def resume_generation(self) -> None:
        """Take requests again after ``abort_all_requests``."""
        self._rejecting = False
        self._admitting.set()

    async def clear_kv_cache(self) -> None:
        """Nothing to clear: no response reuses the cache of an earlier one."""

    async def release_kv_cache(self) -> None:
        """Nothing to give back, see ``sleep``."""

    async def resume_kv_cache(self) -> None:
        """Nothing to take back, see ``sleep``."""

    async def start_profile(self, **kwargs: Any) -> None:
        """This server has no profiler."""

    async def stop_profile(self) -> None:
        """This server has no profiler."""

    async def get_stats(self) -> dict[str, float]:
        """Work done so far (``scheduler.Counters``), requests running and waiting."""
        return self._scheduler.counters()


def load_weights(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> tuple[set[str], set[str]]:
    """Give a model the weights that verl's trainer sends; names that it lacks, and names that it has no place for."""
    # verl names experts one by one, as checkpoints do; taken apart in the same way, the model's own are views of it.
    own = dict(unfuse_moe_params(model.state_dict().items(), model.config.model_type))
    fit = {name for name in own.keys() & tensors.keys() if own[name].shape == tensors[name].shape}
    for name in fit:
        own[name].copy_(tensors[name])
    return own.keys() - fit - set(model.all_tied_weights_keys), tensors.keys() - fit
