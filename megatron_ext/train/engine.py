"""One model with its optimizer in a layout: step, evaluate, and the state that a checkpoint holds.

forward, backward, pipeline schedules, gradient buffers and the distributed optimizer are megatron-core's. What is decided here: losses are
sums over tokens and gradients are divided by the tokens of the *global* batch, so that nothing depends on how the batch is cut into
micro-batches and data ranks; and a step whose loss or gradient is not finite changes nothing, on any rank.
"""
import math
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.utils import get_model_config

from megatron_ext.checkpoint.optimizer import optimizer_state
from megatron_ext.config.schema import Config
from megatron_ext.data.batches import Batch
from megatron_ext.models.attention import document_mask, pack
from megatron_ext.models.backends import check_backends
from megatron_ext.models.build import build_model
from megatron_ext.models.fp8 import update_scales
from megatron_ext.models.layers import DTYPES
from megatron_ext.parallel.groups import build_groups
from megatron_ext.parallel.layout import Layout
from megatron_ext.parallel.seeds import seed_ranks
from megatron_ext.platform import Platform
from megatron_ext.platform.megatron import default_group
from megatron_ext.train.objective import Objective, objective_of

LOWEST_SCALE = 1.0  # of fp16's losses


@dataclass(frozen=True)
class StepResult:
    """What a step did. The same on every rank of the layout.

    Attributes:
        loss: mean over what the objective counts (tokens; pairs, ...).
        tokens: how many count in the global batch.
        grad_norm: global norm before clipping; None where fp16's scaler found an overflow.
        applied: False when loss or gradient was not finite and the weights stayed as they were.
        searching: not applied because fp16's loss scale is still too high: it comes down by itself, nothing is wrong.
        sums: the objective's numbers, over the global batch.
    """

    loss: float
    tokens: int
    grad_norm: float | None
    applied: bool
    searching: bool = False
    sums: dict[str, float] = field(default_factory=dict)


