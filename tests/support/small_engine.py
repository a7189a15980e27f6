"""verl's FSDP engine around a model of some thousand weights, its rows, and by hand what it should give."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from sdar_verl.algorithm.divergences import full_columns, on_support, top_k_columns, top_k_ids
from sdar_verl.fields import (
    TEACHER_MASK,
)
from sdar_verl.requests import HEAD_REQUEST, HeadRequest
from sdar_verl.verl.engine import WithRequests
from sdar_verl.verl.head import COLUMN_PREFIX

TEMPERATURE = 0.8
PROMPTS, RESPONSES = (3, 1, 5), (4, 2, 3)
TEACHER_PROMPTS = (6, 4, 2)
MASKS = ([1, 1, 0, 1], [0, 0], [1, 1, 1])  # tokens that have a teacher


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make_model(seed: int, *, tied: bool = True) -> torch.nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(5.0)
    return model


class Bare(FSDPEngineWithLMHead):
    """verl's own engine around a model that is there already."""

    def __init__(self, model_config: SimpleNamespace) -> None:
        self.module = model_config.module
        self.pad_to_length = self.use_ulysses_sp = False
        self.ulysses_device_mesh = None
        self._autocast_dtype = model_config.dtype
        self.engine_config = SimpleNamespace(entropy_checkpointing=False)


class Engine(WithRequests, Bare):
    """The same with requests."""


def make_engine(model: torch.nn.Module, dtype: torch.dtype = torch.float32, kind: type = Engine) -> Bare:
    return kind(SimpleNamespace(module=model, dtype=dtype))


def shard(model: torch.nn.Module, **options) -> torch.nn.Module:
    """As verl does: layers, and the head where it has weights of its own; freed after each forward pass."""
    from torch.distributed.fsdp import fully_shard as fully_shard_with

    fully_shard = partial(fully_shard_with, **options)

    parts = list(model.model.layers)
    if not model.config.tie_word_embeddings:
        parts += [model.model.embed_tokens, model.lm_head]
    for part in parts:
        fully_shard(part, reshard_after_forward=True)
    return fully_shard(model, reshard_after_forward=True)


def nested(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def make_rows(prompts: tuple[int, ...], seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Token ids of prompts (by seed) and responses (always the same)."""
    draw = torch.Generator().manual_seed(seed)
    same = torch.Generator().manual_seed(99)
    heads = [torch.randint(31, (n,), generator=draw) for n in prompts]
    return heads, [torch.randint(31, (n,), generator=same) for n in RESPONSES]


def make_batch(prompts: tuple[int, ...], seed: int, packed: bool, request: HeadRequest | None, **fields) -> TensorDict:
    rows = [torch.cat(pair) for pair in zip(*make_rows(prompts, seed), strict=True)]
    batch = TensorDict(
        {
            "input_ids": nested(rows),
            "position_ids": nested([torch.arange(len(row)) for row in rows]),
            "loss_mask": nested([torch.ones(n, dtype=torch.int64) for n in RESPONSES]),
            "responses": nested(make_rows(prompts, seed)[1]),
            TEACHER_MASK: nested([torch.tensor(mask) for mask in MASKS]),
            **fields,
        },
        batch_size=len(rows),
    )
    tu.assign_non_tensor(batch, temperature=TEMPERATURE, use_remove_padding=packed, pad_token_id=0)
    if request is not None:
        tu.assign_non_tensor(batch, **{HEAD_REQUEST: request.to_json()})
    return batch


def plain_logits(model: torch.nn.Module, prompts: tuple[int, ...], seed: int) -> torch.Tensor:
    """(response tokens of all rows, V), one forward pass per row."""
    out = []
    for prompt, response in zip(*make_rows(prompts, seed), strict=True):
        logits = model(torch.cat([prompt, response])[None]).logits[0] / TEMPERATURE
        out.append(logits[len(prompt) - 1 : -1])
    return torch.cat(out)


def forward(engine: Bare, batch: TensorDict) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        _, output = engine.forward_step(batch, loss_function=None, forward_only=True)
    return output["model_output"]


def loss(model_output=None, data=None, dp_group=None):
    """Unequal weights on the divergences, and a little of the log-probs as verl's own loss would."""
    values = model_output[f"{COLUMN_PREFIX}divergence"].values()
    weights = torch.linspace(0.5, 2.0, len(values))
    return (values * weights).sum() + 0.1 * model_output["log_probs"].values().sum(), {}


def hand_head(teacher_engine: Engine, engine: Engine) -> None:
    """As the worker does between teacher pass and update."""
    engine.heads.teacher, teacher_engine.heads.kept = teacher_engine.heads.kept, None


def by_hand(model, kind: str, k: int, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of every response token, and the loss above, from plain forward passes."""
    student = plain_logits(model, PROMPTS, 1)
    if k:
        ids = top_k_ids(teacher if kind == "forward_kl" else student, k)
        columns = top_k_columns(kind, student, ids, on_support(teacher, ids), "bucket")
    else:
        columns = full_columns(kind, student, teacher)
    mask = torch.tensor([flag for row in MASKS for flag in row]).bool()
    columns = torch.where(mask[:, None], columns, 0.0)
    total = sum(PROMPTS) + sum(RESPONSES)
    places, end = [], 0
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        end += prompt + response
        places += range(end - response - 1, end - 1)
    weights = torch.linspace(0.5, 2.0, total)[places]
    # verl's log-probs of a row's last token are about the first token of the next row.
    rows = [torch.cat(pair) for pair in zip(*make_rows(PROMPTS, 1), strict=True)]
    labels = torch.cat(rows).roll(-1)
    logits = torch.cat([model(row[None]).logits[0] for row in rows]) / TEMPERATURE
    log_probs = logits.log_softmax(-1).gather(1, labels[:, None]).sum()
    return columns, (columns[:, 0] * weights).sum() + 0.1 * log_probs
