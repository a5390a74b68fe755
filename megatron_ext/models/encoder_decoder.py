"""The encoder-decoder family: the Transformer (Vaswani et al. 2017, arXiv 1706.03762) and T5 (Raffel et al. 2019, arXiv 1910.10683), over pipeline stages.

    h = encoder(embedding_scale E[tokens] + P),   g = decoder(embedding_scale E[decoder tokens] + P; h),   logits = logit_scale g W^T

Positions P are learned or sinusoidal; relative ones are a bias of the scores instead (relative.py). megatron-core no longer splits such models over
pipeline stages: its schedules send one tensor from a stage to the next. Here the layers of both stacks are dealt to the stages as one list, and the
tensor on the wire is

    [encoder part; decoder part; tables of relative positions]      along the sequence

so that encoder stages pass the decoder's embeddings on, decoder stages the encoder's output, and all the tables, whose gradients come back to the
first stage by the same way: nothing is shared between stages but the tied word table.
"""
import math
from collections.abc import Callable

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_ext.config.schema import ModelConfig
from megatron_ext.config.sizes import layers as count_layers
from megatron_ext.models.decoder import Decoder
from megatron_ext.models.embedding import SummedEmbedding
from megatron_ext.models.layers import LayerConfig
from megatron_ext.models.relative import RelativePositions, bias_of
from megatron_ext.models.stack import Stack


