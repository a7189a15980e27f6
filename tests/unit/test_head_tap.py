"""Requests at the head of verl's FSDP engine: numbers and gradients of plain passes, with sharded weights too."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from verl.utils import tensordict_utils as tu

from sdar_verl.algorithm.divergences import COLUMNS, full_columns, on_support, top_k_columns, top_k_ids
from sdar_verl.fields import (
    ANCHOR_HIDDEN,
    ANCHOR_LOG_PROBS,
    SUPPORT_IDS,
    SUPPORT_LOG_PROBS,
    TEACHER_HIDDEN,
    TEACHER_MASK,
)
from sdar_verl.requests import HeadRequest
from sdar_verl.verl.head import COLUMN_PREFIX
from tests.support.small_engine import (
    MASKS,
    PROMPTS,
    RESPONSES,
    TEACHER_PROMPTS,
    Bare,
    Engine,
    by_hand,
    forward,
    hand_head,
    loss,
    make_batch,
    make_engine,
    make_model,
    make_rows,
    nested,
    plain_logits,
    process_group,
    shard,
)

__all__ = ["process_group"]  # a fixture


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("kind", "k"), [("reverse_kl", 0), ("jsd", 0), ("reverse_kl", 5), ("forward_kl", 5)])
@pytest.mark.parametrize("tied", [True, False])
def test_values_and_gradients_are_those_of_plain_passes(tied: bool, kind: str, k: int, packed: bool, sharded: bool):
    teacher_model = make_model(7, tied=tied)
    with torch.no_grad():
        teacher = plain_logits(teacher_model, TEACHER_PROMPTS, 2)
    plain = make_model(0, tied=tied)
    columns, expected_loss = by_hand(plain, kind, k, teacher)
    expected_loss.backward()

    model = make_model(0, tied=tied)
    engine, teacher_engine = (make_engine(shard(m) if sharded else m) for m in (model, teacher_model))
    fields = {}
    if k and kind != "forward_kl":
        outputs = forward(engine, make_batch(PROMPTS, 1, packed, HeadRequest("top_k_ids", chunk=4, k=k)))
        fields[SUPPORT_IDS] = outputs[SUPPORT_IDS]
    what = "hidden" if not k else "top_k" if kind == "forward_kl" else "on_support"
    outputs = forward(teacher_engine, make_batch(TEACHER_PROMPTS, 2, packed, HeadRequest(what, True, 4, k), **fields))
    fields |= {name: outputs[name] for name in (SUPPORT_IDS, SUPPORT_LOG_PROBS, TEACHER_HIDDEN) if name in outputs}
    hand_head(teacher_engine, engine)

    batch = make_batch(PROMPTS, 1, packed, HeadRequest("divergence", False, 4, k, kind), **fields)
    value, output = engine.forward_step(batch, loss_function=loss, forward_only=False)
    value.backward()

    assert value.item() == pytest.approx(expected_loss.item(), rel=1e-4)
    for name, column in zip(COLUMNS, columns.unbind(1), strict=True):
        rows = output["model_output"][f"{COLUMN_PREFIX}{name}"].unbind()
        got = torch.cat([row[-n - 1 : -1] for row, n in zip(rows, RESPONSES, strict=True)])
        torch.testing.assert_close(got, column.detach(), rtol=1e-4, atol=1e-5)
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in plain.named_parameters():
        grad = grads[name].full_tensor() if sharded else grads[name]
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("k", [0, 5])
def test_an_anchored_target_takes_the_reference_where_the_student_stands(k: int, packed: bool):
    """pi_T^.7 pi_ref^.2 sg[pi_theta]^.1: the teacher on its own prompts, the reference on the student's."""
    models = {name: make_model(seed) for name, seed in (("student", 0), ("teacher", 7), ("reference", 3))}
    logits = {
        name: plain_logits(model, *((TEACHER_PROMPTS, 2) if name == "teacher" else (PROMPTS, 1)))
        for name, model in models.items()
    }
    ids = top_k_ids(logits["student"], k) if k else None
    rows = {name: values.log_softmax(-1) if ids is None else on_support(values, ids) for name, values in logits.items()}
    target = (0.7 * rows["teacher"] + 0.2 * rows["reference"] + 0.1 * rows["student"]).log_softmax(-1).detach()
    if ids is None:
        columns = full_columns("forward_kl", logits["student"], target)
    else:
        columns = top_k_columns("forward_kl", logits["student"], ids, target, "bucket")
    engines = {name: make_engine(model) for name, model in models.items()}
    fields = {}
    if k:
        outputs = forward(engines["student"], make_batch(PROMPTS, 1, packed, HeadRequest("top_k_ids", chunk=4, k=k)))
        fields[SUPPORT_IDS] = outputs[SUPPORT_IDS]
    request = HeadRequest("on_support" if k else "hidden", True, 4, k)
    for name, prompts, seed, renamed in (
        ("teacher", TEACHER_PROMPTS, 2, {}),
        ("reference", PROMPTS, 1, {SUPPORT_LOG_PROBS: ANCHOR_LOG_PROBS, TEACHER_HIDDEN: ANCHOR_HIDDEN}),
    ):
        given = {SUPPORT_IDS: fields[SUPPORT_IDS]} if k else {}
        outputs = forward(engines[name], make_batch(prompts, seed, packed, request, **given))
        fields |= {renamed.get(n, n): outputs[n] for n in (SUPPORT_LOG_PROBS, TEACHER_HIDDEN) if n in outputs}
    heads = engines["student"].heads
    heads.teacher, heads.anchor = engines["teacher"].heads.kept, engines["reference"].heads.kept
    asked = HeadRequest("divergence", False, 4, k, "forward_kl", reference=0.2, student=0.1)
    value, output = engines["student"].forward_step(
        make_batch(PROMPTS, 1, packed, asked, **fields), loss_function=loss, forward_only=False
    )
    value.backward()
    got = output["model_output"][f"{COLUMN_PREFIX}divergence"].unbind()
    got = torch.cat([row[-n - 1 : -1] for row, n in zip(got, RESPONSES, strict=True)])
    mask = torch.tensor([flag for row in MASKS for flag in row]).bool()
    torch.testing.assert_close(got, torch.where(mask, columns[:, 0], 0.0).detach(), rtol=1e-4, atol=1e-5)
    assert models["student"].lm_head.weight.grad.isfinite().all() and models["reference"].lm_head.weight.grad is None

    if k:
        return  # the sampled token may lie outside of the k
    asked = HeadRequest("target", False, 4, reference=0.2, student=0.1)
    models["student"].zero_grad()

    def of_log_probs(model_output=None, data=None, dp_group=None):
        return model_output["log_probs"].values().sum(), {}

    value, output = engines["student"].forward_step(
        make_batch(PROMPTS, 1, packed, asked, **fields), loss_function=of_log_probs, forward_only=False
    )
    value.backward()
    got = output["model_output"][f"{COLUMN_PREFIX}target"]
    assert not got.requires_grad and f"{COLUMN_PREFIX}divergence" not in output["model_output"]
    got = torch.cat([row[-n - 1 : -1] for row, n in zip(got.unbind(), RESPONSES, strict=True)])
    tokens = torch.cat(make_rows(PROMPTS, 1)[1])
    expected = target.gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(got, torch.where(mask, expected, 0.0), rtol=1e-4, atol=1e-5)


