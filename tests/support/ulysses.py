"""verl's Ulysses sequence parallelism on CPU ranks: the two things that it needs a GPU for, by plain means."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

ATTENTION = "sdpa_through_ulysses"
"""Value of ``attn_implementation`` after :func:`install`."""


def install() -> None:
    """In this process: an attention that goes through verl's all-to-all, and an all-to-all over gloo.

    verl puts Ulysses in front of flash-attention, which stays the code under test; what is behind it and what gloo
    lacks are replaced.
    """
    from transformers import AttentionInterface
    from verl.models.transformers import monkey_patch
    from verl.utils import ulysses

    ulysses.dist.all_to_all = _all_to_all
    monkey_patch._flash_attention_forward = _packed_attention

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, *, position_ids: Any, **_: Any) -> Any:
        states = (states.transpose(1, 2) for states in (query, key, value))
        return monkey_patch._ulysses_flash_attention_forward(
            *states, None, query.shape[2], position_ids=position_ids
        ), None

    AttentionInterface.register(ATTENTION, attention)


def _packed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, position_ids: torch.Tensor, **__: Any
) -> torch.Tensor:
    """Causal attention within each packed row, as flash-attention's; (1, tokens, heads, head size)."""
    starts = (position_ids[0] == 0).nonzero().flatten().tolist()
    groups = query.shape[2] // key.shape[2]
    rows = []
    for start, stop in zip(starts, [*starts[1:], query.shape[1]], strict=True):
        q, k, v = (states[:, start:stop].transpose(1, 2) for states in (query, key, value))
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        rows.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2))
    return torch.cat(rows, dim=1)


def _all_to_all(outputs: list[torch.Tensor], inputs: list[torch.Tensor], group: Any = None, async_op: bool = False):
    """torch's, for tensors of one shape; gloo has none for lists."""
    assert not async_op
    mine = torch.stack([part.contiguous() for part in inputs])
    everyones = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyones, mine, group=group)
    for output, parts in zip(outputs, everyones, strict=True):
        output.copy_(parts[dist.get_rank(group)])
