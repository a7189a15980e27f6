"""The teacher's worker on two ranks of verl's FSDP engines, without Ray: every source against plain forward passes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from sdar_verl.fields import (
    SUPPORT_IDS,
    SUPPORT_LOG_PROBS,
    TEACHER_HIDDEN,
    TEACHER_LOG_PROBS,
    TEACHER_MASK,
    TEACHER_PROMPTS,
)
from sdar_verl.requests import SCORING_PASS, HeadRequest, ScoringPass
from sdar_verl.table import nested
from tests.support.ranks import run_on_ranks
from tests.support.teacher_worker import (
    RANKS,
    ROWS,
    TEMPERATURE,
    ask,
    ask_student,
    likelihood,
    make_rows,
    make_worker,
    update,
    weights,
)
from tests.support.tiny_model import make_tiny_model

pytestmark = pytest.mark.integration

# What two runs of the same arithmetic may differ by: the order of float32 sums.
SAME = {"rtol": 1e-4, "atol": 1e-4}


def follow(model: str, folder: Path, rank: int, **teacher: Any) -> dict[str, Any]:
    """Teacher passes around two steps, a checkpoint, and a worker that goes on from it."""
    from sdar_verl.teacher.weights import trainable_shards

    worker = make_worker(model, **teacher)
    out: dict[str, Any] = {"passes": [ask(worker, rank)], "weights": [weights(worker)], "untouched": []}
    for step in (1, 2):
        update(worker, rank)
        worker.update_teacher(step)
        before = {name: shard.clone() for name, shard in trainable_shards(worker.actor.engine.module).items()}
        out["passes"].append(ask(worker, rank))
        after = trainable_shards(worker.actor.engine.module)
        out["untouched"].append(all(torch.equal(before[name], after[name]) for name in before))
        out["weights"].append(weights(worker))
    worker.save_checkpoint(str(folder), global_step=2)
    out["files"] = sorted(path.name for path in folder.iterdir() if path.name.startswith("sdar_"))
    resumed = make_worker(model, **teacher)
    resumed.load_checkpoint(str(folder))
    out["resumed"] = ask(resumed, rank)
    return out


def fresh(model: str, rank: int) -> dict[str, Any]:
    """Teacher log-probs that each of two updates of one step got, and the weights they started from."""
    from tensordict import NonTensorData

    likelihood.seen = []
    worker = make_worker(model, source="actor_fresh")
    prompts = nested([torch.cat([torch.tensor([9, 8, 7]), prompt]) for prompt, _, _ in make_rows(rank, seed=1)])
    out = {"start": weights(worker), "empty": ask(worker, rank)}
    request = NonTensorData(ScoringPass().to_json())
    update(worker, rank, **{TEACHER_PROMPTS: prompts, SCORING_PASS: request})
    out["seen"] = likelihood.seen
    return out


def adapter(model: str, rank: int) -> dict[str, Any]:
    """A trained adapter, on for the student and off for the teacher; and one that is copied for the teacher."""
    worker = make_worker(model, adapter=4, source="lora_base")
    update(worker, rank)
    out: dict[str, Any] = {"base": ask(worker, rank), "student": ask_student(worker, rank)}
    copied = make_worker(model, adapter=4, source="snapshot", update_every=1)
    out["names"] = sorted(copied.source.weights._weights)
    update(copied, rank)
    out["before the copy"] = ask(copied, rank)
    copied.update_teacher(1)
    out["after the copy"] = ask(copied, rank)
    out["copied student"] = ask_student(copied, rank)
    return out


def kept(model: str, rank: int) -> dict[str, Any]:
    """The weights of a step's start, put back for a moment after an update; and those of the update, after that."""
    from sdar_verl.verl.worker import DetachTeacherWorker

    worker = make_worker(model, base=DetachTeacherWorker, source="actor")
    out: dict[str, Any] = {"start": ask_student(worker, rank)}
    worker.save_model_to_cpu(0)
    update(worker, rank)
    out["updated"] = ask_student(worker, rank)
    worker.save_model_to_cpu(1)
    worker.restore_model_from_cpu(0)
    out["start again"], out["teacher"] = ask_student(worker, rank), ask(worker, rank)[TEACHER_LOG_PROBS]
    worker.restore_model_from_cpu(1)
    out["updated again"] = ask_student(worker, rank)
    return out


LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {},
    "packed": {"model.use_remove_padding": True},
    "padded, two rows": {
        "actor.use_dynamic_bsz": False,
        "actor.ppo_micro_batch_size_per_gpu": 2,
        "rollout.log_prob_use_dynamic_bsz": False,
        "rollout.log_prob_micro_batch_size_per_gpu": 2,
    },
}
REQUESTS = {
    "log_probs": HeadRequest(teacher=True),
    "top_k": HeadRequest("top_k", True, 4, 5),
    "on_support": HeadRequest("on_support", True, 4, 5),
    "hidden": HeadRequest("hidden", True, 4),
}
SEEN = ([1, 0, 1, 0], [0, 0, 1, 0])
"""Which rows of each rank have a context."""
BREAKS = 255
"""A token that the model makes NaN of."""


def without_contexts(rank: int, seen: list[int]) -> list[tuple[torch.Tensor, ...]]:
    return [(prompt if has else prompt[:0], *rest) for has, (prompt, *rest) in zip(seen, make_rows(rank), strict=True)]


def sparse(model: str, rank: int, overrides: dict[str, Any]) -> dict[str, Any]:
    """Passes in which some rows have a context, or one rank's do, or none; and what the head saw of them."""
    worker = make_worker(model, source="actor", overrides=overrides)
    module = worker.actor.engine.module
    ids = nested([torch.arange(5, dtype=torch.int32).repeat(len(row), 1) + rank for _, row, _ in make_rows(rank)])
    out: dict[str, Any] = {"all": {}, "some": {}, "tokens": {}}
    tokens: list[int] = []

    def passed(name: str, *args: Any, **extra: Any) -> dict[str, list[torch.Tensor]]:
        tokens.clear()
        result = ask(worker, rank, *args, **extra)
        out["tokens"][name] = sum(tokens)
        return result

    ask(worker, rank)  # the engine's own hooks come first
    module.get_output_embeddings().register_forward_hook(lambda head, args, output: tokens.append(output.shape[1]))
    for name, request in REQUESTS.items():
        extra = {SUPPORT_IDS: ids} if name == "on_support" else {}
        out["all"][name] = passed(f"all, {name}", request, **extra)
        out["some"][name] = passed(name, request, without_contexts(rank, SEEN[rank]), **extra)
    out["one rank"] = passed("one rank", None, without_contexts(rank, [1 - rank] * ROWS))
    out["none"] = passed("none", None, without_contexts(rank, [0] * ROWS))
    masked = [(prompt, row, mask * (i > 0)) for i, (prompt, row, mask) in enumerate(make_rows(rank))]
    out["masked"] = passed("masked", None, masked)

    module.get_input_embeddings().register_forward_hook(
        lambda embedding, args, output: output.masked_fill((args[0] == BREAKS).unsqueeze(-1), float("nan"))
    )
    rows = make_rows(rank)
    if rank == 0:
        rows[1][1][1] = BREAKS  # in the middle of an answer: what stands before it is fine
        rows[3][0][0] = BREAKS
    shown = [(prompt if i != 3 else prompt[:0], *rest) for i, (prompt, *rest) in enumerate(rows)]
    out["broken"] = passed("broken", None, shown)
    return out