def full_step(engine: Engine, teacher_engine: Engine) -> torch.Tensor:
    """Teacher pass and update with reverse KL over the whole vocabulary; the loss."""
    outputs = forward(teacher_engine, make_batch(TEACHER_PROMPTS, 2, True, HeadRequest("hidden", True, 4)))
    hand_head(teacher_engine, engine)
    fields = {TEACHER_HIDDEN: outputs[TEACHER_HIDDEN]}
    batch = make_batch(PROMPTS, 1, True, HeadRequest("divergence", False, 4, 0, "reverse_kl"), **fields)
    value, _ = engine.forward_step(batch, loss_function=loss, forward_only=False)
    value.backward()
    return value.detach()


def test_nothing_of_a_micro_batch_outlives_it():
    """A ring through autograd's C++ would, and the teacher's head and hidden states with it, at every step."""
    engine, teacher = make_engine(make_model(0)), make_engine(make_model(7))
    full_step(engine, teacher)
    head = weakref.ref(engine.heads.teacher[0])
    engine.heads.teacher = None
    gc.collect()
    assert head() is None


def test_a_head_whose_output_is_a_view():
    """One with a bias, or one whose activations verl offloads (enable_activation_offload)."""
    model, teacher = make_model(0, tied=False), make_model(7, tied=False)
    model.lm_head = torch.nn.Linear(16, 31, bias=True)
    _, expected = by_hand(model, "reverse_kl", 0, plain_logits(teacher, TEACHER_PROMPTS, 2).detach())
    (gradient,) = torch.autograd.grad(expected, model.lm_head.bias)
    assert full_step(make_engine(model), make_engine(teacher)).item() == pytest.approx(expected.item(), rel=1e-4)
    torch.testing.assert_close(model.lm_head.bias.grad, gradient, rtol=1e-3, atol=1e-5)


