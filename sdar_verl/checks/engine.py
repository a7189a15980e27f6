"""Checks of the training engine, its device and its attention before Ray starts."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import util
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from sdar_verl.config import SdarConfig
from sdar_verl.errors import ConfigError
from sdar_verl.planner.families import find_architecture
from sdar_verl.teacher.sources import has_reference, uses_lora
from sdar_verl.untrusted import parse_json

SUPPORTED_STRATEGIES = ("fsdp", "fsdp2")
SUPPORTED_MODEL_ENGINES = ("dp",)
# Those whose mask transformers makes itself; since its pull request 39194 it finds packed rows by their position ids.
MASKED_ATTENTION = ("sdpa", "eager", "flex_attention")

_ULYSSES = "ulysses_sequence_parallel_size"


def sequence_parallel(node: DictConfig) -> tuple[str, int]:
    """Ulysses' sequence-parallel size of a role, and the option under its node that sets it.

    Args:
        node: ``actor_rollout_ref.actor`` or ``actor_rollout_ref.ref``. verl lets its older option win, when it is above
            1, over the engine's own.
    """
    size, inner = node.get(_ULYSSES, 1), (node.get("fsdp_config", None) or {}).get(_ULYSSES, 1)
    return (_ULYSSES, size) if size > 1 else (f"fsdp_config.{_ULYSSES}", inner)


def trained_devices(config: DictConfig) -> tuple[int, str]:
    """How many devices train, and the options that say so."""
    return config.trainer.n_gpus_per_node * config.trainer.nnodes, "trainer.n_gpus_per_node * trainer.nnodes"


def frozen_models(config: DictConfig, sdar: SdarConfig) -> Iterator[tuple[str, int, str]]:
    """Models that run with the settings of ``actor_rollout_ref.ref``: path, devices, and the options that say those."""
    own, teacher = str(config.actor_rollout_ref.model.path), sdar.teacher
    if has_reference(config) and not uses_lora(config):
        yield (own, *trained_devices(config))
    if teacher.placement == "pool" and teacher.pool_gpus_per_node is not None:
        nodes = teacher.pool_nodes or 1
        where = f"sdar.teacher.placement=pool: pool_gpus_per_node={teacher.pool_gpus_per_node} on pool_nodes={nodes}"
        yield teacher.path or own, teacher.pool_gpus_per_node * nodes, where
    elif teacher.path is not None:
        yield (teacher.path, *trained_devices(config))


def engine_faults(config: DictConfig, sdar: SdarConfig) -> list[str]:
    """Every fault of model, device and attention under one of the supported engines, one message each."""
    return [
        *_model(config),
        *_adapter(config),
        *_fused_kernels(config),
        *_device(config),
        *_attention(config),
    ]


def strategy_faults(config: DictConfig, sdar: SdarConfig) -> list[str]:
    """Engines of verl's other than FSDP, for which the gated loss, the teacher's weights and the distributions at the
    head are written. Their options have other names: nothing that calculates with FSDP's can be checked under them."""
    return list(_strategy(config))


def _model(config: DictConfig) -> Iterator[str]:
    node, option = config.actor_rollout_ref.model, "actor_rollout_ref.model"
    yield from missing_model(f"{option}.path", str(node.path))
    for name, file in (("tokenizer_path", "tokenizer_config.json"), ("hf_config_path", "config.json")):
        if node.get(name, None) not in (None, node.path):
            yield from missing_model(f"{option}.{name}", str(node[name]), file)
    external = node.get("external_lib", None) or []
    for module in [external] if isinstance(external, str) else external:
        try:
            found = util.find_spec(module)
        except (ImportError, ValueError):
            found = None
        if found is None:
            yield (
                f"{option}.external_lib={external}: there is no module {module} here; it must be "
                "importable in every process of the run (install its package, or put its folder on PYTHONPATH)"
            )