def run(rank: int, folder: Path, strategy: str) -> None:
    os.environ["SDAR_TEST_STRATEGY"] = strategy
    model, other = str(folder / "model"), str(folder / "other")
    likelihood.seen = []
    results = {
        "ema": follow(model, folder / "ema", rank, source="ema", ema_decay=0.5),
        "snapshot": follow(model, folder / "snapshot", rank, source="snapshot", update_every=2, offload=False),
        "fresh": fresh(model, rank),
        "adapter": adapter(model, rank),
        "kept": kept(model, rank),
        "own": follow(model, folder / "own", rank, source="toy_every_odd_step"),
        "path": ask(make_worker(model, source="reference", path=other), rank),
        "topk": ask(make_worker(model, source="actor"), rank, HeadRequest("top_k", True, 4, 7)),
        "sparse": {name: sparse(model, rank, overrides) for name, overrides in LAYOUTS.items()},
    }
    torch.save(results, folder / f"rank_{rank}.pt")


# ---------------------------------------------------------------- in the test process


@pytest.fixture(scope="module", params=["fsdp2", pytest.param("fsdp", marks=pytest.mark.slow)])
def folder(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("workers")
    make_tiny_model(folder / "model", scale=4.0, tie_word_embeddings=False)
    make_tiny_model(folder / "other", scale=4.0, seed=3, hidden=48, layers=1)
    run_on_ranks(run, folder, request.param, ranks=RANKS)
    return folder


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in range(RANKS)]


def plain(folder: Path, rows: list[tuple[torch.Tensor, ...]], state: dict[str, torch.Tensor] | None = None) -> Any:
    """Log-softmax of the logits that predict each row's response, by one forward pass per row."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if state is not None:
        model.load_state_dict(state)
    out = []
    with torch.no_grad():
        for prompt, response, _ in rows:
            logits = model(torch.cat([prompt, response])[None]).logits[0] / TEMPERATURE
            out.append(logits.log_softmax(-1)[len(prompt) - 1 : -1])
    return out


def assert_scores(fields: dict[str, list[torch.Tensor]], rows: list[tuple[torch.Tensor, ...]], expected: Any) -> None:
    for i, ((_, response, _), log_probs) in enumerate(zip(rows, expected, strict=True)):
        torch.testing.assert_close(fields[TEACHER_LOG_PROBS][i], log_probs.gather(1, response[:, None])[:, 0], **SAME)
        assert fields[TEACHER_MASK][i].tolist() == [1] * len(response)


def mixture(states: list[dict[str, torch.Tensor]], shares: list[float]) -> dict[str, torch.Tensor]:
    return {name: sum(share * state[name] for share, state in zip(shares, states, strict=True)) for name in states[0]}


@pytest.mark.parametrize(
    ("source", "shares"),
    [
        # Decay .5 after every step; a copy after every second step.
        ("ema", [[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.25, 0.25, 0.5]]),
        ("snapshot", [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]),
        # tests/support/toy_source.py: a third party's.
        ("own", [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]),
    ],
)
def test_a_teacher_with_weights_of_its_own_scores_with_them(folder, ranks, source, shares):
    for rank, results in enumerate(ranks):
        states = results[source]["weights"]
        assert not torch.equal(states[0]["lm_head.weight"], states[1]["lm_head.weight"]), "the update did nothing"
        for fields, share in zip(results[source]["passes"], shares, strict=True):
            rows = make_rows(rank)
            assert_scores(fields, rows, plain(folder / "model", rows, mixture(states, share)))


@pytest.mark.parametrize("source", ["ema", "snapshot"])
def test_the_actors_weights_are_untouched_by_the_pass(ranks, source):
    assert all(all(results[source]["untouched"]) for results in ranks)


@pytest.mark.parametrize("source", ["ema", "snapshot"])
def test_the_teacher_comes_back_from_the_checkpoint_bit_for_bit(ranks, source):
    for results in ranks:
        assert results[source]["files"] == [f"sdar_teacher_world_size_2_rank_{rank}.pt" for rank in range(RANKS)]
        for name, rows in results[source]["passes"][-1].items():
            for row, again in zip(rows, results[source]["resumed"][name], strict=True):
                assert torch.equal(row, again)


def test_a_fresh_teacher_has_the_weights_of_each_update(folder, ranks):
    """The first update sees the start weights; the second, weights that have moved."""
    for rank, results in enumerate(ranks):
        rows = [(torch.cat([torch.tensor([9, 8, 7]), row[0]]), *row[1:]) for row in make_rows(rank, seed=1)]
        first, second = results["fresh"]["seen"]
        expected = plain(folder / "model", rows, results["fresh"]["start"])
        sampled = [log_probs.gather(1, row[1][:, None])[:, 0] for row, log_probs in zip(rows, expected, strict=True)]
        for found, wanted in zip(first, sampled[:2], strict=True):
            torch.testing.assert_close(found, wanted, **SAME)
        assert len(second) == 2
        assert not any(torch.allclose(found, old, atol=1e-3) for found, old in zip(second, sampled[2:], strict=True))
        rows = make_rows(rank)
        assert_scores(results["fresh"]["empty"], rows, plain(folder / "model", rows, results["fresh"]["start"]))


def test_the_lora_base_is_the_start_policy_while_the_student_moves(folder, ranks):
    for rank, results in enumerate(ranks):
        rows = make_rows(rank)
        assert_scores(results["adapter"]["base"], rows, plain(folder / "model", rows))
        base, student = results["adapter"]["base"][TEACHER_LOG_PROBS], results["adapter"]["student"]
        assert not any(torch.allclose(a, b, atol=1e-3) for a, b in zip(student, base, strict=True))


def test_a_copied_adapter_leaves_the_base_alone(folder, ranks):
    """The copy is of the adapter only; it starts as none and becomes the student's."""
    for rank, results in enumerate(ranks):
        names = results["adapter"]["names"]
        assert names
        assert all("lora_" in name for name in names)
        rows = make_rows(rank)
        assert_scores(results["adapter"]["before the copy"], rows, plain(folder / "model", rows))
        after = results["adapter"]["after the copy"][TEACHER_LOG_PROBS]
        for found, wanted in zip(after, results["adapter"]["copied student"], strict=True):
            torch.testing.assert_close(found, wanted, **SAME)


