"""Words and learned positions of the first stage, for the models that megatron-core's own embedding does not make, and the way from the last stage's
hidden states back to the words.

    x = P_in E[token] + T[position + offset],        logits = E P_out h

OPT (Zhang et al. 2022, arXiv 2205.01068) begins its table of positions two rows late; its 350M has words narrower than its layers.
"""
import contextlib

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.tensor_parallel import VocabParallelEmbedding, scatter_to_sequence_parallel_region
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_ext.config.schema import ModelConfig
from megatron_ext.config.sizes import embedding_size, position_rows
from megatron_ext.models.own import OwnParameters, matrix


class Embedding(LanguageModelEmbedding):
    """Tokens and positions [batch, seq] -> [seq (/ TP with sequence parallel), batch, hidden].

    Args:
        rows: of the word table, padding within.
    """

    def __init__(self, config, model: ModelConfig, rows: int, tp_group):
        learned = model.position_embedding == "learned"
        super().__init__(config, rows, position_rows(model), position_embedding_type="learned_absolute" if learned else "rope", tp_group=tp_group)
        self.offset = model.position_offset
        if embedding_size(model) != config.hidden_size:
            self.reduce_scatter_embeddings = False  # the projection reads whole embeddings; what it gives is scattered
            self.word_embeddings = NarrowWords(config, model, rows, tp_group)

    def forward(self, input_ids: Tensor, position_ids: Tensor, tokentype_ids=None) -> Tensor:
        return super().forward(input_ids, position_ids + self.offset if self.offset else position_ids, tokentype_ids)


class SummedEmbedding(LanguageModelEmbedding):
    """For sums of words with something beside them: the sum is split over the sequence, not the words alone."""

    def __init__(self, config, model: ModelConfig, rows: int, tp_group, *, other_positions: str, token_types: int = 0):
        kind = "learned_absolute" if model.position_embedding == "learned" else other_positions
        super().__init__(config, rows, model.max_sequence_length, position_embedding_type=kind, num_tokentypes=token_types, tp_group=tp_group)
        self.reduce_scatter_embeddings = self.word_embeddings.reduce_scatter_embeddings = False

    def finished(self, total: Tensor, norm: torch.nn.Module | None = None) -> Tensor:
        """total [batch, seq, hidden] -> [seq (/ TP with sequence parallel), batch, hidden], normed and with dropout."""
        x, parallel = total.transpose(0, 1).contiguous(), self.config.sequence_parallel
        if parallel:
            x = scatter_to_sequence_parallel_region(x, group=self.tp_group).clone()  # pipelines free what they have sent: no view
        x = x if norm is None else norm(x)
        with get_cuda_rng_tracker().fork() if parallel else contextlib.nullcontext():  # ranks hold different tokens
            return self.embedding_dropout(x)


class NarrowWords(VocabParallelEmbedding):
    """A table of `model.embedding_size`, its rows projected to the hidden size. The projection is whole on every tensor-parallel rank."""

    def __init__(self, config, model: ModelConfig, rows: int, tp_group):
        super().__init__(rows, embedding_size(model), init_method=config.embedding_init_method, config=config, tp_group=tp_group)
        self.project_in = torch.nn.Parameter(matrix(config, config.hidden_size, embedding_size(model)))

    def forward(self, input_: Tensor) -> Tensor:
        """[batch, seq] -> [batch, seq, hidden]."""
        return F.linear(super().forward(input_), self.project_in)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        own = make_sharded_tensors_for_checkpoint({"project_in": self.project_in}, prefix, {}, sharded_offsets, tp_group=self.tp_group,
                                                  dp_cp_group=metadata["dp_cp_group"])
        return super().sharded_state_dict(prefix, sharded_offsets, metadata) | own


class ProjectOut(OwnParameters):
    """[..., hidden] -> [..., embedding_size], before the head."""

    def __init__(self, config, model: ModelConfig, tp_group):
        super().__init__(config, tp_group)
        self.weight = torch.nn.Parameter(matrix(config, embedding_size(model), config.hidden_size))
        self.weight.sequence_parallel = config.sequence_parallel  # then each rank's gradient is of its part of the tokens

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight)
