"""Late contexts, placebos and whole conversations through verl's own main_ppo on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sdar_verl.cli import main
from sdar_verl.fields import CONTRAST, TEACHER_LOG_PROBS, TEACHER_MASK, contrast_pass, log_probs_of, teacher_pass
from sdar_verl.local import start_policy
from sdar_verl.report.layout import RECORD, TRACES, step_file
from sdar_verl.report.trace import read_trace
from tests.support.plain import plain_log_probs
from tests.support.toy_run import train
from tests.support.verl_run import Run

pytestmark = pytest.mark.integration


def first_step(run: Run) -> tuple[dict[str, Any], list[bool]]:
    record = torch.load(run.folder / "step_1.pt", weights_only=False)
    return record, [not tag.get("is_padding", False) for tag in record["tags"]]


def rows(record: dict[str, Any], real: list[bool], name: str) -> list[torch.Tensor]:
    return [row for row, is_real in zip(record[name], real, strict=True) if is_real]


@pytest.mark.slow
def test_a_shuffled_sibling_teaches_every_group_that_has_one(tmp_path: Path) -> None:
    run = train(
        tmp_path,
        "sdar.teacher.source=actor",
        "sdar.teacher.max_prompt_length=480",
        # From another package: its context wraps ours, its gate is what the workers must apply.
        "sdar.modules=[tests.support.toy_env,tests.support.third_party]",
        "sdar.context.sources=[their_sibling]",
        "sdar.loss.gate=their_gate",
        "sdar.context.control=shuffled",
        steps=2,
        record=True,
    )
    record, real = first_step(run)
    metrics = run.metrics[1]
    assert metrics["sdar/context_share"] + metrics["sdar/context_missing_share"] == pytest.approx(1.0)
    assert metrics["sdar/empty_context_gap"] <= 1e-6
    assert metrics["sdar/gate_mean"] == pytest.approx(0.25)

    named = [(key, info) for key, info in zip(record["keys"], record["infos"], strict=True) if info is not None]
    solved: dict[str, set[str]] = {}
    for key, info in named:
        uid, session, _ = key.rsplit("_", 2)
        solved.setdefault(uid, set()).update({session} if info.success else set())
    expected = [bool(solved[key.rsplit("_", 2)[0]] - {key.rsplit("_", 2)[1]}) for key, _ in named]
    assert any(expected), "no group has a sibling to learn from, so the run shows nothing"
    assert [info.teacher_prompt_ids is not None for _, info in named] == expected

    # A row without a context is masked; on the others, the teacher's log-probs are those of its own prompt.
    masks = rows(record, real, TEACHER_MASK)
    assert [bool(mask.any()) for mask in masks] == expected
    seen = [i for i, has_context in enumerate(expected) if has_context]
    prompts = [torch.as_tensor(named[i][1].teacher_prompt_ids, dtype=torch.int64) for i in seen]
    responses = rows(record, real, "responses")
    plain = plain_log_probs(prompts, [responses[i] for i in seen], start_policy())
    recorded = rows(record, real, TEACHER_LOG_PROBS)
    assert max((recorded[i] - there).abs().max().item() for i, there in zip(seen, plain, strict=True)) < 2e-4
    assert set(run.metrics) == {1, 2}


@pytest.mark.slow
def test_a_bad_context_is_scored_by_the_same_teacher_and_its_gap_is_what_is_read(tmp_path: Path) -> None:
    """SDAR's own loss over the gap between a solved and failed siblings, with two ranks."""
    words = '{intro: "An attempt at this task:"}'
    run = train(
        tmp_path,
        "sdar.teacher.source=actor",
        "sdar.teacher.max_prompt_length=480",
        "sdar.context.sources=[sibling]",
        f"+sdar.context.options.sibling={words}",
        "sdar.context.contrast.sources=[failed_sibling]",
        f"+sdar.context.contrast.options.failed_sibling={words}",
        "sdar.context.contrast.texts=2",
        "trainer.n_gpus_per_node=2",
        steps=2,
        record=True,
    )
    record, real = first_step(run)
    infos = [info for info in record["infos"] if info is not None]
    masks, responses = rows(record, real, TEACHER_MASK), rows(record, real, "responses")
    assert [bool(mask.any()) for mask in masks] == [bool(info.contrast_prompt_ids) for info in infos]
    assert {len(info.contrast_prompt_ids) for info in infos} == {0, 1, 2}, "some rows have no pair, some two texts"
    teacher = rows(record, real, TEACHER_LOG_PROBS)
    gates = []
    for row, info in enumerate(infos):
        texts = [torch.as_tensor(ids, dtype=torch.int64) for ids in info.contrast_prompt_ids]
        if not texts:
            continue
        plain = plain_log_probs(texts, [responses[row]] * len(texts), start_policy())
        for number, there in enumerate(plain):
            assert (rows(record, real, log_probs_of(contrast_pass(number)))[row] - there).abs().max() < 2e-4
        mean = torch.stack(list(plain)).logsumexp(0) - torch.tensor(float(len(texts))).log()
        assert (rows(record, real, CONTRAST)[row] - mean).abs().max() < 4e-4
        gates.append(torch.sigmoid(5.0 * (teacher[row] - mean)))
    metrics = run.metrics[1]
    assert metrics["sdar/gate_mean"] == pytest.approx(torch.cat(gates).mean().item(), abs=1e-3)
    assert metrics["sdar/contrast_texts"] == pytest.approx(sum(len(i.contrast_prompt_ids) for i in infos) / len(gates))
    assert metrics["sdar/context_missing_share"] == pytest.approx(1 - len(gates) / len(infos))
    assert run.metrics[2]["actor/grad_norm"] > 0


