"""Functions of the logits, computed from the hidden states a few tokens at a time.

The logits of N tokens over a vocabulary of V take N x V numbers, and a divergence by plain autograd keeps several such
tensors. Here the language-model head is applied to ``chunk`` tokens, the function is evaluated, and the logits are
thrown away; the backward pass makes them again. At any time only chunk x V numbers exist:

    forward    z_c = (h_c W^T + b) / temperature,   y_c = f(z_c)
    backward   z_c again,  dz_c = dy_c df/dz_c / temperature,  dh_c = dz_c W,  dW += dz_c^T h_c

The price is one more product with the head (forward and recomputation), see docs/divergences.md.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch


class Columns(Protocol):
    """A function of logits, given a chunk of rows at a time: (chunk, V) in float32, divided by the temperature.

    ``rows`` says which rows of the whole they are; the logits may be overwritten.
    """

    def columns(self, logits: torch.Tensor, rows: slice) -> torch.Tensor:
        """(chunk, m) float32."""


class RowFunction(Columns, Protocol):
    """One that knows its derivative."""

    def slope(self, logits: torch.Tensor, rows: slice, upstream: torch.Tensor) -> torch.Tensor:
        """``upstream`` (chunk,) times the derivative of the first column with respect to the logits, (chunk, V)."""


def map_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    function: RowFunction,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    chunk: int = 128,
) -> torch.Tensor:
    """``function`` of every token's logits, without ever holding more than ``chunk`` rows of them.

    Args:
        hidden: (N, H), input of the head; gradient.
        weight: (V, H), the head's; gradient. Same dtype as ``hidden``: the logits are made in it, as the model does.
        function: of the logits; the same whenever it is called with the same rows.
        bias: (V,) or None; gradient.
        temperature: logits are divided by it.
        chunk: tokens at a time.

    Returns:
        (N, m) float32; gradients flow through the first column.

    Raises:
        ValueError: chunk < 1, or no token at all.
    """
    return _MapLogits.apply(hidden, weight, bias, function, float(temperature), chunk)


def columns_of_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    function: Columns,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    chunk: int = 128,
) -> torch.Tensor:
    """The values of :func:`map_logits`, with its arguments and errors, and no gradient."""
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1")
    if not len(hidden):
        raise ValueError("a function of logits needs at least one token")
    with torch.no_grad(), _no_autocast(hidden):
        parts = [
            function.columns(chunk_logits(hidden[rows], weight, bias, temperature), rows)
            for rows in _slices(len(hidden), chunk)
        ]
    return torch.cat(parts)


def chunk_logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, temperature: float
) -> torch.Tensor:
    """Logits of some tokens, (chunk, V) float32; the product itself in the dtype of ``weight``."""
    return torch.nn.functional.linear(hidden.to(weight.dtype), weight, bias).float().div_(temperature)


def _slices(total: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, total)) for start in range(0, total, chunk)]


class _MapLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        function: RowFunction,
        temperature: float,
        chunk: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight, bias)
        ctx.function, ctx.temperature, ctx.chunk = function, temperature, chunk
        return columns_of_logits(hidden, weight, function, bias=bias, temperature=temperature, chunk=chunk)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        if weight.untyped_storage().size() == 0:
            raise RuntimeError(
                "the weights of the language-model head were freed before the backward pass of the divergence: the "
                "loss does not depend on the model's logits, so FSDP did not gather them again"
            )
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        # Sums over many chunks are taken in float32: half precision would drop the later ones' digits.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias else None
        with _no_autocast(hidden):
            for rows in _slices(len(hidden), ctx.chunk):
                logits = chunk_logits(hidden[rows], weight, bias, ctx.temperature)
                slope = ctx.function.slope(logits, rows, grad[rows, 0] / ctx.temperature).to(weight.dtype)
                del logits
                if grad_hidden is not None:
                    grad_hidden[rows] = slope @ weight
                if grad_weight is not None:
                    _add_product(grad_weight, slope, hidden[rows])
                if grad_bias is not None:
                    grad_bias += slope.sum(0, dtype=torch.float32)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _add_product(total: torch.Tensor, slope: torch.Tensor, hidden: torch.Tensor) -> None:
    """total += slope^T hidden, in place when the dtypes allow it."""
    hidden = hidden.to(slope.dtype)
    if slope.dtype == total.dtype:
        total.addmm_(slope.t(), hidden)
    else:
        total += slope.t() @ hidden


def _no_autocast(like: torch.Tensor) -> torch.autocast:
    # The dtypes are chosen here; and a backward pass is not run under the forward's autocast anyway.
    return torch.autocast(like.device.type, enabled=False)
