"""The decoder family: embeddings, a stack of megatron-core's transformer layers, a head over the vocabulary.

One pipeline stage (or one chunk of it) of a causal language model with learned or rotary positions. What varies between GPT-2, Llama and
their kin is configuration: `layers.py` says of what a layer is made. Parallelism comes in through `groups` alone.
"""
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from megatron.core.models.common.embeddings import RotaryEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from kernels.linear_cross_entropy import TokenScores, linear_cross_entropy, linear_cross_entropy_sum
from megatron_ext.config.schema import ModelConfig
from megatron_ext.config.sizes import embedding_size
from megatron_ext.models.embedding import Embedding, ProjectOut
from megatron_ext.models.fused import FusedLayer, rotary_tables
from megatron_ext.models.heads import Head, ValueHead
from megatron_ext.models.layers import LayerConfig, block_spec
from megatron_ext.models.likelihood import word_likelihoods
from megatron_ext.models.loss import vocab_parallel_cross_entropy
from megatron_ext.models.positions import scaled
from megatron_ext.models.truncated import Kept, truncated_scores


class Decoder(LanguageModule):
    """One stage of a decoder.

    Args:
        model: the sizes and choices.
        config: megatron-core's, made from `model` and the layout by `layers.transformer_config`.
        groups: the process groups that this model lives on.
        vocab_size: words that exist; padded_vocab_size: rows of the table.
        first, last: whether this stage embeds, and whether it holds the head.
        chunk: the virtual stage, with interleaving.
        head: vocabulary | scalar (a number a token: reward models and value functions).
    """

    def __init__(self, model: ModelConfig, config: LayerConfig, groups: ProcessGroupCollection, *,
                 vocab_size: int, padded_vocab_size: int, first: bool, last: bool, chunk: int | None = None, head: str = "vocabulary"):
        super().__init__(config=config, pg_collection=groups)
        self.model_type = ModelType.encoder_or_decoder  # megatron-core's schedules ask for it
        self.vocab_size = vocab_size
        self.pre_process, self.post_process, self.vp_stage = first, last, chunk
        self.scalar = head == "scalar"
        self.share_embeddings_and_output_weights = model.tied_embeddings and not self.scalar
        if first:
            self.embedding = self.embeddings(model, config, groups, padded_vocab_size)
        self.rotary = None if model.position_embedding != "rope" else RotaryEmbedding(
            config.kv_channels, model.rotary_percent, model.rotary_interleaved, rotary_base=model.rotary_base,
            use_cpu_initialization=config.use_cpu_initialization, cp_group=groups.cp,
        )
        if self.rotary is not None and model.rope_scaling_factor is not None:
            self.rotary.inv_freq = scaled(self.rotary.inv_freq, model)
        self.make_layers(model, config, groups)
        self.project_out = ProjectOut(config, model, groups.tp) if last and not self.scalar and embedding_size(model) != config.hidden_size else None
        if last and self.scalar:
            self.value_head = ValueHead(config, groups.tp)
        elif last:
            self.output_layer = Head(
                embedding_size(model), padded_vocab_size, config=config, init_method=config.init_method, bias=model.head_bias,
                skip_weight_param_allocation=first and model.tied_embeddings, tp_group=groups.tp,
            )
        if (first or last) and not self.scalar:
            self.setup_embeddings_and_output_layer()

    @staticmethod
    def embeddings(model: ModelConfig, config: LayerConfig, groups: ProcessGroupCollection, padded_vocab_size: int) -> torch.nn.Module:
        """What the first stage begins with."""
        return Embedding(config, model, padded_vocab_size, groups.tp)

    def make_layers(self, model: ModelConfig, config: LayerConfig, groups: ProcessGroupCollection) -> None:
        """This stage's layers, and the norm after the last."""
        stage = (self.vp_stage or 0) * groups.pp.size() + groups.pp.rank()
        self.decoder = TransformerBlock(config, block_spec(config, stage), post_layer_norm=model.block != "post_norm", pre_process=self.pre_process,
                                        post_process=self.post_process, pg_collection=groups, vp_stage=self.vp_stage)

    def wire_length(self, tokens: Tensor, **inputs: Tensor) -> int:
        """Length of the sequence that one stage sends to the next, of a micro-batch [batch, seq]."""
        return tokens.shape[1]

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

    def _rotary(self, positions: Tensor, per_row: bool) -> Tensor | None:
        """What the layers take: with `plain` layers the angles, else cosines and sines [2, seq, 1 or batch, d / 2] fp32."""
        if self.rotary is None or self.config.layers == "plain":
            return self.rotary_angles(positions, per_row)
        self.rotary.inv_freq = self.rotary.inv_freq.to(positions.device)
        return rotary_tables(positions.t() if per_row else positions[:1].t(), self.rotary.inv_freq)

    def forward(self, tokens: Tensor, positions: Tensor, attention_mask: Tensor | None = None, *, labels: Tensor | None = None,
                loss_mask: Tensor | None = None, packed: PackedSeqParams | None = None, rows_differ: bool = False,
                select: Tensor | None = None, score: Callable[["Decoder", Tensor], object] | None = None,
                needed: Tensor | None = None, **inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Runs this stage.

        Args:
            tokens, positions: [batch, seq] int64. `positions` is read on every stage. With context parallelism this rank's part of `seq`.
            attention_mask: bool, True hides, broadcast to [batch, heads, seq, keys]; None is causal.
            labels: [batch, seq] int64; loss_mask: [batch, seq] fp32, what each token's loss counts.
            packed: where the documents lie in the batch: no attention across them (`attention.pack`); needs no mask.
            rows_differ: the rows of `positions` are not all the same.
            select: [batch] int64; logits at this position of each row only.
            score: what the last stage gives instead, of itself and the last norm's output (see `loss`, `token_scores`, `values`).
            needed: int64 [n], rising: of the batch x seq tokens (row after row) those that `score` reads. Where the last layer can leave out the
                others, the last norm's output is [n, 1, hidden].
            inputs: what the embeddings of another family take beside tokens and positions (`Batch.inputs`).
        Returns:
            [seq, batch, hidden] on all stages but the last. There with labels the loss over the tokens that count, summed (a scalar), and of
            each token without its gradient [batch, seq], both fp32; else this rank's columns of the logits [batch, seq, V/TP]
            ([batch, 1, V/TP] with `select`).
        """
        hidden = self.embedding(tokens, positions, **inputs) if self.pre_process else None
        with self._last_layer_for(needed, positions.shape):
            hidden = self.decoder(hidden, attention_mask, rotary_pos_emb=self._rotary(positions, rows_differ), packed_seq_params=packed)
        if not self.post_process:
            return hidden
        if score is not None:
            return score(self, hidden)
        if self.scalar:
            return self.values(hidden)
        if labels is not None:
            return self.loss(hidden, labels, torch.ones_like(labels, dtype=torch.float32) if loss_mask is None else loss_mask)
        if select is not None:
            hidden = hidden.gather(0, select.view(1, -1, 1).expand(1, -1, hidden.shape[2]))
        logits, _ = self.output_layer(self._projected(hidden), weight=self._shared_weight())
        return logits.transpose(0, 1)

    def _projected(self, hidden: Tensor) -> Tensor:
        """What the head reads: the last norm's output, or where words are narrower a projection of it."""
        return hidden if self.project_out is None else self.project_out(hidden)

    def _shared_weight(self) -> Tensor | None:
        return self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None

    @contextmanager
    def _last_layer_for(self, needed: Tensor | None, shape: torch.Size) -> Iterator[None]:
        """Inside, the last layer finishes only the tokens needed. With sequence parallelism they lie on different ranks; what recomputes whole
        layers runs them again when nobody says any more which tokens were meant."""
        config, last = self.config, self.decoder.layers[-1] if self.post_process and len(self.decoder.layers) else None
        if needed is None or type(last) is not FusedLayer or config.layers != "fused" or not 0 < len(needed) < shape.numel() \
                or config.sequence_parallel or config.context_parallel_size > 1 or config.recompute_granularity == "full":
            yield
            return
        batch, length = shape
        last.needed = needed % length * batch + needed // length
        try:
            yield
        finally:
            last.needed = None

    def values(self, hidden: Tensor, *, select: Tensor | None = None) -> Tensor:
        """What a scalar head says of each token, fp32 [batch, seq]; with `select` [n] of those among the batch x seq tokens, fp32 [n].

        hidden: the last norm's output, of all tokens or of the selected alone.
        """
        values = self.value_head(hidden)
        return values if select is None else _selected(values.flatten(), select)

    def _whole(self, hidden: Tensor) -> Tensor:
        """All of the sequence. Each rank's gradient of it is that of its part of the vocabulary: these two add them up on the way back."""
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=self.tp_group)
        whole = copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)
        if whole.requires_grad:  # megatron-core 0.16 adds up a copy of a gradient that is not contiguous, and goes on with the rank's own
            whole.register_hook(lambda gradient: gradient.contiguous())
        return whole

    def _main_grad(self, weight: Tensor) -> Tensor | None:
        main_grad = getattr(weight, "main_grad", None) if self.config.gradient_accumulation_fusion and weight.requires_grad else None
        if main_grad is not None and main_grad.dtype != torch.float32:
            return None  # through autograd and the hooks of the gradient buffers, as any other
        return main_grad

    def token_scores(self, hidden: Tensor, labels: Tensor, *, select: Tensor | None = None, temperature: float = 1.0,
                     kept: Kept | None = None) -> TokenScores:
        """Loss, logprob and entropy of tokens, each differentiable, without holding logits.

        Args:
            hidden: the last norm's output, [seq (/ TP with sequence parallel), batch, hidden], or of the selected tokens alone, [n, 1, hidden].
            labels: [batch, seq] int64.
            select: int64 [n], rising, which of the batch x seq tokens (row after row) are scored; None = all.
            temperature: that they were sampled with.
            kept: the words that top-k and top-p left, for sampling that cuts; then logits of the selected tokens are held.
        Returns:
            fp32 [n] each, the same on every tensor-parallel rank.
        """
        hidden = self._whole(self._projected(hidden)).transpose(0, 1).flatten(0, 1)
        labels = labels.flatten()
        if select is not None:
            hidden, labels = _selected(hidden, select), labels.index_select(0, select)
        group = self.tp_group if self.tp_group.size() > 1 else None

        def score(hidden: Tensor, weight: Tensor) -> TokenScores:
            if kept is not None:
                return truncated_scores(hidden, weight, labels, kept, temperature=temperature, vocab_size=self.vocab_size, group=group)
            return linear_cross_entropy(
                hidden, weight, labels, temperature=temperature, vocab_size=self.vocab_size, group=group, reduce_hidden_grad=False,
                main_grad=self._main_grad(weight),
                backend="torch" if self.config.layers == "plain" else self.config.kernels.linear_cross_entropy,
            )

        return self.output_layer(hidden, self._shared_weight(), score=score)

    def likelihoods(self, hidden: Tensor, needed: Tensor, places: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of words behind tokens, and whether each is the most probable one. Without gradients.

        Args:
            hidden: the last norm's output, of all tokens or of those needed alone.
            needed: int64 [m], rising, what `forward` was given.
            places: int64 [n], which of the batch x seq tokens (row after row) a word is asked behind; each among `needed`, some perhaps twice.
            words: int64 [n].
        Returns:
            fp32 [n] and bool [n], the same on every tensor-parallel rank.
        """
        hidden = _selected(self._whole(self._projected(hidden)).transpose(0, 1).flatten(0, 1), needed)
        hidden = hidden.index_select(0, torch.searchsorted(needed, places))
        group, bias = self.tp_group if self.tp_group.size() > 1 else None, self.output_layer.bias
        return self.output_layer(
            hidden, self._shared_weight(), adds_bias=True,
            score=lambda hidden, weight: word_likelihoods(hidden, weight, bias, words, vocab_size=self.vocab_size, group=group),
        )

    def loss(self, hidden: Tensor, labels: Tensor, loss_mask: Tensor) -> tuple[Tensor, Tensor]:
        """The head and the cross-entropy. hidden [seq (/ TP with sequence parallel), batch, hidden], labels and loss_mask [batch, seq] ->
        (sum of loss_mask x loss, each token's loss [batch, seq] without gradient). The `plain` layers hold the logits, the others never do."""
        shared, hidden = self._shared_weight(), self._projected(hidden)
        if self.config.layers == "plain":
            logits, _ = self.output_layer(hidden, weight=shared)
            losses = vocab_parallel_cross_entropy(logits, labels.t(), vocab_size=self.vocab_size, group=self.tp_group).t()
            return (losses * loss_mask).sum(), losses.detach()
        hidden = self._whole(hidden)
        options = {
            "vocab_size": self.vocab_size, "group": self.tp_group if self.tp_group.size() > 1 else None, "reduce_hidden_grad": False,
            "backend": self.config.kernels.linear_cross_entropy,
        }

        def score(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            if not torch.is_grad_enabled():
                losses = linear_cross_entropy(hidden, weight, labels.t(), **options).loss.t()
                return (losses * loss_mask).sum(), losses
            main_grad = getattr(weight, "main_grad", None) if self.config.gradient_accumulation_fusion else None
            if main_grad is not None and main_grad.dtype != torch.float32:
                main_grad = None  # through autograd and the hooks of the gradient buffers, as any other
            total, losses = linear_cross_entropy_sum(hidden, weight, labels.t(), loss_mask.t(), main_grad=main_grad, **options)
            return total, losses.t()

        return self.output_layer(hidden, shared, score=score)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        if self.scalar:  # megatron-core's next in line looks for the head over the vocabulary
            return super(LanguageModule, self).sharded_state_dict(prefix, sharded_offsets, metadata)
        return super().sharded_state_dict(prefix, sharded_offsets, metadata)

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


def _selected(x: Tensor, select: Tensor) -> Tensor:
    """[tokens, ...] -> [n, ...], where x is not of those alone already."""
    return x if len(x) == len(select) else x.index_select(0, select)
