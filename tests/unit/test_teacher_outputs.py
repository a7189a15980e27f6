"""What a teacher pass computes from its logits, and how it travels through verl's engine."""

from __future__ import annotations

import pytest
import torch

from sdar_verl.training.teacher_outputs import (
    TOPK_IDS,
    TOPK_LOG_PROBS,
    LogitsOutputs,
    get_teacher_output,
    topk,
)
from sdar_verl.training.teacher_rows import nested, response_part

LENGTHS = (5, 3, 7)


def engine(outputs: LogitsOutputs, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """What verl's FSDP engine does with a logits processor: one number per token, made jagged."""
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    result = {}
    for name, value in outputs(student_logits=logits.unsqueeze(0), data=None).items():
        assert value.squeeze(0).shape == (sum(LENGTHS),)
        result[name] = torch.nested.nested_tensor_from_jagged(value.squeeze(0), offsets)
    assert outputs(model_output=result, data=None, dp_group=None)[1] == {}
    return result


def test_topk_is_the_sorted_softmax():
    logits = torch.randn(6, 11)
    found = topk(logits, None, k=11)
    expected, ids = logits.log_softmax(-1).sort(-1, descending=True)
    torch.testing.assert_close(found[TOPK_LOG_PROBS], expected)
    assert torch.equal(found[TOPK_IDS], ids)


def test_columns_come_back_as_they_were():
    logits = torch.randn(sum(LENGTHS), 11)
    outputs = LogitsOutputs({"topk": {"k": 4}})
    fields = outputs.gather(engine(outputs, logits))
    expected = topk(logits, None, k=4)
    assert set(fields) == {TOPK_IDS, TOPK_LOG_PROBS}
    for name, value in fields.items():
        assert torch.equal(value.values(), expected[name])
        assert value.offsets().diff().tolist() == list(LENGTHS)
    assert fields[TOPK_IDS].dtype == torch.int64


def test_the_response_part_is_what_predicts_the_response():
    """Position i of a sequence is about token i + 1; the response is the sequence's end."""
    about = nested([torch.arange(1, length + 1) for length in LENGTHS])  # the index of the token it is about
    part = response_part(about, (2, 1, 4))
    assert [row.tolist() for row in part.unbind()] == [[3, 4], [2], [3, 4, 5, 6]]


def test_an_unknown_output_lists_the_known():
    with pytest.raises(ValueError, match="unknown teacher output 'topp'; known: topk"):
        get_teacher_output("topp")
