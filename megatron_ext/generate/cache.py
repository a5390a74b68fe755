"""Keys and values of the tokens seen so far, for one group of rows on one pipeline stage: this rank's layers, this rank's heads.

A key lies at its row's own position, so rows of unequal length need no padding on the left. A prompt is filled in from the left and
padded on the right; a later token overwrites the padding at its position, and until then the mask (key position > query position) hides it.
"""
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_ext.models.attention import LayerCache
from megatron_ext.models.decoder import Decoder


class StageCache:
    """One `LayerCache` for each layer of a stage, [rows, groups / TP, max_length, head_dim] in the model's dtype.

    Args:
        rows: sequences.
        max_length: tokens that the longest may reach.
    """

    def __init__(self, model: Decoder, *, rows: int, max_length: int, device: torch.device):
        self.layers: list[LayerCache] = []
        for layer in model.decoder.layers:
            attention = layer.self_attention
            shape = (rows, attention.num_query_groups_per_partition, max_length, attention.hidden_size_per_attention_head)
            dtype = model.config.params_dtype
            # Zeros: a masked key that is not a number would still poison the row.
            self.layers.append(LayerCache(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)))

    def place(self, positions: Tensor, *, length: int, start: int | None) -> None:
        """Says where the next keys go.

        Args:
            positions: int64 [rows, new].
            length: keys that are looked at: 1 + the largest position.
            start: the first column, where all rows write the same ones; else None.
        """
        for layer in self.layers:
            layer.positions, layer.length, layer.start = positions, length, start

    def keep(self, rows: Sequence[int]) -> None:
        """Keeps only these rows, in this order."""
        index = torch.tensor(rows, device=self.layers[0].keys.device)
        for layer in self.layers:
            layer.keys, layer.values = layer.keys.index_select(0, index), layer.values.index_select(0, index)

    @contextmanager
    def attached(self, model: Decoder) -> Iterator[None]:
        """Inside, the model's own forward pass stores and reads its keys and values here."""
        cores = [layer.self_attention.core_attention for layer in model.decoder.layers]
        for core, layer in zip(cores, self.layers):
            core.cache = layer
        try:
            yield
        finally:
            for core in cores:
                core.cache = None