class Engine:
    """A model chunk list, its optimizer and its process groups on this rank.

    Args:
        config: the run's.
        layout: how `layout.ranks` are arranged; several engines of different layouts may live on the same ranks.
        vocab_size: words that exist.
        train: False leaves out gradients and optimizer.
        head: vocabulary | scalar (see models/heads.py).
    """

    def __init__(self, config: Config, layout: Layout, platform: Platform, *, vocab_size: int, train: bool = True, head: str = "vocabulary"):
        self.config, self.layout, self.platform, self.vocab_size = config, layout, platform, vocab_size
        self.objective = objective_of(config.model)
        check_backends(config.kernels, config.precision, platform.device.type)
        self.groups = build_groups(layout, config.launch.timeout)
        # The stream must exist before the first forward pass; with dropout each step seeds it anew.
        seed_ranks(self.groups, seed=config.train.seed, step=0)
        self.chunks = build_model(
            config.model, config.parallel, config.precision, self.groups,
            vocab_size=vocab_size, seed=config.train.seed, device=platform.device, kernels=config.kernels, accumulate=train,
            head=head, lora=config.lora,
        )
        self.optimizer = None
        self._dropout = config.model.hidden_dropout > 0 or config.model.attention_dropout > 0
        if train:
            self._prepare_training()
        self.core_config = get_model_config(self.chunks[0])
        self._schedule = get_forward_backward_func(pp_size=layout.pp, vp_size=layout.vpp)
        self._communicator = P2PCommunicator(pp_group=self.groups.pp, config=self.core_config) if layout.pp > 1 else None

    def _prepare_training(self) -> None:
        parallel, optim, precision = self.config.parallel, self.config.optim, self.config.precision
        core = get_model_config(self.chunks[0])
        gather = parallel.distributed_optimizer and parallel.overlap_param_gather and parallel.overlap_grad_reduce
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=precision.grad_reduce_in_fp32,
            use_distributed_optimizer=parallel.distributed_optimizer,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=gather,
        )
        self.chunks = [
            DistributedDataParallel(core, settings, chunk, disable_bucketing=index > 0, pg_collection=self.groups)
            for index, chunk in enumerate(self.chunks)
        ]
        if parallel.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in self.chunks]
            core.no_sync_func = no_sync if self.layout.vpp else no_sync[0]
        core.finalize_model_grads_func = finalize_model_grads
        wanted = OptimizerConfig(
            optimizer="adam", lr=optim.lr, min_lr=optim.min_lr, weight_decay=optim.weight_decay,
            adam_beta1=optim.beta1, adam_beta2=optim.beta2, adam_eps=optim.eps, clip_grad=optim.clip,
            bf16=precision.dtype == "bf16", fp16=precision.dtype == "fp16", params_dtype=DTYPES[precision.dtype],
            initial_loss_scale=precision.initial_loss_scale, min_loss_scale=LOWEST_SCALE, loss_scale_window=precision.loss_scale_window,
            use_distributed_optimizer=parallel.distributed_optimizer, overlap_param_gather=gather,
        )
        with default_group(self.groups.intra_dist_opt):
            self.optimizer = get_megatron_optimizer(wanted, self.chunks, use_gloo_process_groups=False, pg_collection=self.groups)
        core.grad_scale_func = self.optimizer.scale_loss if precision.dtype == "fp16" else None

    # ---------------------------------------------------------------- forward and backward

    def _forward_step(self, objective: Objective, collecting: bool):
        def forward_step(batches, model):
            batch = next(batches)
            mask = packed = None
            if batch.documents is not None and self.core_config.layers == "plain":
                mask = document_mask(batch.documents, causal=self.core_config.causal)
            elif batch.documents is not None:
                packed = pack(batch.documents)
            part = batch.context_part(self.groups.cp.rank(), self.groups.cp.size())
            out = model(
                part.tokens, part.position_ids, mask, packed=packed, rows_differ=self.config.data.reset_positions or batch.documents is not None,
                score=lambda decoder, hidden: objective.score(decoder, hidden, part), needed=objective.needed(part), **part.inputs,
            )

            def loss(output):
                if collecting:
                    nothing = torch.zeros((), device=self.platform.device)
                    return nothing, torch.ones((), dtype=torch.int, device=self.platform.device), {"scores": output}
                total, count, numbers = objective.loss(output, part)
                count = torch.as_tensor(count, dtype=torch.int, device=total.device)
                # Losses share storage with what the schedule scales afterwards: what is kept is a copy.
                kept = [total.detach(), count, *(numbers[name].detach() for name in objective.names)]
                return total, count, {"numbers": torch.stack([number.double() for number in kept])}

            return out, loss

        return forward_step

    def _schedule_run(self, batches: Sequence[Batch], objective: Objective, *, forward_only: bool, collecting: bool = False) -> list[dict]:
        """Forward (and backward) over this data rank's micro-batches; what each gave, on the last stage."""
        batches = [batch.to(self.platform.device) for batch in batches]
        iterators = [iter(batches) for _ in self.chunks]
        return self._schedule(
            forward_step_func=self._forward_step(objective, collecting),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks,
            num_microbatches=len(batches),
            seq_length=self.models[0].wire_length(batches[0].tokens, **batches[0].inputs),
            micro_batch_size=batches[0].tokens.shape[0],
            forward_only=forward_only,
            pg_collection=self.groups,
            p2p_communicator=self._communicator,
        )

    def _run(self, batches: Sequence[Batch], objective: Objective, *, forward_only: bool) -> tuple[float, int, dict[str, float]]:
        """The global sum of losses, the global count, and the objective's numbers over the global batch."""
        entries = self._schedule_run(batches, objective, forward_only=forward_only)
        largest = [name.endswith("_max") for name in objective.names]
        sums = torch.zeros(2 + len(largest), dtype=torch.float64, device=self.platform.device)
        tops = torch.full_like(sums, float("-inf"))
        if self.groups.tp.rank() == 0:  # of the last stage: elsewhere the list is empty
            for entry in entries:
                sums += entry["numbers"]
                tops = torch.maximum(tops, entry["numbers"])
        dist.all_reduce(sums, group=self.groups.intra_dist_opt)  # every rank of the layout: all have to decide alike
        if any(largest):
            dist.all_reduce(tops, dist.ReduceOp.MAX, group=self.groups.intra_dist_opt)
        loss, count, *sums = sums.tolist()
        tops = tops.tolist()[2:]
        return loss, int(count), {name: top if is_top else total for name, total, top, is_top in zip(objective.names, sums, tops, largest)}

    def step(self, batches: Sequence[Batch], *, lr: float, step: int, objective: Objective | None = None) -> StepResult:
        """One optimizer step.

        Args:
            batches: this data rank's micro-batches.
            lr: learning rate of this step.
            step: number of the step from 0; dropout depends on it.
            objective: what is minimised; None = what the model's family is pretrained on.
        """
        result = self._step(batches, objective or self.objective, lr=lr, step=step)
        update_scales(self.chunks, self.groups, applied=result.applied)
        return result

    def _step(self, batches: Sequence[Batch], objective: Objective, *, lr: float, step: int) -> StepResult:
        if self._dropout:
            seed_ranks(self.groups, seed=self.config.train.seed, step=step)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        total, tokens, sums = self._run(batches, objective, forward_only=False)
        loss = total / max(tokens, 1)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_mult", 1.0)
        scale = float(self.optimizer.get_loss_scale())
        if self.optimizer.prepare_grads():
            return StepResult(loss, tokens, None, False, searching=math.isfinite(loss) and scale > LOWEST_SCALE, sums=sums)
        norm = float(self.optimizer.get_grad_norm())
        if not (math.isfinite(norm) and math.isfinite(loss)):
            return StepResult(loss, tokens, norm, False, sums=sums)
        for part in self.optimizer.chained_optimizers:
            parameters = part.get_parameters()
            if parameters and self.config.optim.clip > 0:
                clip_grad_by_total_norm_fp32(parameters, self.config.optim.clip, norm)
        return StepResult(loss, tokens, norm, bool(self.optimizer.step_with_ready_grads()), sums=sums)

    @contextmanager
    def complete_weights(self):
        """Inside, every rank holds the newest weights: with overlap they are gathered only by the next forward pass."""
        hooked = [chunk for chunk in self.chunks if getattr(chunk, "use_forward_hook", False)]
        for chunk in hooked:
            chunk.disable_forward_pre_hook(param_sync=True)
        try:
            yield
        finally:
            for chunk in hooked:
                chunk.enable_forward_pre_hook()

    @contextmanager
    def _quiet(self):
        """Inside, no gradients and no dropout, on the newest weights."""
        with torch.no_grad(), self.complete_weights():
            for chunk in self.chunks:
                chunk.eval()
            try:
                yield
            finally:
                for chunk in self.chunks:
                    chunk.train()

    def evaluate(self, batches: Sequence[Batch], objective: Objective | None = None) -> tuple[float, int]:
        """Sum of losses (nats) and number of tokens over all data ranks, without dropout. `batches`: this data rank's."""
        return self.measure(batches, objective or self.objective)[:2]

    def measure(self, batches: Sequence[Batch], objective: Objective) -> tuple[float, int, dict[str, float]]:
        """As `evaluate`, with the objective's numbers."""
        with self._quiet():
            return self._run(batches, objective, forward_only=True)

    def collect(self, batches: Sequence[Batch], objective: Objective) -> list:
        """What `objective.score` gives for each of this data rank's micro-batches, without gradients and dropout: a list on the ranks of
        the last pipeline stage (the same on its tensor-parallel ranks), elsewhere empty."""
        with self._quiet():
            return [entry["scores"] for entry in self._schedule_run(batches, objective, forward_only=True, collecting=True)]

    # ---------------------------------------------------------------- state

    @property
    def models(self) -> list[torch.nn.Module]:
        """The bare `Decoder` chunks, without the wrappers for data parallelism and precision."""
        bare = []
        for chunk in self.chunks:
            while hasattr(chunk, "module"):
                chunk = chunk.module
            bare.append(chunk)
        return bare

    @property
    def _names(self) -> list[str]:
        """What the chunks are called in the state."""
        return ["model"] if len(self.chunks) == 1 else [f"model{i}" for i in range(len(self.chunks))]

    def sharded_state(self, *, loading: bool, weights_only: bool = False, sharding: str | None = None) -> dict:
        """The sharded state dict, {"model": ..., "optimizer": ...} ("model0", "model1", ... with interleaving).

        Args:
            loading: made to be filled, not to be written.
            weights_only: leave the optimizer out.
            sharding: format of the optimizer's state, that of the checkpoint when loading; None = the configuration's.
        """
        metadata = {"distrib_optim_sharding_type": sharding or self.config.checkpoint.format, "dp_cp_group": self.groups.dp_cp}
        state = {name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in zip(self._names, self.models)}
        if not weights_only and self.optimizer is not None:
            if loading:
                for part in self.optimizer.chained_optimizers:
                    part.init_state_fn(part.optimizer, part.config)
                optimizer = self.optimizer.sharded_state_dict(state, is_loading=True, metadata=metadata)
            else:
                optimizer = optimizer_state(self.optimizer, state, metadata)
            state = state | {"optimizer": optimizer}
        return state

    @torch.no_grad()  # dp_reshardable copies into views of leaf parameters (fp32)
    def load_state(self, state: dict) -> None:
        """Takes what `checkpoint.load` filled into `sharded_state(loading=True)`."""
        for name, chunk in zip(self._names, self.models):
            chunk.load_state_dict(state[name])
        if "optimizer" in state:
            self.optimizer.load_state_dict(state["optimizer"])
        elif self.optimizer is not None:
            self.optimizer.reload_model_params()  # the fp32 main weights are copies
