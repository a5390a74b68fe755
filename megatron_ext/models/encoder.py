"""The encoder family: BERT and its kin, the decoder's stack with attention over the whole sequence and a head for masked words.

    x = LayerNorm?(word + position + type),   h = layers(x),   y = LayerNorm(gelu(h W + b)),   logits = y E^T + c

(Devlin et al. 2018, arXiv 1810.04805; c with `model.head_bias`; the head is that of its code, `get_masked_lm_output`). Logits are made for the masked tokens alone, 15 % of
all. E is the word table where the embeddings are tied.
"""
import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_ext.config.schema import ModelConfig
from megatron_ext.models.decoder import Decoder
from megatron_ext.models.layers import LayerConfig
from megatron_ext.models.loss import vocab_parallel_cross_entropy
from megatron_ext.models.norm import Norm


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


class TypedEmbedding(LanguageModelEmbedding):
    """megatron-core's embeddings of words, positions and token types, with BERT's norm of the sum."""

    def __init__(self, model: ModelConfig, config: LayerConfig, groups: ProcessGroupCollection, padded_vocab_size: int):
        learned = model.position_embedding == "learned"
        super().__init__(config, padded_vocab_size, model.max_sequence_length, num_tokentypes=model.token_types, tp_group=groups.tp,
                         position_embedding_type="learned_absolute" if learned else "rope")
        self.norm = Norm(config, config.hidden_size, config.layernorm_epsilon) if model.embedding_norm else None
        # The sum of all three is split over the sequence, not the words alone.
        self.reduce_scatter_embeddings = self.word_embeddings.reduce_scatter_embeddings = False

    def forward(self, input_ids: Tensor, position_ids: Tensor, token_types: Tensor | None = None) -> Tensor:
        """tokens, positions, token types [batch, seq] -> [seq (/ TP with sequence parallel), batch, hidden]."""
        x = self.word_embeddings(input_ids)
        if self.add_position_embedding:
            x = x + self.position_embeddings(position_ids)
        if self.tokentype_embeddings is not None:
            x = x + self.tokentype_embeddings(torch.zeros_like(input_ids) if token_types is None else token_types)
        x = x.transpose(0, 1).contiguous()
        if self.config.sequence_parallel:
            x = scatter_to_sequence_parallel_region(x, group=self.tp_group)
        if self.norm is not None:
            x = self.norm(x)
        if not self.config.sequence_parallel:
            return self.embedding_dropout(x)
        with get_cuda_rng_tracker().fork():  # ranks hold different tokens
            return self.embedding_dropout(x)


class Transform(MegatronModule):
    """What stands before the logits of masked words: a layer as wide as the model, its activation, and a norm. The same on every tensor-parallel rank."""

    def __init__(self, config: LayerConfig, groups: ProcessGroupCollection):
        super().__init__(config=config)
        self.tp_group, hidden = groups.tp, config.hidden_size
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.empty(hidden, hidden, dtype=config.params_dtype, device=device))
        self.bias = torch.nn.Parameter(torch.zeros(hidden, dtype=config.params_dtype, device=device))
        self.norm = Norm(config, hidden, config.layernorm_epsilon)
        # Over part of the sequence each rank's gradient is a part: megatron-core adds those that say so.
        self.weight.sequence_parallel = self.bias.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        return self.norm(self.config.activation_func(F.linear(hidden, self.weight, self.bias)))

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {}, sharded_offsets, tp_group=self.tp_group, dp_cp_group=metadata["dp_cp_group"],
        )