@pytest.mark.slow
def test_mixed_teachers_are_a_pass_each_and_the_update_reads_their_mixture(tmp_path: Path) -> None:
    """Three parts skills, one part a solved sibling where there is one; with two ranks."""
    flags = (
        "sdar.teacher.source=actor",
        "sdar.teacher.max_prompt_length=480",
        "sdar.context.sources=[skills,sibling]",
        "sdar.context.teachers.weights=[3,1]",
        "trainer.n_gpus_per_node=2",
    )
    run = train(tmp_path, *flags, steps=2, record=True)
    record, real = first_step(run)
    infos = [info for info in record["infos"] if info is not None]
    assert {info.teachers for info in infos} == {("skills",), ("skills", "sibling")}, "some groups have no sibling"
    responses, teacher = rows(record, real, "responses"), rows(record, real, TEACHER_LOG_PROBS)
    second, student = rows(record, real, log_probs_of(teacher_pass(1))), rows(record, real, "old_log_probs")
    gates, gaps = [], []
    for row, info in enumerate(infos):
        prompts = [torch.as_tensor(ids, dtype=torch.int64) for ids in (info.teacher_prompt_ids, *info.other_prompt_ids)]
        own = list(plain_log_probs(prompts, [responses[row]] * len(prompts), start_policy()))
        gaps.append(own[0] - student[row])
        mixed = own[0]
        if len(own) == 2:
            assert (second[row] - own[1]).abs().max() < 2e-4
            mixed = (0.75 * own[0].exp() + 0.25 * own[1].exp()).log()
        assert (teacher[row] - mixed).abs().max() < 4e-4
        gates.append(torch.sigmoid(5.0 * (mixed - student[row])))
    metrics = run.metrics[1]
    assert metrics["sdar/gate_mean"] == pytest.approx(torch.cat(gates).mean().item(), abs=1e-3)
    assert metrics["sdar/teachers/skills/gap"] == pytest.approx(torch.cat(gaps).mean().item(), abs=1e-3)
    shares = [metrics[f"sdar/teachers/{name}/share"] for name in ("skills", "sibling")]
    assert sum(shares) == pytest.approx(1.0, abs=1e-5) and 0 < shares[1] < 0.5
    assert run.metrics[2]["actor/grad_norm"] > 0