def _adapter(config: DictConfig) -> Iterator[str]:
    """verl's trainer takes a path for LoRA, its FSDP engine the rank alone."""
    model, option = config.actor_rollout_ref.model, "actor_rollout_ref.model"
    path, rank = model.get("lora_adapter_path", None), model.get("lora_rank", 0)
    if path is None:
        return
    file = "adapter_config.json"
    yield from missing_model(f"{option}.lora_adapter_path", str(path), file, "adapter")
    try:
        own = parse_json((Path(path) / file).read_bytes()).get("r")
    except (OSError, ValueError, AttributeError):
        own = None  # not on this machine, or told above
    if not uses_lora(config):
        yield (
            f"{option}.lora_adapter_path={path} is not loaded with {option}.lora_rank={rank}, and all weights are "
            f"trained; set lora_rank to the adapter's{' rank' if own is None else f': {own}'}"
        )
    elif own not in (None, rank):
        yield (
            f"{option}.lora_rank={rank}, but {option}.lora_adapter_path={path} has r={own} in its {file}, which is "
            f"what is trained; set lora_rank={own}"
        )


def missing_model(option: str, path: str, file: str = "config.json", kind: str = "model") -> list[str]:
    """A fault where ``path`` can only be a folder of this machine and holds no model; names of a hub are not asked."""
    local = path.startswith(("/", ".", "~")) or path.count("/") > 1
    if not local or "://" in path or (Path(path) / file).is_file():
        return []
    return [
        f"{option}={path}: there is no {kind} here (a folder with {file}); give the folder of one, or a name of "
        f"Hugging Face's hub{' such as Qwen/Qwen2.5-3B-Instruct' if kind == 'model' else ''}"
    ]


def _strategy(config: DictConfig) -> Iterator[str]:
    engine = config.get("model_engine", "dp")
    if engine not in SUPPORTED_MODEL_ENGINES:
        yield (
            f"model_engine={engine} selects an engine on which the teacher pass and the gated loss are not supported; "
            "leave it at dp and choose actor_rollout_ref.actor.strategy=fsdp2 or fsdp (docs/engines.md)"
        )
        return  # what it sets for the strategies is its own
    actor, reference = config.actor_rollout_ref.actor.strategy, config.actor_rollout_ref.ref.strategy
    if actor not in SUPPORTED_STRATEGIES:
        yield (
            f"actor_rollout_ref.actor.strategy={actor}: the teacher pass and the gated loss are not supported on this "
            f"engine; use one of {', '.join(SUPPORTED_STRATEGIES)} (docs/engines.md)"
        )
    elif reference not in SUPPORTED_STRATEGIES:
        yield (
            f"actor_rollout_ref.ref.strategy={reference}, while the actor runs on "
            f"actor_rollout_ref.actor.strategy={actor}; leave it to follow the actor's, or use one of "
            f"{', '.join(SUPPORTED_STRATEGIES)}"
        )


def _fused_kernels(config: DictConfig) -> Iterator[str]:
    """They read the head's weights without calling it; FSDP2 gathers those that are the head's alone in its call."""
    node = config.actor_rollout_ref
    if not node.model.get("use_fused_kernels", False):
        return
    try:
        tied = find_architecture(str(node.model.path)).tied
    except ConfigError:
        return  # neither on this machine nor one of the recipes' models
    options = [f"actor_rollout_ref.{name}.strategy" for name in ("actor", "ref") if node[name].strategy == "fsdp2"]
    if options and not tied:
        yield (
            f"actor_rollout_ref.model.use_fused_kernels=True with {options[0]}=fsdp2: {node.model.path} has output "
            "embeddings of their own, verl's fused kernels read their weights without calling them, and FSDP2 leaves "
            "these in shards (verl's issue 5633); set use_fused_kernels=False, or actor_rollout_ref.actor.strategy=fsdp"
        )