def test_a_teachers_pass_over_rows_that_verl_pads_to_one_length():
    engine = make_engine(make_model(7))
    batch = make_batch(TEACHER_PROMPTS, 2, True, HeadRequest("log_probs", True))
    plain = forward(engine, batch)["log_probs"].values()
    engine.pad_to_length, engine.pad_to_length_bucket = True, 16
    assert engine._get_packed_pad_size(21) == 11
    torch.testing.assert_close(forward(engine, batch)["log_probs"].values(), plain)


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_add_up_over_micro_batches_that_are_not_synchronised(tied: bool):
    """verl exchanges gradients after the last micro-batch only, and keeps gathered ones until then."""
    model, teacher = shard(make_model(0, tied=tied)), make_engine(make_model(7, tied=tied))
    engine = make_engine(model)
    full_step(engine, teacher)
    once = {name: parameter.grad.full_tensor().clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for last in (False, False, True):
        model.set_requires_gradient_sync(last)
        full_step(engine, teacher)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.full_tensor(), 3 * once[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_half_precision_as_verl_trains_in_it(tied: bool):
    """float32 master weights, bfloat16 for the passes: close to the float32 loss and its gradient's direction."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    teacher_model, plain = make_model(7, tied=tied), make_model(0, tied=tied)
    with torch.no_grad():
        teacher = plain_logits(teacher_model, TEACHER_PROMPTS, 2)
    _, expected = by_hand(plain, "reverse_kl", 0, teacher)
    expected.backward()

    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = make_model(0, tied=tied)
    engines = [make_engine(shard(m, mp_policy=half), torch.bfloat16) for m in (model, teacher_model)]
    value = full_step(*engines)
    assert value.item() == pytest.approx(expected.item(), rel=0.05)
    got = torch.cat([parameter.grad.full_tensor().flatten() for parameter in model.parameters()])
    wanted = torch.cat([parameter.grad.flatten() for parameter in plain.parameters()])
    assert got.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(got, wanted, dim=0) > 0.99


def test_an_adapter_on_the_layers_is_trained_through_a_frozen_head():
    from peft import LoraConfig, get_peft_model

    def adapted() -> torch.nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return get_peft_model(make_model(0), LoraConfig(target_modules="all-linear", init_lora_weights=False))

    teacher = make_model(7)
    with torch.no_grad():
        _, expected = by_hand(adapted(), "reverse_kl", 0, plain_logits(teacher, TEACHER_PROMPTS, 2))
    plain, model = adapted(), adapted()
    by_hand(plain, "reverse_kl", 0, plain_logits(teacher, TEACHER_PROMPTS, 2).detach())[1].backward()
    value = full_step(make_engine(model), make_engine(teacher))
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    for got, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        assert (got.grad is None) == (wanted.grad is None)
        if got.grad is not None:
            torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-3, atol=1e-5)


def test_a_batch_without_a_request_goes_through_untouched():
    model = make_model(0)
    before = forward(make_engine(model, kind=Bare), make_batch(PROMPTS, 1, True, None))
    engine = make_engine(model)
    forward(engine, make_batch(PROMPTS, 1, True, HeadRequest("top_k_ids", False, 4, 3)))
    after = forward(engine, make_batch(PROMPTS, 1, True, None))
    assert list(after) == list(before) == ["log_probs"]
    assert torch.equal(after["log_probs"].values(), before["log_probs"].values())


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("what", ["log_probs", "top_k", "hidden"])
def test_a_teacher_pass_has_log_probs_of_the_responses_alone(what: str, packed: bool, sharded: bool):
    model = make_model(0)
    with torch.no_grad():
        logits = plain_logits(model, TEACHER_PROMPTS, 2)
    expected = logits.log_softmax(-1).gather(1, torch.cat(make_rows(TEACHER_PROMPTS, 2)[1])[:, None])[:, 0]
    engine = make_engine(shard(model) if sharded else model)
    request = HeadRequest(what, True, 4, 3 if what == "top_k" else 0)
    log_probs = forward(engine, make_batch(TEACHER_PROMPTS, 2, packed, request))["log_probs"]
    assert log_probs.offsets().diff().tolist() == list(RESPONSES)
    torch.testing.assert_close(log_probs.values(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_a_teacher_pass_makes_no_logits_of_prompts(packed: bool):
    """A prompt may be a hundred times as long as the answer, and a row of logits as wide as the vocabulary."""
    model = make_model(0)
    engine = make_engine(model)
    seen: list[tuple[int, ...]] = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    prompts = (60, 40, 50)
    forward(engine, make_batch(prompts, 2, packed, HeadRequest(teacher=True)))
    forward(engine, make_batch(prompts, 2, packed, None))
    whole = (1, sum(prompts) + sum(RESPONSES), 31) if packed else (3, 64, 31)
    assert seen == [(1, sum(RESPONSES), 31), whole]


def test_with_sequence_parallelism_verl_makes_all_logits_and_the_response_is_taken_out_of_them():
    """Its ranks hold parts of rows; what comes back is the same."""
    model = make_model(0)
    engine = make_engine(model)
    batches = [make_batch(TEACHER_PROMPTS, 2, True, HeadRequest(teacher=True)) for _ in range(2)]
    tu.assign_non_tensor(batches[1], sp_size=2)
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    selected, whole = (forward(engine, batch)["log_probs"] for batch in batches)
    assert seen == [sum(RESPONSES), sum(TEACHER_PROMPTS) + sum(RESPONSES)]
    assert whole.offsets().tolist() == selected.offsets().tolist()
    torch.testing.assert_close(whole.values(), selected.values())


def test_rows_without_a_teacher_have_zero_columns():
    engine = make_engine(make_model(0))
    engine.heads.teacher = (torch.zeros(31, 16), None)
    fields = {
        TEACHER_MASK: nested([torch.zeros(n, dtype=torch.int64) for n in RESPONSES]),
        TEACHER_HIDDEN: nested([torch.zeros(n, 16) for n in RESPONSES]),
    }
    batch = make_batch(PROMPTS, 1, True, HeadRequest("divergence", False, 4, 0, "jsd"), **fields)
    value, output = engine.forward_step(batch, loss_function=loss, forward_only=False)
    value.backward()
    assert not output["model_output"][f"{COLUMN_PREFIX}divergence"].values().any()


def test_logits_that_change_after_the_head_are_refused():
    model = make_model(0)
    model.register_forward_hook(lambda module, args, output: type(output)(logits=output.logits / 4))
    engine = make_engine(model)
    engine.heads.teacher = (torch.zeros(31, 16), None)
    fields = {TEACHER_HIDDEN: nested([torch.zeros(n, 16) for n in RESPONSES])}
    batch = make_batch(PROMPTS, 1, True, HeadRequest("divergence", False, 4, 0, "jsd"), **fields)
    with pytest.raises(RuntimeError, match="changes its logits after the head"):
        engine.forward_step(batch, loss_function=loss, forward_only=False)


def test_another_vocabulary_is_refused():
    engine = make_engine(make_model(0))
    engine.heads.teacher = (torch.zeros(30, 16), None)
    fields = {TEACHER_HIDDEN: nested([torch.zeros(n, 16) for n in RESPONSES])}
    batch = make_batch(PROMPTS, 1, True, HeadRequest("divergence", False, 4, 0, "jsd"), **fields)
    with pytest.raises(RuntimeError, match="vocabulary has 31 tokens, the teacher's 30"):
        engine.forward_step(batch, loss_function=loss, forward_only=False)


def test_a_teachers_token_that_the_student_does_not_have_is_named():
    """On a GPU, reading beyond the logits would end the process with an assertion of the device."""
    engine = make_engine(make_model(0))
    fields = {
        SUPPORT_IDS: nested([torch.tensor([[3, 31]] * n, dtype=torch.int32) for n in RESPONSES]),
        SUPPORT_LOG_PROBS: nested([torch.full((n, 3), -1.1) for n in RESPONSES]),
    }
    batch = make_batch(PROMPTS, 1, True, HeadRequest("divergence", False, 4, 2, "forward_kl"), **fields)
    with pytest.raises(RuntimeError, match="hold number 31, and the student's vocabulary has 31 tokens"):
        engine.forward_step(batch, loss_function=loss, forward_only=False)


def test_a_head_that_is_not_called_is_named():
    model = make_model(0)
    engine = make_engine(model)
    weight = model.lm_head.weight
    model.lm_head.forward = None  # as fused kernels do, the model makes its logits without the head
    original = model.model

    class WithoutHead(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = original

        def get_output_embeddings(self):
            return model.lm_head

        def forward(self, **inputs):
            hidden = self.inner(**inputs).last_hidden_state
            return SimpleNamespace(logits=hidden @ weight.T)

    engine.module = WithoutHead()
    with pytest.raises(RuntimeError, match="use_fused_kernels=False"):
        forward(engine, make_batch(PROMPTS, 1, True, HeadRequest("top_k_ids", False, 4, 3)))
