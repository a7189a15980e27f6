"""What this package needs of verl beyond its documented extension points, and a look whether it is there.

Methods that are overridden or called by name would, after a rename, simply not be called any more: training would go on
without its teacher. So everything is looked up when we register with verl, presence and parameters, and what is missing
is an error; so is a phase of verl's ``_step_once`` that :mod:`sdar_verl.step`, which takes its place, does not know. A
new release of verl is read here first, then in this folder.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

from sdar_verl.errors import ConfigError

_TRAINER = "verl.trainer.ppo.v1.trainer_base"
_WORKERS = "verl.workers.engine_workers"
_SEPARATION = "verl.experimental.separation.engine_workers"
_LOOPS = "verl.experimental.agent_loop.agent_loop"
_FSDP = "verl.workers.engine.fsdp.transformer_impl"

NEEDED: Mapping[str, Mapping[str, str]] = {
    "trainer": {
        # Overridden: verl must go on calling them.
        f"{_TRAINER}:PPOTrainer.step": "metrics timing_raw",
        f"{_TRAINER}:PPOTrainer._step_once": "metrics timing_raw sample_batch_size",
        f"{_TRAINER}:PPOTrainer._build_replay_buffer": "",
        f"{_TRAINER}:PPOTrainer._setup": "",
        f"{_TRAINER}:PPOTrainer._init_tokenizer": "",
        f"{_TRAINER}:PPOTrainer._init_dataloader": "",
        f"{_TRAINER}:PPOTrainer._init_resource_pool_mgr": "",
        f"{_TRAINER}:PPOTrainer._next_train_batch": "num_prompts",
        f"{_TRAINER}:PPOTrainer._val_metrics_update": "data_sources sample_uids reward_extra_infos_dict",
        f"{_TRAINER}:PPOTrainer._save_checkpoint": "",
        f"{_TRAINER}:PPOTrainer._load_checkpoint": "",
        f"{_TRAINER}:PPOTrainer._compute_metrics": "batch metrics timing_raw",
        f"{_TRAINER}:PPOTrainer.on_init_end": "",
        f"{_TRAINER}:PPOTrainer.on_validate_begin": "",
        f"{_TRAINER}:PPOTrainer.fit": "agent_loop_manager",
        f"{_TRAINER}:PPOTrainer.get_llm_client": "",
        # Called by sdar_verl.step.
        f"{_TRAINER}:PPOTrainer.on_sample_begin": "",
        f"{_TRAINER}:PPOTrainer.on_sample_end": "",
        f"{_TRAINER}:PPOTrainer._compute_reward_colocate": "batch metrics",
        f"{_TRAINER}:PPOTrainer._balance_batch": "batch metrics",
        f"{_TRAINER}:PPOTrainer._compute_old_log_prob": "batch metrics",
        f"{_TRAINER}:PPOTrainer._compute_ref_log_prob": "batch metrics",
        f"{_TRAINER}:PPOTrainer._compute_values": "batch metrics",
        f"{_TRAINER}:PPOTrainer._compute_advantage": "batch metrics",
        f"{_TRAINER}:PPOTrainer._update_critic": "batch metrics",
        f"{_TRAINER}:PPOTrainer._update_actor": "batch metrics",
        "verl.trainer.ppo.utils:create_rl_dataset": "data_paths data_config tokenizer processor is_train",
        "verl.trainer.ppo.v1.replay_buffer:ReplayBuffer.sample": "global_steps partition_id batch_size",
        "verl.trainer.ppo.v1.replay_buffer:ReplayBuffer._sync_metadata_from_transfer_queue": "",
        "verl.utils.seqlen_balancing:get_seqlen_balanced_partitions": "seqlen_list k_partitions equal_size",
        "verl.utils.seqlen_balancing:calculate_workload": "seqlen_list",
        "verl.single_controller.base.worker_group:WorkerGroup.__init__": "",
        "verl.single_controller.base.worker:Worker._query_dispatch_info": "mesh_name",
        "transfer_queue:kv_batch_get": "keys partition_id select_fields",
        "transfer_queue:kv_batch_put": "keys partition_id fields tags",
        "transfer_queue:kv_clear": "keys partition_id",
        "transfer_queue:KVBatchMeta": "keys tags partition_id fields extra_info",
    },
    "workers": {
        f"{_WORKERS}:ActorRolloutRefWorker.actor_worker_cls": "",
        f"{_WORKERS}:ActorRolloutRefWorker.ref_worker_cls": "",
        f"{_WORKERS}:ActorRolloutRefWorker.init_model": "",
        f"{_WORKERS}:ActorRolloutRefWorker.set_loss_fn": "loss_fn",
        f"{_WORKERS}:ActorRolloutRefWorker.update_actor": "data",
        f"{_WORKERS}:ActorRolloutRefWorker.save_checkpoint": "local_path hdfs_path global_step max_ckpt_to_keep",
        f"{_WORKERS}:ActorRolloutRefWorker.load_checkpoint": "local_path hdfs_path del_local_after_load",
        f"{_WORKERS}:TrainingWorker.train_batch": "data",
        "verl.single_controller.base.worker:Worker.set_dispatch_collect": "mesh_name",
        "verl.single_controller.base.worker:Worker.get_dispatch_collect": "",
        f"{_WORKERS}:TrainingWorkerConfig": "model_type",
        f"{_SEPARATION}:DetachActorWorker.copy_handler": "",
        f"{_SEPARATION}:DetachActorWorker.restore_handler": "",
        f"{_SEPARATION}:DetachActorWorker.save_model_to_cpu": "n",
        f"{_SEPARATION}:DetachActorWorker.restore_model_from_cpu": "n",
        f"{_SEPARATION}:DetachActorWorker.clear_cpu_model": "n",
    },
    "engines": {
        "verl.workers.engine.base:EngineRegistry.register": "model_type backend device",
        f"{_FSDP}:FSDPEngineWithLMHead.forward_step": "micro_batch loss_function forward_only",
        f"{_FSDP}:FSDPEngineWithLMHead.prepare_model_outputs": "output output_args micro_batch logits_processor_func",
        f"{_FSDP}:FSDPEngineWithLMHead.train_batch": "data loss_function",
        f"{_FSDP}:FSDPEngineWithLMHead.infer_batch": "data loss_function",
        f"{_FSDP}:FSDPEngineWithLMHead.forward_backward_batch": "data loss_function forward_only",
        f"{_FSDP}:FSDPEngineWithLMHead.eval_mode": "",
        f"{_FSDP}:FSDPEngineWithLMHead.disable_adapter": "",
        f"{_FSDP}:FSDPEngineWithLMHead.get_data_parallel_group": "",
    },
    "rows": {f"{_LOOPS}:AgentLoopOutput.as_dict": ""},
    "loops": {
        f"{_LOOPS}:_agent_loop_registry": "",
        # The latter is verl 0.9.0's name of it.
        f"{_LOOPS}:AgentLoopBase.ct_build_initial_tokens|AgentLoopBase.apply_chat_template": "messages tools",
    },
    "loss": {
        "verl.workers.config:ActorConfig": "global_batch_info",
        "verl.workers.utils.losses:ppo_loss": "config model_output data",
        "verl.workers.utils.padding:no_padding_2_padding": "tensor data",
        "verl.trainer.ppo.core_algos:agg_loss": "loss_mat loss_mask loss_agg_mode",
    },
}
"""Group -> ``module:name``, or ``module:name|name`` where one is enough -> the parameters that we give it."""


def check(group: str) -> None:
    """Raise :class:`ConfigError` that names every symbol of a group that this verl does not have as we need it."""
    faults = list(missing(NEEDED[group]))
    if group == "trainer" and not faults:
        faults = [f"its _step_once has a phase {name}, which would be left out" for name in unknown_phases()]
    if faults:
        raise ConfigError(
            f"verl {metadata.version('verl')} is not as sdar_verl {metadata.version('sdar-verl')} needs it: "
            + "; ".join(faults)
            + '. Install a version that it was tested with (pip install "verl==0.9.1"), or a newer sdar_verl'
        )


def unknown_phases() -> list[str]:
    """Methods of a trainer's own that verl's ``_step_once`` calls and :mod:`sdar_verl.step` does not."""
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY, PPOTrainer

    import sdar_verl.step

    known = _own_calls(inspect.getsource(sdar_verl.step))
    trainers: tuple[Any, ...] = (PPOTrainer, *TRAINER_REGISTRY.values())
    steps = {one._step_once for one in trainers if one.__module__.startswith("verl.")}
    try:
        found = set().union(*(_own_calls(inspect.getsource(step)) for step in steps))
    except OSError:  # verl without its source
        return []
    return sorted(found - known)


def _own_calls(source: str) -> set[str]:
    calls = [node.func for node in ast.walk(ast.parse(textwrap.dedent(source))) if isinstance(node, ast.Call)]
    return {one.attr for one in calls if isinstance(one, ast.Attribute) and ast.unparse(one.value) == "self"}


def missing(needed: Mapping[str, str]) -> Iterator[str]:
    """What is not there, or takes other parameters, one sentence each."""
    for symbol, parameters in needed.items():
        module, _, paths = symbol.partition(":")
        path, found = next(_found(module, paths.split("|")), (paths, None))
        if found is None:
            yield f"{module} has no {path.replace('|', ' or ')}"
            continue
        wanted = parameters.split()
        if wanted:
            known = inspect.signature(found).parameters
            open_ended = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in known.values())
            gone = [name for name in wanted if name not in known]
            if gone and not open_ended:
                yield f"{module}.{path} takes no {', '.join(gone)}"


def _found(module: str, paths: list[str]) -> Iterator[tuple[str, Any]]:
    for path in paths:
        try:
            found: Any = importlib.import_module(module)
            for name in path.split("."):
                found = getattr(found, name)
        except (ImportError, AttributeError):
            continue
        yield path, found
