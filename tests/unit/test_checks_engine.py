"""Engines, devices and attentions that a run may name: those that work pass, all others are told before Ray starts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import verl
from hydra import compose, initialize_config_module

from sdar_verl.checks import callback, engine
from sdar_verl.checks.callback import CheckBeforeStart
from sdar_verl.config import load_config
from sdar_verl.errors import RolloutError
from tests.support.checked_recipe import changed

ACTOR, MODEL = "actor_rollout_ref.actor", "actor_rollout_ref.model"
ATTENTION = f"{MODEL}.override_config.attn_implementation"
CONTENTS = f"{ACTOR}.checkpoint.save_contents"
MERGED = {f"{MODEL}.lora_rank": 4, f"{MODEL}.lora.merge": True}
GPU = {"trainer.device": "cuda", "actor_rollout_ref.rollout.name": "sglang"}


def composed(*overrides: str, recipe: str = "sdar_quickstart") -> Any:
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose(recipe, overrides=list(overrides))


@pytest.fixture(scope="module")
def recipe():
    return composed()


def faults(recipe: Any, **options: Any) -> list[str]:
    config = changed(recipe, **options)
    return engine.engine_faults(config, load_config(config.sdar))


def refusal(config: Any, capsys: Any) -> str:
    """What the whole check tells before Ray starts."""
    with pytest.raises(SystemExit) as stopped:
        CheckBeforeStart().on_job_start(config)
    assert stopped.value.code == 2
    return str(capsys.readouterr().err)


def backends_of_verl() -> list[str]:
    """Names under which any file of verl registers an engine for language models, installed or not."""
    names: set[str] = set()
    for file in (Path(verl.__file__).parent / "workers" / "engine").rglob("*.py"):
        for call in re.findall(r"@EngineRegistry\.register\(([^)]*)\)", file.read_text()):
            if "language_model" in call:
                names.update(re.findall(r'"(\w+)"', call.split("backend=")[1].split("device=")[0]))
    return sorted(names)


BACKENDS = backends_of_verl()


def test_verls_engines_are_found():
    assert {"fsdp", "fsdp2", "megatron", "veomni", "torchtitan", "automodel"} <= set(BACKENDS)


@pytest.mark.parametrize("strategy", [*BACKENDS, "mindspeed_megatron", "their_engine"])
def test_every_strategy_works_or_is_refused(recipe, strategy):
    config = changed(recipe, **{f"{ACTOR}.strategy": strategy})
    told = engine.strategy_faults(config, load_config(config.sdar))
    if strategy in engine.SUPPORTED_STRATEGIES:
        assert told == []
    else:
        assert len(told) == 1
        for word in (f"{ACTOR}.strategy={strategy}", "fsdp2", "docs/engines.md"):
            assert word in told[0]


def test_a_reference_on_another_engine_is_refused(recipe, capsys):
    told = refusal(changed(recipe, **{"actor_rollout_ref.ref.strategy": "megatron"}), capsys)
    assert "ref.strategy=megatron" in told and "actor.strategy=fsdp2" in told


@pytest.mark.parametrize(
    ("model", "options", "refused"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", {}, f"{ACTOR}.strategy=fsdp2"),
        ("Qwen/Qwen2.5-7B-Instruct", {f"{ACTOR}.strategy": "fsdp"}, ""),
        (
            "Qwen/Qwen2.5-7B-Instruct",
            {f"{ACTOR}.strategy": "fsdp", "actor_rollout_ref.ref.strategy": "fsdp2"},
            "actor_rollout_ref.ref.strategy=fsdp2",
        ),
        ("Qwen/Qwen2.5-3B-Instruct", {}, ""),
        ("somebody/a-model-of-theirs", {}, ""),
    ],
)
def test_fused_kernels_cannot_read_a_head_that_fsdp2_keeps_in_shards(recipe, model, options, refused):
    """tests/integration/test_fused_kernels.py shows which of them work."""
    told = faults(
        recipe, **{f"{MODEL}.path": model, f"{MODEL}.use_fused_kernels": True, CONTENTS: ["model"], **options}
    )
    assert bool(told) == bool(refused), told
    if refused:
        assert refused in told[0] and "use_fused_kernels=False" in told[0]
    assert faults(recipe, **{f"{MODEL}.path": model, CONTENTS: ["model"], **options}) == []


@pytest.mark.parametrize("recipe_name", ["sdar_quickstart", "sdar_alfworld"])
@pytest.mark.parametrize("name", ["megatron", "veomni", "torchtitan"])
def test_another_model_engine_is_refused_even_where_the_recipe_names_fsdp(name, recipe_name, capsys):
    """hardware=cpu sets the strategy to fsdp2; verl's group would still build the other engine, whose options are
    others, too: nothing may calculate with FSDP's before the refusal."""
    told = refusal(composed(f"model_engine={name}", recipe=recipe_name), capsys)
    (fault,) = told.strip().splitlines()[1:]
    assert fault.startswith(f"model_engine={name} ") and "leave it at dp" in fault


