"""The shape of a dense decoder of the Qwen family: exact parameter counts, FLOPs, cache and activation sizes.

Symbols in the docstrings: h hidden size, f intermediate size, L layers, V vocabulary, a = heads * head size, k =
key-value heads * head size, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdar_verl.errors import ConfigError
from sdar_verl.untrusted import parse_json


@dataclass(frozen=True)
class Architecture:
    """A Qwen2 or Qwen3 dense decoder.

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
    attention_bias: bool
    qk_norm: bool

    @property
    def query_size(self) -> int:
        """a, the width of all queries."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """k, the width of all keys (and of all values)."""
        return self.kv_heads * self.head_dim

    @property
    def matrix_parameters(self) -> int:
        """Weights of the matrices of one layer, h*a + 2*h*k + a*h + 3*h*f: what FLOPs count."""
        attention = self.hidden * (2 * self.query_size + 2 * self.kv_size)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def layer_parameters(self) -> int:
        """All weights of one layer."""
        biases = self.query_size + 2 * self.kv_size if self.attention_bias else 0
        norms = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        return self.matrix_parameters + biases + norms

    @property
    def parameters(self) -> int:
        """All weights, a tied head once."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return embeddings + self.layers * self.layer_parameters + self.hidden

    def forward_flops(self, lengths: Iterable[int], head_tokens: int | None = None, *, causal: bool = True) -> float:
        """Floating-point operations of one forward pass.

            2 T L (matrix weights of a layer)  +  2 T_head h V  +  4 L a sum_i n_i^2, halved by a causal kernel

        Args:
            lengths: tokens of each sequence, n_i; T is their sum.
            head_tokens: tokens that go through the head; None: all.
            causal: the attention kernel skips the upper triangle (flash attention does).
        """
        lengths = list(lengths)
        tokens = sum(lengths)
        squares = float(sum(length * length for length in lengths))
        attention = 4.0 * self.layers * self.query_size * squares * (0.5 if causal else 1.0)
        head = 2.0 * (tokens if head_tokens is None else head_tokens) * self.hidden * self.vocabulary
        return 2.0 * tokens * self.layers * self.matrix_parameters + head + attention

    def kv_bytes_per_token(self, dtype_bytes: int = 2) -> int:
        """Keys and values of one token in all layers, 2 L k."""
        return 2 * self.layers * self.kv_size * dtype_bytes

    def layer_activation_bytes(self, dtype_bytes: int = 2) -> int:
        """What one layer keeps per token for its backward pass, without checkpointing; attention by a fused kernel.

        Counted as transformers' modules save it:

        - each of the two norms: its input in float32 (4 h bytes), the normalised input before and after the gain (2 h)
          and the inverse deviation (4 bytes);
        - rotated queries and keys, values, and the attention's output (2 a + 2 k), with its log-sums (4 bytes a head);
          norms of queries and keys, where the model has them, as other norms, but the rotation keeps their result;
        - the MLP: gate, its activation, up and their product (4 f).
        """
        norms = 2 * (self.hidden * (4 + 2 * dtype_bytes) + 4)
        attention = 2 * (self.query_size + self.kv_size) * dtype_bytes + 4 * self.heads
        if self.qk_norm:
            attention += (self.query_size + self.kv_size) * (4 + dtype_bytes) + 4 * (self.heads + self.kv_heads)
        return norms + attention + 4 * self.intermediate * dtype_bytes

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str = "model") -> Architecture:
        """Read a Hugging Face ``config.json``.

        Raises:
            ConfigError: not a dense Qwen2 or Qwen3.
        """
        kind = config.get("model_type")
        if kind not in ("qwen2", "qwen3"):
            raise ConfigError(
                f"{name}: model_type={kind!r}; the planner knows the dense qwen2 and qwen3, the recipes' models"
            )
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        return cls(
            name=name,
            hidden=hidden,
            intermediate=int(config["intermediate_size"]),
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            vocabulary=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bool(config.get("attention_bias", False)) or kind == "qwen2",
            qk_norm=kind == "qwen3",
        )

    @classmethod
    def find(cls, path: str) -> Architecture:
        """A local model folder's architecture, or that of one of the recipes' models by its hub name.

        Raises:
            ConfigError: neither.
        """
        file = Path(path) / "config.json"
        if file.is_file():
            return cls.from_config(parse_json(file.read_bytes()), name=Path(path).name)
        known = KNOWN.get(path.rsplit("/", 1)[-1].lower())
        if known is None:
            raise ConfigError(
                f"actor_rollout_ref.model.path={path} is no local model folder and not one of the built-in "
                f"architectures ({', '.join(sorted(KNOWN))}); give a folder with a config.json"
            )
        return known


def _qwen2(name: str, hidden: int, intermediate: int, layers: int, heads: int, vocabulary: int, tied: bool, kv: int):
    return Architecture(
        name,
        hidden,
        intermediate,
        layers,
        heads,
        kv,
        hidden // heads,
        vocabulary,
        tied,
        attention_bias=True,
        qk_norm=False,
    )


# The models of the recipes, from their published config.json.
KNOWN: dict[str, Architecture] = {
    "qwen2.5-3b-instruct": _qwen2("Qwen2.5-3B", 2048, 11008, 36, 16, 151936, True, 2),
    "qwen2.5-7b-instruct": _qwen2("Qwen2.5-7B", 3584, 18944, 28, 28, 152064, False, 4),
    "qwen3-1.7b": Architecture(
        "Qwen3-1.7B", 2048, 6144, 28, 16, 8, 128, 151936, True, attention_bias=False, qk_norm=True
    ),
}
