"""A key-value cache of slots for transformers models: every row of the batch has a length of its own.

transformers' dynamic cache grows all rows together and copies itself at every token. Here each running request owns
row ``slot`` of one buffer per layer; a prefill writes whole rows, a decode step writes one cell per row, and attention
reads a view. Which cells a row may see is said by the attention mask that the caller passes.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

_WIDTH_STEP = 128  # cells added when the longest row outgrows the buffer


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer: (slots, key-value heads, cells, head size) each."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.keys: torch.Tensor
        self.values: torch.Tensor
        self.first_slot = 0
        self.rows: torch.Tensor | None = None  # set during decode, None during prefill
        self.cells: torch.Tensor | None = None
        self.width = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys = key_states.new_zeros(0, key_states.shape[1], 0, key_states.shape[3])
        self.values = value_states.new_zeros(0, value_states.shape[1], 0, value_states.shape[3])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows = key_states.shape[0]
        if self.cells is None:
            width = key_states.shape[2]
            self._reserve(self.first_slot + rows, width)
            self.keys[self.first_slot : self.first_slot + rows, :, :width] = key_states
            self.values[self.first_slot : self.first_slot + rows, :, :width] = value_states
            return key_states, value_states
        self._reserve(rows, self.width)
        self.keys[self.rows, :, self.cells] = key_states[:, :, 0]
        self.values[self.rows, :, self.cells] = value_states[:, :, 0]
        return self.keys[:rows, :, : self.width], self.values[:rows, :, : self.width]

    def _reserve(self, slots: int, width: int) -> None:
        """Grow the buffers so that they hold ``slots`` rows of ``width`` cells."""
        old_slots, heads, old_width, size = self.keys.shape
        if slots <= old_slots and width <= old_width:
            return
        new_slots = old_slots if slots <= old_slots else max(slots, 2 * old_slots)
        new_width = old_width if width <= old_width else -(-width // _WIDTH_STEP) * _WIDTH_STEP
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(new_slots, heads, new_width, size)
            new[:old_slots, :, :old_width] = old
            setattr(self, name, new)

    def move(self, source: int, target: int, filled: int) -> None:
        self.keys[target, :, :filled] = self.keys[source, :, :filled]
        self.values[target, :, :filled] = self.values[source, :, :filled]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0  # asked during prefill only, when a row sees nothing but its own prompt

    def get_seq_length(self) -> int:
        return 0

    def get_max_cache_shape(self) -> int:
        return -1


def attends_fully(config: Any) -> bool:
    """Whether every layer of a model sees all tokens before its own: no sliding window, no linear attention."""
    config = config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    return {*kinds} == {"full_attention"} if kinds else not getattr(config, "sliding_window", None)


class SlotCache(Cache):
    """The cache of all layers. Use: ``begin_prefill`` or ``begin_decode``, then one forward pass of the model.

    Args:
        config: the model's configuration.

    Raises:
        ValueError: for a model with anything but full attention.
    """

    def __init__(self, config: Any) -> None:
        if not attends_fully(config):
            raise ValueError(f"model type {config.model_type!r} has more than full attention")
        config = config.get_text_config(decoder=True)
        self._slot_layers = [_SlotLayer() for _ in range(config.num_hidden_layers)]
        super().__init__(layers=list(self._slot_layers))

    def begin_prefill(self, first_slot: int) -> None:
        """The next forward pass writes its rows, whole, to the slots from ``first_slot`` on."""
        for layer in self._slot_layers:
            layer.first_slot, layer.rows, layer.cells = first_slot, None, None

    def begin_decode(self, cells: torch.Tensor, width: int) -> None:
        """The next forward pass has one token per slot from 0 on.

        Args:
            cells: (rows,) int64, where each row's keys and values go.
            width: number of cells that attention reads; above every entry of ``cells``.
        """
        rows = torch.arange(len(cells))
        for layer in self._slot_layers:
            layer.rows, layer.cells, layer.width = rows, cells, width

    def move(self, source: int, target: int, filled: int) -> None:
        """Copy the first ``filled`` cells of slot ``source`` to slot ``target``."""
        for layer in self._slot_layers:
            layer.move(source, target, filled)


@torch.inference_mode()
def verify_slot_cache(model: Any) -> None:
    """Compare the cached logits of a short sequence with those of a plain forward pass.

    Costs three small passes, and turns an architecture that the cache does not serve (position biases built from the
    mask, for example) into an error instead of wrong log-probs.

    Raises:
        ValueError: when they differ by more than rounding.
    """
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    tokens = torch.arange(1, 9)[None] % vocabulary
    expected = model(input_ids=tokens, use_cache=False).logits[:, -1]
    pad, length = 3, tokens.shape[1] - 1
    cache = SlotCache(model.config)
    cache.begin_prefill(0)
    mask = torch.cat([torch.zeros(1, pad), torch.ones(1, length)], dim=1).long()
    model(
        input_ids=torch.cat([torch.zeros(1, pad, dtype=torch.long), tokens[:, :-1]], dim=1),
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
    )
    cache.begin_decode(torch.tensor([pad + length]), pad + length + 1)
    actual = model(
        input_ids=tokens[:, -1:],
        attention_mask=(torch.arange(pad + length + 1) >= pad)[None, None, None],
        position_ids=torch.tensor([[length]]),
        past_key_values=cache,
        use_cache=True,
    ).logits[:, -1]
    difference = (actual - expected).abs().max().item()
    if not difference <= 1e-2 * max(1.0, expected.abs().max().item()):
        raise ValueError(
            f"rollout.name=transformers does not serve model type {model.config.model_type!r}: its cached logits "
            f"differ from a plain forward pass by {difference:.2g}; use another model, or rollout.name=vllm on a GPU"
        )
