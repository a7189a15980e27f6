"""Sources of the teacher's weights: when they follow the actor, and what they keep."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from sdar_verl.config import TeacherConfig
from sdar_verl.teacher import sources
from sdar_verl.teacher.sources import Ema, get_source, list_sources, register_source, uses_lora


def host(**engines: nn.Module) -> Any:
    """A worker with these models and nothing else."""
    workers = {name: SimpleNamespace(engine=SimpleNamespace(module=module)) for name, module in engines.items()}
    return SimpleNamespace(**{"actor": None, "ref": None, "other": None, **workers})


def weight(value: float) -> nn.Linear:
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, value)
    return module


def teachers_weight(source: Any) -> float:
    with source.scoring():
        return source.worker.engine.module.weight.item()


def run(settings: TeacherConfig, steps: int) -> list[float]:
    """The teacher's weight at each step's pass, when step s moves the actor's from s - 1 to s."""
    actor = weight(0.0)
    source = get_source(settings.source)(settings, host(actor=actor))
    seen = []
    for step in range(1, steps + 1):
        seen.append(teachers_weight(source))
        nn.init.constant_(actor.weight, float(step))
        source.updated(step)
    return seen


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (TeacherConfig(source="actor"), [0, 1, 2, 3, 4, 5, 6]),
        (TeacherConfig(source="snapshot", update_every=1), [0, 1, 2, 3, 4, 5, 6]),
        (TeacherConfig(source="snapshot", update_every=3), [0, 0, 0, 3, 3, 3, 6]),
        (TeacherConfig(source="snapshot"), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 10]),
        (TeacherConfig(source="ema", ema_decay=0.0), [0, 1, 2, 3, 4, 5, 6]),
        (TeacherConfig(source="ema", ema_decay=0.5), [0, 0.5, 1.25, 2.125]),
        (TeacherConfig(source="ema", ema_decay=0.5, update_every=2), [0, 0, 1, 1, 2.5]),
        (TeacherConfig(source="ema"), [0, 0.01, 0.0299]),
    ],
)
def test_the_teacher_follows_the_actor_on_schedule(settings, expected):
    assert run(settings, len(expected)) == pytest.approx(expected)


@pytest.mark.parametrize("settings", [TeacherConfig(source="snapshot", update_every=3), TeacherConfig(source="actor")])
def test_staleness_counts_the_steps_since_the_copy(settings):
    """The actor's weight is the number of steps done, so what the teacher lacks is its staleness."""
    for done, seen in enumerate(run(settings, 8)):
        assert get_source(settings.source).staleness(settings, done) == done - seen


@pytest.mark.parametrize("name", ["ema", "snapshot"])
def test_a_resumed_source_goes_on_as_if_never_stopped(name, tmp_path):
    settings = TeacherConfig(source=name, update_every=2)
    whole = run(settings, 6)

    actor = weight(0.0)
    first = get_source(name)(settings, host(actor=actor))
    for step in (1, 2, 3):
        nn.init.constant_(actor.weight, float(step))
        first.updated(step)
    first.save(tmp_path / "teacher.pt", 3)

    actor = weight(3.0)
    second = get_source(name)(settings, host(actor=actor))
    second.load(tmp_path / "teacher.pt")
    seen = []
    for step in (4, 5, 6):
        seen.append(teachers_weight(second))
        nn.init.constant_(actor.weight, float(step))
        second.updated(step)
    assert seen == whole[3:]
    assert second.updates == 3


def test_the_average_is_float32_and_the_snapshot_has_the_models_type():
    actor = weight(1.0).to(torch.bfloat16)
    kept = {
        name: get_source(name)(TeacherConfig(source=name), host(actor=actor)).weights._weights["weight"].dtype
        for name in ("ema", "snapshot")
    }
    assert kept == {"ema": torch.float32, "snapshot": torch.bfloat16}


def test_the_reference_is_the_other_weights_then_verls_reference_then_the_base_under_the_adapter():
    settings = TeacherConfig(source="reference")
    actor, ref, other = weight(1.0), weight(2.0), weight(3.0)
    source = get_source("reference")
    assert teachers_weight(source(settings, host(actor=actor, ref=ref, other=other))) == 3.0
    assert teachers_weight(source(settings, host(actor=actor, ref=ref))) == 2.0
    for extra, engines in (({}, {"actor": actor, "ref": ref}), ({"no_lora_adapter": True}, {"actor": actor})):
        with source(settings, host(**engines)).scoring() as told:
            assert told == extra


@pytest.mark.parametrize(("path", "shape"), [("their/model", None), ("our/model", "our/config")])
def test_another_model_is_built_by_its_own_config(path, shape):
    from sdar_verl.verl.worker import other_weights

    model = {"path": "our/model", "hf_config_path": "our/config", "tokenizer_path": None, "lora_rank": 8}
    config = OmegaConf.create({"model": {**model, "lora_adapter_path": None, "lora": {"rank": 0}}})
    made = other_weights(config, path).model
    assert (made.path, made.hf_config_path, made.lora_rank) == (path, shape, 0)
    assert config.model == {**model, "lora_adapter_path": None, "lora": {"rank": 0}}


def test_the_lora_base_has_the_adapter_off():
    with get_source("lora_base")(TeacherConfig(source="lora_base"), host(actor=weight(1.0))).scoring() as told:
        assert told == {"no_lora_adapter": True}


def test_sources_without_weights_of_their_own_leave_no_file(tmp_path):
    for name in ("actor", "actor_fresh", "reference", "lora_base"):
        source = get_source(name)(TeacherConfig(source=name), host(actor=weight(1.0)))
        source.save(tmp_path / "teacher.pt", 1)
        source.load(tmp_path / "teacher.pt")
    assert not list(tmp_path.iterdir())


def test_an_unknown_source_lists_the_known():
    with pytest.raises(ValueError, match="unknown teacher source 'emma'; known: actor, actor_fresh, ema"):
        get_source("emma")


def test_a_source_of_ones_own():
    try:

        @register_source("halfway")
        class Halfway(Ema):
            """The mean of the start weights and the current ones."""

            def updated(self, step: int) -> None:
                self.weights.blend(0.5)

        assert "halfway" in list_sources()
        assert run(TeacherConfig(source="halfway"), 3) == [0, 0.5, 1.25]
    finally:
        sources._SOURCES._entries.pop("halfway", None)


@pytest.mark.parametrize(
    ("model", "trained"),
    [
        ({"lora_rank": 8}, True),
        ({"lora_rank": 0, "lora_adapter_path": "/adapter"}, False),
        ({"lora": {"rank": 8}}, False),
    ],
)
def test_lora_is_what_verls_engine_makes_of_the_options(model, trained):
    assert uses_lora(OmegaConf.create({"actor_rollout_ref": {"model": model}})) is trained
