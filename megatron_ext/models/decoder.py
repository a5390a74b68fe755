"""The decoder family: embeddings, a stack of megatron-core's transformer layers, a head over the vocabulary.

One pipeline stage (or one chunk of it) of a causal language model with learned or rotary positions. What varies between GPT-2, Llama and
their kin is configuration: `layers.py` says of what a layer is made. Parallelism comes in through `groups` alone.
"""
import torch
from megatron.core.models.common.embeddings import RotaryEmbedding
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ext.config.schema import ModelConfig
from megatron_ext.models.layers import block_spec
from megatron_ext.models.loss import vocab_parallel_cross_entropy


class Decoder(LanguageModule):
    """One stage of a decoder.

    Args:
        model: the sizes and choices.
        config: megatron-core's, made from `model` and the layout by `layers.transformer_config`.
        groups: the process groups that this model lives on.
        vocab_size: words that exist; padded_vocab_size: rows of the table.
        first, last: whether this stage embeds, and whether it holds the head.
        chunk: the virtual stage, with interleaving.
    """

    def __init__(self, model: ModelConfig, config: TransformerConfig, groups: ProcessGroupCollection, *,
                 vocab_size: int, padded_vocab_size: int, first: bool, last: bool, chunk: int | None = None):
        super().__init__(config=config, pg_collection=groups)
        self.model_type = ModelType.encoder_or_decoder  # megatron-core's schedules ask for it
        self.vocab_size = vocab_size
        self.pre_process, self.post_process, self.vp_stage = first, last, chunk
        self.share_embeddings_and_output_weights = model.tied_embeddings
        learned = model.position_embedding == "learned"
        if first:
            self.embedding = LanguageModelEmbedding(
                config, padded_vocab_size, model.max_sequence_length,
                position_embedding_type="learned_absolute" if learned else "rope", tp_group=groups.tp,
            )
        self.rotary = None if learned else RotaryEmbedding(
            config.kv_channels, model.rotary_percent, model.rotary_interleaved, rotary_base=model.rotary_base,
            rope_scaling=model.rope_scaling_factor is not None, rope_scaling_factor=model.rope_scaling_factor or 1.0,
            use_cpu_initialization=config.use_cpu_initialization, cp_group=groups.cp,
        )
        self.decoder = TransformerBlock(
            config, block_spec(config), pre_process=first, post_process=last, pg_collection=groups, vp_stage=chunk,
        )
        if last:
            self.output_layer = ColumnParallelLinear(
                config.hidden_size, padded_vocab_size, config=config, init_method=config.init_method, bias=False,
                skip_weight_param_allocation=first and model.tied_embeddings, tp_group=groups.tp,
            )
        if first or last:
            self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, tensor) -> None:
        """What the previous stage sent, [seq, batch, hidden]; called by the pipeline schedules."""
        self.decoder.set_input_tensor(tensor[0] if isinstance(tensor, list) else tensor)

    def rotary_angles(self, positions: Tensor, per_row: bool) -> Tensor | None:
        """Angles for positions [batch, seq]: [seq, 1, 1, d], or [seq, batch, 1, d] where the rows differ."""
        if self.rotary is None:
            return None
        inverse = self.rotary.inv_freq = self.rotary.inv_freq.to(positions.device)
        rows = positions.t() if per_row else positions[:1].t()
        angles = rows.float()[:, :, None, None] * inverse
        if self.config.rotary_interleaved:
            return angles.repeat_interleave(2, dim=-1)
        return torch.cat((angles, angles), dim=-1)

    def forward(self, tokens: Tensor, positions: Tensor, attention_mask: Tensor | None = None, *, labels: Tensor | None = None,
                rows_differ: bool = False, select: Tensor | None = None) -> Tensor:
        """Runs this stage.

        Args:
            tokens, positions: [batch, seq] int64. `positions` is read on every stage.
            attention_mask: bool, True hides, broadcast to [batch, heads, seq, keys]; None is causal.
            labels: [batch, seq] int64.
            rows_differ: the rows of `positions` are not all the same.
            select: [batch] int64; logits at this position of each row only.
        Returns:
            [seq, batch, hidden] on all stages but the last; there the loss of each token [batch, seq] fp32 with labels, else this
            rank's columns of the logits [batch, seq, V/TP] ([batch, 1, V/TP] with `select`).
        """
        hidden = self.embedding(tokens, positions) if self.pre_process else None
        hidden = self.decoder(hidden, attention_mask, rotary_pos_emb=self.rotary_angles(positions, rows_differ))
        if not self.post_process:
            return hidden
        if select is not None:
            hidden = hidden.gather(0, select.view(1, -1, 1).expand(1, -1, hidden.shape[2]))
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits, _ = self.output_layer(hidden, weight=weight)
        if labels is None:
            return logits.transpose(0, 1)
        loss = vocab_parallel_cross_entropy(logits, labels.t(), vocab_size=self.vocab_size, group=self.tp_group)
        return loss.t()

    def tie_embeddings_and_output_weights_state_dict(self, sharded_state_dict, output_layer_weight_key, first_stage_word_emb_key,
                                                     metadata=None, **_) -> None:
        """As megatron-core's, which takes the replica's number from a global."""
        if not self.post_process or self.pre_process:
            return
        from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint

        del sharded_state_dict[output_layer_weight_key]
        sharded_state_dict[output_layer_weight_key] = make_tp_sharded_tensor_for_checkpoint(
            tensor=self.shared_embedding_or_output_weight(),
            key=first_stage_word_emb_key,
            replica_id=(1, 0, self.pg_collection.dp_cp.rank()),  # the copy on the last stage; the first stage's is written
            allow_shape_mismatch=True,
            tp_group=self.tp_group,
            dp_cp_group=self.pg_collection.dp_cp,
        )