def test_an_error_made_for_a_reader_comes_without_a_traceback(recipe, capsys, monkeypatch):
    def refuse(*_: Any) -> None:
        raise RolloutError("sdar.env.name=x: y; z")

    monkeypatch.setattr(callback, "check_run", refuse)
    assert refusal(recipe, capsys).strip() == "This run cannot start:\nsdar.env.name=x: y; z"


REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "pinned memory": (
        {f"{ACTOR}.fsdp_config.offload_policy": True},
        ["actor.fsdp_config.offload_policy=True", "trainer.device=cpu"],
    ),
    "pinned memory of the reference": (
        {"actor_rollout_ref.ref.fsdp_config.offload_policy": True},
        ["ref.fsdp_config.offload_policy=True", "trainer.device=cpu"],
    ),
    "activations on streams": ({f"{MODEL}.enable_activation_offload": True}, ["enable_activation_offload=True"]),
    "fp16": ({f"{ACTOR}.fsdp_config.mixed_precision.param_dtype": "fp16"}, ["actor.fsdp_config", "fp16", "bf16"]),
    "a whole model from FSDP1's shards": (
        {f"{ACTOR}.strategy": "fsdp", CONTENTS: ["model", "hf_model"]},
        ["save_contents=['model', 'hf_model']", "strategy=fsdp ", "fsdp2"],
    ),
    "an adapter beside the weights": (
        {f"{MODEL}.lora_rank": 4},
        ["lora_rank=4", "lora.merge=True", "rollout.name=transformers"],
    ),
    "a rollout of GPUs": (
        {"actor_rollout_ref.rollout.name": "vllm"},
        ["trainer.device=cpu", "vllm", "hardware=cpu"],
    ),
    "a rollout of CPUs": ({"trainer.device": "cuda", ATTENTION: "sdpa"}, ["trainer.device=cuda", "VERL_PLATFORM=cpu"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_fault_is_named(recipe, case):
    options, words = REFUSED[case]
    told = faults(recipe, **options)
    assert len(told) == 1, told
    for word in words:
        assert word in told[0]


def test_a_merged_adapter_passes(recipe):
    assert faults(recipe, **MERGED) == []


@pytest.mark.parametrize(
    ("rank", "adapter", "words"),
    [
        (4, {"r": 4}, []),
        (
            0,
            {"r": 4},
            ["is not loaded with", "lora_rank=0, and all weights are trained", "lora_rank to the adapter's: 4"],
        ),
        (8, {"r": 64}, ["lora_rank=8, but", "has r=64 in its adapter_config.json", "set lora_rank=64"]),
        (8, None, ["lora_adapter_path=", "there is no adapter here (a folder with adapter_config.json)"]),
    ],
)
def test_an_adapter_to_start_from_is_there_and_of_the_rank_that_verl_is_told(recipe, tmp_path, rank, adapter, words):
    if adapter is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    options = {f"{MODEL}.lora_adapter_path": str(tmp_path), f"{MODEL}.lora_rank": rank, f"{MODEL}.lora.merge": True}
    told = faults(recipe, **options)
    assert len(told) == bool(words), told
    for word in words:
        assert word in told[0]


def test_a_path_without_a_rank_is_refused_wherever_the_adapter_lies(recipe):
    (told,) = faults(recipe, **{f"{MODEL}.lora_adapter_path": "somebody/adapter"})
    assert (
        "lora_adapter_path=somebody/adapter is not loaded with" in told
        and "set lora_rank to the adapter's rank" in told
    )
    assert faults(recipe, **{f"{MODEL}.lora_adapter_path": "somebody/adapter", **MERGED}) == []


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
def test_packing_needs_a_transformers_that_tells_packed_rows_apart(recipe, monkeypatch, attention):
    options = {f"{MODEL}.use_remove_padding": True, ATTENTION: attention}
    assert faults(recipe, **options) == []
    from transformers import masking_utils

    monkeypatch.delattr(masking_utils, "find_packed_sequence_indices")
    (told,) = faults(recipe, **options)
    for word in ("use_remove_padding=True", f"attn_implementation={attention}", "upgrade transformers"):
        assert word in told
    assert faults(recipe, **{**options, f"{MODEL}.use_remove_padding": False}) == []


def test_flash_attention_must_be_installed_where_it_is_used(recipe, monkeypatch):
    monkeypatch.setattr(engine.util, "find_spec", lambda name: None)
    (told,) = faults(recipe, **GPU, **{ATTENTION: "flash_attention_2"})
    for word in ("flash-attn is not installed", "sdar-verl[flash-attn]", "attn_implementation=sdpa"):
        assert word in told
    assert faults(recipe, **GPU, **{ATTENTION: "sdpa"}) == []
