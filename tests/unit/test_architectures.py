"""Teacher pass and divergences at the head, on small models of today's architectures: the numbers of plain passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sdar_verl.fields import SUPPORT_IDS, SUPPORT_LOG_PROBS, TEACHER_HIDDEN
from sdar_verl.requests import HeadRequest
from tests.support.architectures import ARCHITECTURES, random_model
from tests.support.small_engine import (
    PROMPTS,
    TEACHER_PROMPTS,
    by_hand,
    forward,
    hand_head,
    loss,
    make_batch,
    make_engine,
    make_rows,
    plain_logits,
    process_group,
    shard,
)

__all__ = ["process_group"]  # a fixture

SAME = {"rtol": 2e-4, "atol": 2e-4}
LEAKS = ("qwen3_5_text", "gpt_oss")  # packed; sdar_verl/checks/architecture.py refuses it
CAPPED = "gemma2"


def model_of(kind: str, seed: int, tied: bool = False) -> torch.nn.Module:
    return random_model(kind, vocab=31, scale=4.0, seed=seed, tie_word_embeddings=tied)


def teacher_log_probs(kind: str, packed: bool, model: Any = None) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Of our pass, and of plain ones."""
    model = model or model_of(kind, 7)
    with torch.no_grad():
        logits = plain_logits(model, TEACHER_PROMPTS, 2)
    responses = torch.cat(make_rows(TEACHER_PROMPTS, 2)[1])
    expected = logits.log_softmax(-1).gather(1, responses[:, None])[:, 0]
    outputs = forward(make_engine(model), make_batch(TEACHER_PROMPTS, 2, packed, HeadRequest("log_probs", True)))
    return list(outputs["log_probs"].unbind()), expected


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_teacher_pass_gives_the_log_probs_of_plain_passes(kind: str, packed: bool) -> None:
    rows, expected = teacher_log_probs(kind, packed)
    if kind in LEAKS and packed:
        assert not torch.allclose(torch.cat(rows), expected, **SAME), "now it packs: let the checks allow it"
        return
    torch.testing.assert_close(torch.cat(rows), expected, **SAME)


@pytest.mark.parametrize(("divergence", "k"), [("reverse_kl", 0), ("forward_kl", 5)])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
@pytest.mark.parametrize("kind", [kind for kind in ARCHITECTURES if kind != CAPPED])
def test_divergences_and_their_gradients_are_those_of_plain_passes(
    kind: str, tied: bool, packed: bool, divergence: str, k: int
) -> None:
    if kind in LEAKS and packed:
        pytest.skip("refused by the checks")
    teacher_model, plain, model = (model_of(kind, seed, tied) for seed in (7, 0, 0))
    with torch.no_grad():
        teacher = plain_logits(teacher_model, TEACHER_PROMPTS, 2)
    _, expected = by_hand(plain, divergence, k, teacher)
    expected.backward()
    engine, teacher_engine = make_engine(shard(model)), make_engine(shard(teacher_model))
    request = HeadRequest("top_k" if k else "hidden", True, 4, k)
    outputs = forward(teacher_engine, make_batch(TEACHER_PROMPTS, 2, packed, request))
    fields = {name: outputs[name] for name in (SUPPORT_IDS, SUPPORT_LOG_PROBS, TEACHER_HIDDEN) if name in outputs}
    hand_head(teacher_engine, engine)
    batch = make_batch(PROMPTS, 1, packed, HeadRequest("divergence", False, 4, k, divergence), **fields)
    value, _ = engine.forward_step(batch, loss_function=loss, forward_only=False)
    value.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-3)
    gradients = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad.full_tensor(), gradients[name], rtol=1e-3, atol=1e-3)


def test_capped_logits_are_not_taken_for_those_of_the_head() -> None:
    model = model_of(CAPPED, 0)
    engine = make_engine(model)
    outputs = forward(engine, make_batch(TEACHER_PROMPTS, 2, False, HeadRequest("top_k", True, 4, 5)))
    fields = {name: outputs[name] for name in (SUPPORT_IDS, SUPPORT_LOG_PROBS)}
    batch = make_batch(PROMPTS, 1, False, HeadRequest("divergence", False, 4, 5, "forward_kl"), **fields)
    with pytest.raises(RuntimeError, match=r"soft-capping.*sdar.loss.objective=sampled"):
        engine.forward_step(batch, loss_function=loss, forward_only=False)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_position_ids_of_four_axes_are_read_as_one_in_a_text(packed: bool) -> None:
    """As verl gives them where the model has a processor; the engine takes both forms."""
    from sdar_verl.table import nested
    from sdar_verl.teacher.rows import ROPE_AXES, teacher_row

    rows = [
        teacher_row(prompt, response, torch.ones_like(response), axes=ROPE_AXES)
        for prompt, response in zip(*make_rows(TEACHER_PROMPTS, 2), strict=True)
    ]
    placed = nested([row["position_ids"] for row in rows])
    batch = make_batch(TEACHER_PROMPTS, 2, packed, HeadRequest("log_probs", True))
    batch["position_ids"] = placed
    inputs, _ = make_engine(model_of("qwen3", 0)).prepare_model_inputs(batch)
    expected = {True: (ROPE_AXES, 1, sum(len(row["input_ids"]) for row in rows)), False: (ROPE_AXES, 3)}[packed]
    assert inputs["position_ids"].shape[: len(expected)] == expected
    assert (inputs["position_ids"][0] == inputs["position_ids"][3]).all()