@pytest.mark.slow
def test_a_conversation_is_one_row_with_its_observations_masked(tmp_path: Path) -> None:
    run = train(
        tmp_path,
        "sdar.teacher.source=actor",
        "sdar.rollout.rows=trajectory",
        "sdar.rollout.turn_length=20",
        "sdar.prompt.history_length=0",
        "data.max_response_length=170",
        "sdar.teacher.max_prompt_length=342",
        "sdar.update.mini_batch_rows=16",
        "sdar.trace.every=1",
        "sdar.trace.episodes=16",
        steps=2,
        record=True,
    )
    record, real = first_step(run)
    infos = [info for info in record["infos"] if info is not None]
    assert sum(real) == run.metrics[1]["sdar/rows"] == run.metrics[1]["sdar/episodes"] == 16
    assert run.metrics[1]["sdar/cut_episodes"] == 0
    assert run.metrics[1]["sdar/turns"] == pytest.approx(sum(len(info.turns) for info in infos) / 16)
    assert any(len(info.turns) == 3 for info in infos)

    # The very tokens that were sampled carry the loss, and log-probs are those of the whole conversation.
    masks, responses = rows(record, real, "response_mask"), rows(record, real, "responses")
    for info, mask, response in zip(infos, masks, responses, strict=True):
        sampled = torch.zeros_like(mask)
        for turn in info.turns:
            sampled[turn.start : turn.stop] = 1
        assert torch.equal(mask, sampled)
        assert info.turns[0].start == 0 and info.turns[-1].stop == len(response)
    student = plain_log_probs(rows(record, real, "prompts"), responses, start_policy())
    teacher = plain_log_probs(
        [torch.as_tensor(info.teacher_prompt_ids, dtype=torch.int64) for info in infos], responses, start_policy()
    )
    for name, plain in (("old_log_probs", student), (TEACHER_LOG_PROBS, teacher)):
        worst = max(
            ((there - here) * mask).abs().max().item()
            for here, there, mask in zip(plain, rows(record, real, name), masks, strict=True)
        )
        assert worst < 2e-4, name
    assert all(torch.equal(mask, there) for mask, there in zip(masks, rows(record, real, TEACHER_MASK), strict=True))

    # One advantage for the episode; the penalty only on the tokens of the turns that earned it.
    for info, mask, advantages in zip(infos, masks, rows(record, real, "advantages"), strict=True):
        assert (advantages * (1 - mask)).abs().max() == 0
        outcome = [advantages[turn.start : turn.stop] + 0.1 * turn.invalid for turn in info.turns]
        assert all((turn - outcome[0][0]).abs().max() < 1e-5 for turn in outcome)
    assert any(turn.invalid for info in infos for turn in info.turns)

    # The trace has a line per turn, with the turn's own tokens and numbers out of the middle of the row.
    trace = step_file(run.folder / "checkpoints" / RECORD / TRACES, 1)
    traced = {(line["episode"], line["turn"]): line for line in read_trace(trace)}
    keys = [key for key, info in zip(record["keys"], record["infos"], strict=True) if info is not None]
    columns = {
        "token_ids": responses,
        "student_log_prob": rows(record, real, "old_log_probs"),
        "teacher_log_prob": rows(record, real, TEACHER_LOG_PROBS),
        "advantage": rows(record, real, "advantages"),
    }
    assert len(traced) == sum(len(info.turns) for info in infos)
    for row, (key, info) in enumerate(zip(keys, infos, strict=True)):
        for number, turn in enumerate(info.turns):
            line = traced[key.rsplit("_", 1)[0], number]
            for name, values in columns.items():
                assert line[name] == pytest.approx(values[row][turn.start : turn.stop].tolist(), abs=1e-6), name
    assert main(["report", str(run.folder)]) == 0
    assert infos[0].task_id in (run.folder / "report.html").read_text()
