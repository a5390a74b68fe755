"""The encoder family: BERT and its kin, the decoder's stack with attention over the whole sequence and a head for masked words.

    x = LayerNorm?(word + position + type),   h = layers(x),   y = LayerNorm(gelu(h W + b)),   logits = y E^T + c

(Devlin et al. 2018, arXiv 1810.04805; c with `model.head_bias`; the head is that of its code, `get_masked_lm_output`). Logits are made for the masked tokens alone, 15 % of
all. E is the word table where the embeddings are tied.
"""
import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_ext.config.schema import ModelConfig
from megatron_ext.models.decoder import Decoder
from megatron_ext.models.embedding import SummedEmbedding
from megatron_ext.models.layers import LayerConfig
from megatron_ext.models.loss import vocab_parallel_cross_entropy
from megatron_ext.models.norm import Norm
from megatron_ext.models.own import OwnParameters, matrix


class Encoder(Decoder):
    """One stage of an encoder; its arguments and its call are the decoder's."""

    def __init__(self, model: ModelConfig, config: LayerConfig, groups: ProcessGroupCollection, **kwargs):
        super().__init__(model, config, groups, **kwargs)
        if self.post_process:
            self.transform = Transform(config, groups)

    @staticmethod
    def embeddings(model: ModelConfig, config: LayerConfig, groups: ProcessGroupCollection, padded_vocab_size: int) -> torch.nn.Module:
        return TypedEmbedding(model, config, groups, padded_vocab_size)

    def loss(self, hidden: Tensor, labels: Tensor, loss_mask: Tensor) -> tuple[Tensor, Tensor]:
        """As the decoder's. hidden may be of the masked tokens alone, [n, 1, hidden]; the losses of all others are given as 0."""
        masked = loss_mask.flatten().nonzero().flatten()
        if not self.config.sequence_parallel:  # with it each rank transforms its part of the sequence
            hidden = _chosen(hidden, masked)
        hidden = self._whole(self.transform(hidden))
        hidden = _chosen(hidden, masked).squeeze(1)
        targets = labels.flatten().index_select(0, masked)

        def score(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            logits = F.linear(hidden, weight, self.output_layer.bias)
            losses = vocab_parallel_cross_entropy(logits, targets, vocab_size=self.vocab_size, group=self.tp_group)
            counted = loss_mask.flatten().index_select(0, masked)
            everywhere = torch.zeros_like(loss_mask).flatten().index_copy(0, masked, losses.detach()).view_as(loss_mask)
            return (losses * counted).sum(), everywhere

        return self.output_layer(hidden, self._shared_weight(), score=score, adds_bias=True)


def _chosen(hidden: Tensor, index: Tensor) -> Tensor:
    """[seq, batch, hidden] -> [n, 1, hidden] of the tokens `index` [n], numbered row after row; what is of those alone already stays."""
    if hidden.shape[1] == 1 and hidden.shape[0] == len(index):
        return hidden
    return hidden.transpose(0, 1).flatten(0, 1).index_select(0, index).unsqueeze(1)


class TypedEmbedding(SummedEmbedding):
    """megatron-core's embeddings of words, positions and token types, with BERT's norm of the sum."""

    def __init__(self, model: ModelConfig, config: LayerConfig, groups: ProcessGroupCollection, padded_vocab_size: int):
        super().__init__(config, model, padded_vocab_size, groups.tp, other_positions="rope", token_types=model.token_types)
        self.norm = Norm(config, config.hidden_size, config.layernorm_epsilon) if model.embedding_norm else None

    def forward(self, input_ids: Tensor, position_ids: Tensor, token_types: Tensor | None = None) -> Tensor:
        """tokens, positions, token types [batch, seq] -> [seq (/ TP with sequence parallel), batch, hidden]."""
        x = self.word_embeddings(input_ids)
        if self.add_position_embedding:
            x = x + self.position_embeddings(position_ids)
        if self.tokentype_embeddings is not None:
            x = x + self.tokentype_embeddings(torch.zeros_like(input_ids) if token_types is None else token_types)
        return self.finished(x, self.norm)


class Transform(OwnParameters):
    """What stands before the logits of masked words: a layer as wide as the model, its activation, and a norm. The same on every tensor-parallel rank."""

    def __init__(self, config: LayerConfig, groups: ProcessGroupCollection):
        super().__init__(config, groups.tp)
        hidden = config.hidden_size
        self.weight = torch.nn.Parameter(matrix(config, hidden, hidden))
        self.bias = torch.nn.Parameter(torch.zeros_like(self.weight[0]))
        self.norm = Norm(config, hidden, config.layernorm_epsilon)
        # Over part of the sequence each rank's gradient is a part: megatron-core adds those that say so.
        self.weight.sequence_parallel = self.bias.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        return self.norm(self.config.activation_func(F.linear(hidden, self.weight, self.bias)))