class EncoderDecoder(Decoder):
    """One stage of an encoder-decoder; its arguments are the decoder's, and so are its head and its loss."""

    def __init__(self, model: ModelConfig, config: LayerConfig, groups: ProcessGroupCollection, **kwargs):
        super().__init__(model, config, groups, **kwargs)
        self.logit_scale, self.furthest = model.logit_scale, model.relative_distance
        self.received: Tensor | None = None
        self.tables: tuple[int, int] | None = None  # [heads / TP, buckets] of each table on the wire
        if model.position_embedding == "relative":
            self.tables = (model.num_attention_heads // groups.tp.size(), model.relative_buckets)
            if self.pre_process:
                self.encoder_positions = RelativePositions(config, model.relative_buckets, groups)
                self.decoder_positions = RelativePositions(config, model.relative_buckets, groups)

    @staticmethod
    def embeddings(model: ModelConfig, config: LayerConfig, groups: ProcessGroupCollection, padded_vocab_size: int) -> torch.nn.Module:
        return ScaledEmbedding(model, config, groups, padded_vocab_size)

    def make_layers(self, model: ModelConfig, config: LayerConfig, groups: ProcessGroupCollection) -> None:
        """This stage's share of both stacks; None where it has nothing of one."""
        stages = groups.pp.size() * (config.virtual_pipeline_model_parallel_size or 1)
        stage = (self.vp_stage or 0) * groups.pp.size() + groups.pp.rank()
        first, total = model.num_layers, count_layers(model)
        begin, end = total * stage // stages, total * (stage + 1) // stages
        self.encoder = self.decoder = None
        if begin < first:
            self.encoder = Stack(config, groups, first=begin, count=min(end, first) - begin, total=first, decoder=False)
        if end > first:
            start = max(begin, first)
            self.decoder = Stack(config, groups, first=start - first, count=end - start, total=total - first, decoder=True)

    def set_input_tensor(self, tensor) -> None:
        self.received = tensor[0] if isinstance(tensor, list) else tensor

    def wire_length(self, tokens: Tensor, decoder_tokens: Tensor) -> int:
        """Of the whole sequence: megatron-core's schedules divide it over the tensor-parallel ranks with sequence parallelism, the tables not."""
        ranks = self.tp_group.size() if self.config.sequence_parallel else 1
        return tokens.shape[1] + decoder_tokens.shape[1] + self._rows() * ranks

    def forward(self, tokens: Tensor, positions: Tensor, attention_mask: None = None, *, decoder_tokens: Tensor, labels: Tensor | None = None,
                loss_mask: Tensor | None = None, score: Callable[["EncoderDecoder", Tensor], object] | None = None,
                **_) -> Tensor | tuple[Tensor, Tensor]:
        """Runs this stage.

        Args:
            tokens, positions: [batch, seq] int64, of the encoder. decoder_tokens: [batch, decoder seq] int64, from the start word on.
            labels, loss_mask: [batch, decoder seq], what the decoder is to say.
            score: what the last stage gives instead, of itself and the last norm's output.
        Returns:
            The wire [wire, batch, hidden] on all stages but the last. There as the decoder: the loss with labels, else logits [batch, decoder seq, V/TP].
        """
        ranks = self.tp_group.size() if self.config.sequence_parallel else 1
        lengths = tokens.shape[1] // ranks, decoder_tokens.shape[1] // ranks
        if self.pre_process:
            read, said = self.embedding(tokens, positions), self.embedding(decoder_tokens, _places(decoder_tokens))
            tables = (self.encoder_positions(), self.decoder_positions()) if self.tables else (None, None)
        else:
            read, said, packed = self.received.split([*lengths, self._rows()])
            tables = self._unpacked(packed)
        if self.encoder is not None:
            read = self.encoder(read.contiguous(), None, self._bias(tables[0], tokens, causal=False))
        if self.decoder is not None:
            said = self.decoder(said.contiguous(), read.contiguous(), self._bias(tables[1], decoder_tokens, causal=True))
        if not self.post_process:
            return torch.cat((read, said, *self._packed(tables, read)))
        hidden = said if self.logit_scale == 1 else said * self.logit_scale
        if score is not None:
            return score(self, hidden)
        if labels is not None:
            return self.loss(hidden, labels, torch.ones_like(labels, dtype=torch.float32) if loss_mask is None else loss_mask)
        return self.output_layer(hidden, weight=self._shared_weight())[0].transpose(0, 1)

    # ---- tables of relative positions on the wire: numbers of the first row of the batch, in as many places as they fill

    def _rows(self) -> int:
        return 0 if self.tables is None else math.ceil(2 * self.tables[0] * self.tables[1] / self.config.hidden_size)

    def _packed(self, tables: tuple, like: Tensor) -> tuple[Tensor, ...]:
        if self.tables is None:
            return ()
        flat = torch.cat([table.flatten() for table in tables])
        rows = torch.nn.functional.pad(flat, (0, self._rows() * like.shape[2] - len(flat))).view(-1, 1, like.shape[2])
        return (torch.nn.functional.pad(rows, (0, 0, 0, like.shape[1] - 1)),)

    def _unpacked(self, packed: Tensor) -> tuple:
        if self.tables is None:
            return None, None
        heads, count = self.tables
        flat = packed[:, 0].flatten()[: 2 * heads * count]
        return tuple(flat.view(2, heads, count).unbind())

    def _bias(self, table: Tensor | None, tokens: Tensor, *, causal: bool) -> Tensor | None:
        return None if table is None else bias_of(table, tokens.shape[1], self.furthest, causal=causal)


def _places(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)


class ScaledEmbedding(SummedEmbedding):
    """Words times `embedding_scale`, with learned or sinusoidal positions, or none; the same for both stacks."""

    def __init__(self, model: ModelConfig, config: LayerConfig, groups: ProcessGroupCollection, padded_vocab_size: int):
        super().__init__(config, model, padded_vocab_size, groups.tp, other_positions="none")
        self.scale, self.sinusoidal = model.embedding_scale, model.position_embedding == "sinusoidal"

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """tokens, positions [batch, seq] -> [seq (/ TP with sequence parallel), batch, hidden]."""
        x = self.word_embeddings(input_ids)
        if self.scale != 1:
            x = x * self.scale
        if self.add_position_embedding:
            x = x + self.position_embeddings(position_ids)
        if self.sinusoidal:
            x = x + sinusoids(position_ids, self.config.hidden_size).to(x.dtype)
        return self.finished(x)


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """fp32 [..., width]: sin(p / 10000^(2i / width)) at place 2i, the cosine at 2i + 1 (Vaswani et al. 2017, section 3.5)."""
    angles = positions[..., None] * torch.exp(torch.arange(0, width, 2, device=positions.device) * (-math.log(10000.0) / width))
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)