def test_the_weights_of_a_steps_start_come_back_and_go(ranks):
    """On a CPU verl's own way of saving shares memory with the parameters: then all five would be the same."""
    for results in ranks:
        seen = results["kept"]
        assert not any(torch.allclose(a, b, atol=1e-3) for a, b in zip(seen["start"], seen["updated"], strict=True))
        for name, again in (("start", "start again"), ("start", "teacher"), ("updated", "updated again")):
            for wanted, found in zip(seen[name], seen[again], strict=True):
                torch.testing.assert_close(found, wanted, **SAME)


def test_other_weights_score_with_their_own_model(folder, ranks):
    for rank, results in enumerate(ranks):
        rows = make_rows(rank)
        assert_scores(results["path"], rows, plain(folder / "other", rows))


def test_the_top_k_of_the_teacher_are_those_of_its_softmax(folder, ranks):
    for rank, results in enumerate(ranks):
        rows = make_rows(rank)
        expected = plain(folder / "model", rows)
        assert_scores(results["topk"], rows, expected)
        for i, log_probs in enumerate(expected):
            largest = log_probs.topk(7)
            ids, found = results["topk"][SUPPORT_IDS][i], results["topk"][SUPPORT_LOG_PROBS][i]
            torch.testing.assert_close(found[:, :7], largest.values, **SAME)
            torch.testing.assert_close(found[:, 7].exp(), 1 - largest.values.exp().sum(-1), **SAME)
            torch.testing.assert_close(log_probs.gather(1, ids.long()), largest.values, **SAME)


@pytest.fixture(params=LAYOUTS)
def sparsely(request, ranks) -> list[dict[str, Any]]:
    return [results["sparse"][request.param] for results in ranks]


