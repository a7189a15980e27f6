"""The shape of a decoder: exact parameter counts, FLOPs, cache and activation sizes.

Symbols in the docstrings: h hidden size, f intermediate size, L layers, V vocabulary, a = heads * head size, k =
key-value heads * head size, T tokens. Of layers with experts: E experts of intermediate size m, e of them at work. Of
layers with linear attention (gated delta rule): K and W the widths of keys and values, n value heads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

DELTA_CHUNK = 64
"""Tokens that kernels of the gated delta rule take at a time."""


@dataclass(frozen=True)
class Experts:
    """What stands in the place of the MLP.

    Attributes:
        number: E.
        active: e, experts that a token goes through.
        intermediate: m.
        shared: intermediate size of the expert that every token goes through; 0 without one.
        bias: experts and router have biases (gpt-oss).
        dense_layers: layers that have an MLP all the same.
    """

    number: int
    active: int
    intermediate: int
    shared: int = 0
    bias: bool = False
    dense_layers: int = 0

    def parameters(self, hidden: int) -> int:
        """All weights of a layer's experts, router included."""
        biases = self.number * (2 * self.intermediate + hidden + 1) if self.bias else 0
        return 3 * hidden * self.intermediate * self.number + biases + self._around(hidden)

    def matrices(self, hidden: int) -> int:
        """Weights that a token meets, e experts, router and shared expert."""
        return 3 * hidden * self.intermediate * self.active + self._around(hidden)

    def _around(self, hidden: int) -> int:
        # The shared expert is weighed by a gate of one column.
        return hidden * self.number + (3 * hidden * self.shared + hidden if self.shared else 0)


@dataclass(frozen=True)
class LinearAttention:
    """Layers whose attention is a gated delta rule over a state, behind a short convolution (Qwen3.5).

    Attributes:
        layers: how many of all.
        key_heads, value_heads, key_dim, value_dim: K = key_heads * key_dim, W = value_heads * value_dim.
        kernel: of the convolution.
    """

    layers: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int

    @property
    def mixed(self) -> int:
        """Width of queries, keys and values together, 2 K + W."""
        return 2 * self.key_heads * self.key_dim + self.values

    @property
    def values(self) -> int:
        """W."""
        return self.value_heads * self.value_dim

    def matrices(self, hidden: int) -> int:
        """Weights of the projections: queries, keys, values, gate, decay and step of each head, output."""
        return hidden * (self.mixed + 2 * self.values + 2 * self.value_heads)

    def parameters(self, hidden: int) -> int:
        """All weights of the attention of one layer."""
        return self.matrices(hidden) + self.mixed * self.kernel + 2 * self.value_heads + self.value_dim

    def state_flops(self) -> float:
        """Of one token beyond the matrices: the convolution; per head, three products with a state of key x value, and
        those with the other tokens of its chunk."""
        key, value = self.key_dim, self.value_dim
        head = 6.0 * key * value + DELTA_CHUNK * (6.0 * key + 4.0 * value)
        return 2.0 * self.mixed * self.kernel + self.value_heads * head

    def activation_bytes(self, dtype_bytes: int) -> int:
        """Per token, an estimate: what stands before and behind the convolution, gate, result before and behind its
        norm, decay and step in float32, and a chunk's products of keys."""
        kept = (2 * self.mixed + 3 * self.values + DELTA_CHUNK * self.value_heads) * dtype_bytes
        return kept + 2 * 4 * self.value_heads


