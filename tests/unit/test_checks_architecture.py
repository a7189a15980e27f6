"""Architectures that cannot work are refused before Ray starts, with the option that helps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdar_verl.checks.architecture import architecture_faults
from sdar_verl.compose import compose_config
from sdar_verl.config import load_config
from tests.support.architectures import ARCHITECTURES

PACKED = "actor_rollout_ref.model.use_remove_padding=True"
DIVERGENCE = "sdar.loss.objective=reverse_kl"
EAGER = "actor_rollout_ref.model.override_config.attn_implementation=eager"


def faults(folder: Path, described: dict, *overrides: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(described))
    model = f"actor_rollout_ref.model.path={folder}"
    config = compose_config("sdar_ppo", ["+hardware=cpu", "sdar.context.sources=[answer]", model, *overrides])
    return "\n".join(architecture_faults(config, load_config(config.sdar)))


LINEAR = {"layer_types": ["linear_attention", "full_attention"]}


@pytest.mark.parametrize(
    ("described", "overrides", "told"),
    [
        (
            {"model_type": "qwen3_5_text", **LINEAR},
            [PACKED],
            "whose state would go on from row to row",
        ),
        ({"model_type": "qwen3_5", "text_config": LINEAR}, [PACKED], "use_remove_padding=False"),
        ({"model_type": "gpt_oss"}, [EAGER, PACKED], "lets them see each other with this attention"),
        ({"model_type": "gpt_oss"}, [], "attention sinks, which sdpa does not know; set it to eager"),
        (
            {"model_type": "gemma2", "final_logit_softcapping": 30.0},
            [DIVERGENCE],
            r"(final_logit_softcapping=30.0); use sdar.loss.objective=sampled",
        ),
        ({"model_type": "granite", "logits_scaling": 8.0}, [DIVERGENCE], "model_type=granite changes its logits"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, described: dict, overrides: list[str], told: str) -> None:
    assert told in faults(tmp_path / "model", described, *overrides)


@pytest.mark.parametrize(
    ("described", "overrides"),
    [
        ({"model_type": "qwen3_5_text", **LINEAR}, ["actor_rollout_ref.model.use_remove_padding=False"]),
        ({"model_type": "qwen3_5", "text_config": LINEAR}, [PACKED, "trainer.device=cuda"]),
        ({"model_type": "gpt_oss"}, [EAGER, "actor_rollout_ref.model.use_remove_padding=False"]),
        ({"model_type": "gemma2", "final_logit_softcapping": 30.0}, []),
        ({"model_type": "gemma3_text", "final_logit_softcapping": None}, [PACKED, DIVERGENCE]),
        ({"model_type": "granite", "logits_scaling": 1.0}, [DIVERGENCE]),
        *(({"model_type": kind}, [PACKED]) for kind in ARCHITECTURES if kind not in ("gpt_oss", "qwen3_5_text")),
    ],
)
def test_what_works_is_not(tmp_path: Path, described: dict, overrides: list[str]) -> None:
    assert faults(tmp_path / "model", described, *overrides) == ""


def heads_of(*overrides: str) -> list[str]:
    model = "actor_rollout_ref.model.path=Qwen/Qwen2.5-7B-Instruct"  # 28 heads, 4 of keys and values
    config = compose_config("sdar_ppo", ["+hardware=8gpu", "sdar.context.sources=[answer]", model, *overrides])
    return architecture_faults(config, load_config(config.sdar))


TP = "actor_rollout_ref.rollout.tensor_model_parallel_size"
ULYSSES = "fsdp_config.ulysses_sequence_parallel_size"


@pytest.mark.parametrize(
    ("overrides", "option"),
    [
        ([f"actor_rollout_ref.actor.{ULYSSES}=8"], f"actor_rollout_ref.actor.{ULYSSES}=8"),
        ([f"actor_rollout_ref.actor.{ULYSSES}=7"], f"actor_rollout_ref.actor.{ULYSSES}=7"),
        (
            ["actor_rollout_ref.actor.use_kl_loss=True", f"actor_rollout_ref.ref.{ULYSSES}=8"],
            f"actor_rollout_ref.ref.{ULYSSES}=8",
        ),
        ([f"{TP}=8"], f"{TP}=8"),
        ([f"{TP}=14"], f"{TP}=14"),
    ],
)
def test_heads_that_cannot_be_shared_out_are_told(overrides: list[str], option: str) -> None:
    (told,) = heads_of(*overrides)
    assert told.startswith(f"{option} cannot share out the 28 attention heads (4 of keys and values)")
    assert told.endswith("use one of 1, 2, 4, 28")


@pytest.mark.parametrize(
    "overrides",
    [
        [f"actor_rollout_ref.actor.{ULYSSES}=4", f"{TP}=4"],
        [f"{TP}=8", "actor_rollout_ref.rollout.name=sglang"],
        [f"{TP}=8", f"actor_rollout_ref.actor.{ULYSSES}=8", "actor_rollout_ref.model.path=somebody/model"],
        [f"actor_rollout_ref.ref.{ULYSSES}=8"],  # no reference is started
    ],
)
def test_heads_that_can_or_that_nobody_knows_pass(overrides: list[str]) -> None:
    assert heads_of(*overrides) == []