def _device(config: DictConfig) -> Iterator[str]:
    device, name = config.trainer.device, config.actor_rollout_ref.rollout.name
    # vLLM's CPU build packs weights away after loading and cannot be sent new ones, unless its worker is told not to.
    worker = OmegaConf.select(config, "actor_rollout_ref.rollout.engine_kwargs.vllm.worker_extension_cls")
    vllm_on_cpu = device == "cpu" and name == "vllm" and worker is not None
    if name == "vllm" and (device != "cpu" or vllm_on_cpu) and util.find_spec("vllm") is None:
        yield (
            'actor_rollout_ref.rollout.name=vllm, but vllm is not installed: pip install "sdar-verl[vllm]" '
            "(or +hardware=cpu, without the plus in our own recipes, to try it without a GPU)"
        )
    if device == "cpu":
        if name != "transformers" and not vllm_on_cpu:
            yield (
                f"trainer.device=cpu runs with actor_rollout_ref.rollout.name=transformers, not {name}; set that, or "
                "leave rollout.name to hardware=cpu"
            )
        yield from _accelerator_only(config)
        return
    if name == "transformers":
        yield (
            f"trainer.device={device}, but actor_rollout_ref.rollout.name=transformers is the CPU's rollout. On a "
            "machine with a GPU, export VERL_PLATFORM=cpu to run on the CPU all the same, or use hardware=8gpu"
        )


def _accelerator_only(config: DictConfig) -> Iterator[str]:
    """What FSDP and a rollout have for accelerators alone."""
    actor = config.actor_rollout_ref.actor
    contents = list(OmegaConf.select(actor, "checkpoint.save_contents") or [])
    if actor.strategy == "fsdp" and "hf_model" in contents:
        yield (
            f"actor_rollout_ref.actor.checkpoint.save_contents={contents}: with actor.strategy=fsdp (FSDP1) on a CPU "
            "(trainer.device=cpu) torch cannot gather the whole model for hf_model; leave hf_model out, or set "
            "actor_rollout_ref.actor.strategy=fsdp2"
        )
    settings = {
        "actor_rollout_ref.actor.fsdp_config.offload_policy": "it keeps shards in pinned memory",
        "actor_rollout_ref.ref.fsdp_config.offload_policy": "it keeps shards in pinned memory",
        "actor_rollout_ref.model.enable_activation_offload": "it copies activations on streams of an accelerator",
    }
    for option, reason in settings.items():
        if OmegaConf.select(config, option):
            yield f"{option}=True needs an accelerator ({reason}), but trainer.device=cpu; set it to False"
    for role in ("actor", "ref"):
        option = f"actor_rollout_ref.{role}.fsdp_config.mixed_precision.param_dtype"
        if OmegaConf.select(config, option) in ("fp16", "float16"):
            yield f"{option}=fp16 needs a loss scaler of an accelerator, but trainer.device=cpu; use fp32 or bf16"
    model = config.actor_rollout_ref.model
    if uses_lora(config) and not OmegaConf.select(model, "lora.merge"):
        yield (
            f"actor_rollout_ref.model.lora_rank={model.lora_rank}: rollout.name=transformers, the CPU's rollout, takes "
            "whole weights; set actor_rollout_ref.model.lora.merge=True"
        )


def _attention(config: DictConfig) -> Iterator[str]:
    attention = OmegaConf.select(config, "actor_rollout_ref.model.override_config.attn_implementation")
    if attention in (None, "flash_attention_2"):
        if config.trainer.device != "cpu" and util.find_spec("flash_attn") is None:
            yield (
                "flash-attn is not installed, and verl uses it unless told otherwise: pip install --no-build-isolation "
                '"sdar-verl[flash-attn]", or +actor_rollout_ref.model.override_config.attn_implementation=sdpa'
            )
        return
    if config.actor_rollout_ref.model.use_remove_padding and attention in MASKED_ATTENTION and not _finds_packed_rows():
        yield (
            "actor_rollout_ref.model.use_remove_padding=True packs rows into one, and this version of transformers "
            f"lets them see each other with attn_implementation={attention}: upgrade transformers (verl 0.9 asks for "
            "5.5.3 or newer), install flash-attn, or set use_remove_padding=False"
        )


def _finds_packed_rows() -> bool:
    try:
        from transformers import masking_utils
    except ImportError:
        return False
    return hasattr(masking_utils, "find_packed_sequence_indices")