@dataclass(frozen=True)
class Architecture:
    """A decoder of one of the families in :mod:`sdar_verl.planner.families`.

    Attributes:
        name: for tables.
        hidden: h.
        intermediate: f, of the gated MLP.
        layers: L.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: size of one head.
        vocabulary: V, rows of the embedding.
        tied: the head shares the embedding's weights.
        attention_bias: query, key and value projections have a bias (Qwen2).
        qk_norm: queries and keys are normalised per head (Qwen3).
        output_bias: the attention's output projection has one, too.
        mlp_bias: the MLP's matrices have biases.
        gated: queries come with a gate of their size (Qwen3.5).
        sinks: every head has a weight for looking nowhere (gpt-oss).
        norms: of width h in a layer.
        experts: in the place of the MLP.
        linear: layers with linear attention.
    """

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    attention_bias: bool = False
    qk_norm: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    gated: bool = False
    sinks: bool = False
    norms: int = 2
    experts: Experts | None = None
    linear: LinearAttention | None = None

    @property
    def query_size(self) -> int:
        """a, the width of all queries."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """k, the width of all keys (and of all values)."""
        return self.kv_heads * self.head_dim

    @property
    def attending(self) -> int:
        """Layers with a cache of keys and values."""
        return self.layers - (self.linear.layers if self.linear else 0)

    @property
    def _expert_layers(self) -> int:
        return self.layers - self.experts.dense_layers if self.experts else 0

    @property
    def _attention_matrices(self) -> int:
        queries = self.query_size * (2 if self.gated else 1)
        return self.hidden * (queries + 2 * self.kv_size + self.query_size)

    @property
    def _attention_parameters(self) -> int:
        queries = self.query_size * (2 if self.gated else 1)
        biases = queries + 2 * self.kv_size if self.attention_bias else 0
        biases += self.hidden if self.output_bias else 0
        return (
            self._attention_matrices
            + biases
            + (2 * self.head_dim if self.qk_norm else 0)
            + (self.heads if self.sinks else 0)
        )

    @property
    def _mlp_parameters(self) -> int:
        biases = 2 * self.intermediate + self.hidden if self.mlp_bias else 0
        return 3 * self.hidden * self.intermediate + biases

    @property
    def matrix_parameters(self) -> int:
        """Weights of the matrices that a token meets in all layers: what FLOPs count. A plain layer has h*a + 2*h*k +
        a*h + 3*h*f."""
        total = self.attending * self._attention_matrices
        total += (self.layers - self._expert_layers) * 3 * self.hidden * self.intermediate
        if self.linear:
            total += self.linear.layers * self.linear.matrices(self.hidden)
        if self.experts:
            total += self._expert_layers * self.experts.matrices(self.hidden)
        return total

    @property
    def layer_parameters(self) -> int:
        """All weights of the largest layer."""
        attention = self._attention_parameters if self.attending else 0
        if self.linear:
            attention = max(attention, self.linear.parameters(self.hidden))
        mlp = self._mlp_parameters
        if self.experts:
            mlp = self.experts.parameters(self.hidden)
        return attention + mlp + self.norms * self.hidden

    @property
    def parameters(self) -> int:
        """All weights, a tied head once."""
        total = self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden
        total += self.attending * self._attention_parameters + self.layers * self.norms * self.hidden
        total += (self.layers - self._expert_layers) * self._mlp_parameters
        if self.linear:
            total += self.linear.layers * self.linear.parameters(self.hidden)
        if self.experts:
            total += self._expert_layers * self.experts.parameters(self.hidden)
        return total

    @property
    def lora_sides(self) -> int:
        """Inputs and outputs of all matrices that LoRA's ``all-linear`` adapts; experts, in one tensor, are none."""
        h, a, k = self.hidden, self.query_size, self.kv_size
        total = self.attending * ((h + a * (2 if self.gated else 1)) + 2 * (h + k) + (a + h))
        total += (self.layers - self._expert_layers) * 3 * (h + self.intermediate)
        if self.linear:
            one = (h + self.linear.mixed) + 2 * (h + self.linear.values) + 2 * (h + self.linear.value_heads)
            total += self.linear.layers * one
        if self.experts and self.experts.shared:
            total += self._expert_layers * (3 * (h + self.experts.shared) + h + 1)
        return total

    def read_parameters(self, tokens: float) -> float:
        """Weights that a decoding step reads for ``tokens`` at once: of the experts those that one of them meets, if
        the router deals them out evenly."""
        if not self.experts:
            return float(self.parameters)
        missed = (1.0 - self.experts.active / self.experts.number) ** tokens
        one = 3 * self.hidden * self.experts.intermediate * self.experts.number
        return self.parameters - missed * self._expert_layers * one

    def forward_flops(self, lengths: Iterable[int], head_tokens: int | None = None, *, causal: bool = True) -> float:
        """Floating-point operations of one forward pass.

            2 T (matrix weights that a token meets)  +  2 T_head h V  +  4 L a sum_i n_i^2, halved by a causal kernel

        L of the last term are the layers with a cache; the others take :meth:`LinearAttention.state_flops` a token.

        Args:
            lengths: tokens of each sequence, n_i; T is their sum.
            head_tokens: tokens that go through the head; None: all.
            causal: the attention kernel skips the upper triangle (flash attention does).
        """
        lengths = list(lengths)
        tokens = sum(lengths)
        squares = float(sum(length * length for length in lengths))
        attention = 4.0 * self.attending * self.query_size * squares * (0.5 if causal else 1.0)
        if self.linear:
            attention += tokens * self.linear.layers * self.linear.state_flops()
        head = 2.0 * (tokens if head_tokens is None else head_tokens) * self.hidden * self.vocabulary
        return 2.0 * tokens * self.matrix_parameters + head + attention

    def kv_bytes_per_token(self, dtype_bytes: int = 2) -> int:
        """Keys and values of one token, 2 L k of the layers with a cache."""
        return 2 * self.attending * self.kv_size * dtype_bytes

    def layer_activation_bytes(self, dtype_bytes: int = 2) -> int:
        """What the largest layer keeps per token for its backward pass, without checkpointing; attention by a fused
        kernel.

        Counted as transformers' modules save it:

        - each norm of width h: its input in float32 (4 h bytes), the normalised input before and after the gain (2 h)
          and the inverse deviation (4 bytes);
        - rotated queries and keys, values, and the attention's output (2 a + 2 k), with its log-sums (4 bytes a head);
          norms of queries and keys, where the model has them, as other norms, but the rotation keeps their result;
        - the MLP: gate, its activation, up and their product (4 f); of experts the same for the e of a token, and their
          inputs and outputs (2 e h). The latter, like linear attention, is an estimate.
        """
        return self._largest_attention(dtype_bytes) + self._around_attention(dtype_bytes)

    def activation_bytes(self, dtype_bytes: int = 2) -> int:
        """The same of all layers together."""
        total = self.layers * self._around_attention(dtype_bytes) + self.attending * self._attention_bytes(dtype_bytes)
        return total + (self.linear.layers * self.linear.activation_bytes(dtype_bytes) if self.linear else 0)

    def _largest_attention(self, dtype_bytes: int) -> int:
        found = self._attention_bytes(dtype_bytes) if self.attending else 0
        return max(found, self.linear.activation_bytes(dtype_bytes)) if self.linear else found

    def _attention_bytes(self, dtype_bytes: int) -> int:
        kept = 2 * (self.query_size + self.kv_size) * dtype_bytes + 4 * self.heads
        if self.qk_norm:
            kept += (self.query_size + self.kv_size) * (4 + dtype_bytes) + 4 * (self.heads + self.kv_heads)
        if self.gated:
            kept += 2 * self.query_size * dtype_bytes  # the gate, and the attention's output before it
        return kept

    def _around_attention(self, dtype_bytes: int) -> int:
        norms = self.norms * (self.hidden * (4 + 2 * dtype_bytes) + 4)
        if not self.experts:
            return norms + 4 * self.intermediate * dtype_bytes
        wide = self.experts.active * (4 * self.experts.intermediate + 2 * self.hidden) + 4 * self.experts.shared
        return norms + wide * dtype_bytes