@pytest.mark.parametrize("what", REQUESTS)
def test_rows_with_a_context_are_scored_as_if_all_were_and_the_others_are_zeros(sparsely, what):
    for rank, results in enumerate(sparsely):
        everything, some = results["all"][what], results["some"][what]
        assert everything.keys() == some.keys() >= {TEACHER_LOG_PROBS, TEACHER_MASK}
        for name, rows in some.items():
            for row, wanted, has in zip(rows, everything[name], SEEN[rank], strict=True):
                assert row.shape == wanted.shape and row.dtype == wanted.dtype, name
                assert wanted.any(), name
                torch.testing.assert_close(row, wanted if has else torch.zeros_like(wanted), **SAME)
    assert TEACHER_HIDDEN in sparsely[0]["some"]["hidden"]
    assert {SUPPORT_IDS, SUPPORT_LOG_PROBS} <= sparsely[0]["some"]["top_k"].keys()


def test_no_logits_are_made_of_prompts_nor_of_rows_without_a_context(ranks):
    """Ranks score as many rows as the one that has most: they gather weights together."""
    for rank, results in enumerate(ranks):
        lengths = [len(row) for _, row, _ in make_rows(rank)]
        for layout in LAYOUTS:
            tokens = results["sparse"][layout]["tokens"]
            seen = [length for length, has in zip(lengths, SEEN[rank], strict=True) if has]
            fill = [length for length, has in zip(lengths, SEEN[rank], strict=True) if not has]
            wanted = sum(seen) + sum(fill[: sum(SEEN[0]) - len(seen)])
            for what in REQUESTS:
                assert tokens[what] == wanted, what
                assert tokens[f"all, {what}"] == sum(lengths)
            assert tokens["one rank"] == sum(lengths)
            assert tokens["none"] == 0
            # Micro-batches of two rows must be full.
            assert tokens["masked"] == sum(lengths if layout == "padded, two rows" else lengths[1:])


def test_a_rank_whose_rows_have_no_context_keeps_step(ranks, sparsely):
    for rank, results in enumerate(sparsely):
        for row, wanted in zip(
            results["one rank"][TEACHER_LOG_PROBS], results["all"]["log_probs"][TEACHER_LOG_PROBS], strict=True
        ):
            torch.testing.assert_close(row, wanted if rank == 0 else torch.zeros_like(wanted), **SAME)
        assert results["none"].keys() == {TEACHER_LOG_PROBS, TEACHER_MASK}
        assert not any(row.any() for rows in results["none"].values() for row in rows)


def test_a_row_without_a_sampled_token_is_not_scored(sparsely):
    for results in sparsely:
        found, wanted = results["masked"], results["all"]["log_probs"]
        assert not found[TEACHER_MASK][0].any() and not found[TEACHER_LOG_PROBS][0].any()
        for row, expected in zip(found[TEACHER_LOG_PROBS][1:], wanted[TEACHER_LOG_PROBS][1:], strict=True):
            torch.testing.assert_close(row, expected, **SAME)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "packed"])
def test_a_row_that_broke_is_marked_whole_and_no_other(ranks, layout):
    """The trainer looks at log-probs alone; a row whose answer broke in its middle must show it wherever it looks.

    Packed rows go through one attention, whose mask does not stop a NaN on a CPU.
    """
    for rank, results in enumerate(seen["sparse"][layout] for seen in ranks):
        for i, (found, wanted) in enumerate(
            zip(results["broken"][TEACHER_LOG_PROBS], results["all"]["log_probs"][TEACHER_LOG_PROBS], strict=True)
        ):
            if i == 3:
                assert not found.any(), "it has no context, whatever filled its place"
            elif rank == 0 and i == 1:
                assert found.isnan().all()
            else:
                torch.testing.assert_close(found, wanted, **SAME)
