"""The dry run: any one rank of any layout, built and stepped on one core, without its weights and without the others.

Tensors are fake (shapes, dtypes and storages, no memory), the process group is fake (every collective returns at once), and all else is what would train:
this project's engine with megatron-core's schedules, gradient buffers and distributed optimizer. What a GPU would hold is read off the storages that live
(`ledger`). Three answers are those of a GPU: registered kernels with their temporaries inside (flash attention among them), a
loss that recomputes its logits, and pipeline outputs freed when they have been sent.

Not in it: what a kernel allocates inside (`memory.workspace`), and what the allocator and NCCL keep (`memory.margin`).
"""
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from unittest import mock

import torch
import torch.distributed as dist

from megatron_ext.config.geometry import Batch as Geometry
from megatron_ext.config.geometry import Grid
from megatron_ext.config.schema import Config
from megatron_ext.config.spans import spans_of
from megatron_ext.data.batches import Batch
from megatron_ext.parallel.layout import Layout
from megatron_ext.plan.ledger import Collective, Ledger
from megatron_ext.platform import Platform, install
from megatron_ext.train.engine import Engine
from megatron_ext.train.offload import state_bytes

_AXES = {"tp": "tensor", "cp": "context", "pp": "pipeline", "dp_cp": "data", "embd": "embedding", "intra_dist_opt": "all"}


@dataclass(frozen=True)
class Counted:
    """What was counted on a rank, in bytes.

    Attributes:
        parameters: elements.
        weights, gradients, optimizer: what is held all the time. other: buffers beside them.
        activations: the most that lived during the step beyond those.
        collectives: of one step with `micro_batches` micro-batches.
    """

    rank: int
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    other: int
    activations: int
    micro_batches: int
    collectives: tuple[Collective, ...]
    operations: int
    seconds: float


def dry_run(config: Config, rank: int, vocab: int, *, micro_batches: int | None = None) -> Counted:
    """Builds `rank` of `config.launch.ranks` ranks and runs a step.

    To be called in a process of its own, or in one that has no process group.

    Args:
        vocab: words that exist.
        micro_batches: of the step; None = as many as fill the rank's part of the pipeline, which is where memory is at its highest.
    """
    started = time.perf_counter()
    config = replace(config, launch=replace(config.launch, device="cpu"))
    with _world(rank, config.launch.ranks), _as_on_a_gpu():
        from torch._subclasses.fake_tensor import FakeTensorMode

        names: dict[str, str] = {}
        ledger = Ledger(lambda group: names.get(group.group_name, "other"), chosen=config.data.masked_share)
        with FakeTensorMode(allow_non_fake_inputs=True), ledger:
            engine = _engine(config, install("cpu"), vocab)
            for kind, name in _AXES.items():
                if (group := getattr(engine.groups, kind, None)) is not None:
                    names.setdefault(group.group_name, name)
            held = state_bytes(engine)
            before = ledger.restart_peak()
            count = micro_batches or filling(config, Grid.of(config).coordinates(rank)["pp"])
            batch = _batch(config)
            engine.step([batch] * count, lr=1e-4, step=0)
            return Counted(
                rank=rank, parameters=sum(p.numel() for chunk in engine.chunks for p in chunk.parameters()), **held, other=before - sum(held.values()),
                activations=ledger.peak - before, micro_batches=count, collectives=tuple(ledger.collectives()), operations=ledger.operations,
                seconds=time.perf_counter() - started,
            )


def filling(config: Config, pipeline_rank: int) -> int:
    """Micro-batches after which a pipeline rank's memory grows no more: as many as it has in flight, and one; never more than the step has."""
    pp, has = config.parallel.pp, Geometry.of(config).accumulation
    return min(has, 2 * pp if config.parallel.vpp else pp - pipeline_rank + 1)


def _engine(config: Config, platform: Platform, vocab: int) -> Engine:
    parallel = config.parallel
    layout = Layout(parallel.tp, parallel.pp, parallel.vpp, parallel.cp, parallel.sp, tuple(range(config.launch.ranks)))
    engine = Engine(config, layout, platform, vocab_size=vocab)
    engine.core_config.deallocate_pipeline_outputs = True
    for part in engine.optimizer.chained_optimizers:
        part.init_state_fn(part.optimizer, part.config)
    return engine


def _batch(config: Config) -> Batch:
    rows, length, data = config.train.micro_batch_size, config.data.sequence_length, config.data

    def whole(length: int) -> torch.Tensor:
        return torch.zeros(rows, length, dtype=torch.int64)

    if config.model.family == "encoder_decoder":
        spans = spans_of(length, data.masked_share, data.span_length)
        positions = torch.arange(spans.encoder).expand(rows, -1).contiguous()
        return Batch(whole(spans.encoder), whole(spans.decoder), torch.ones(rows, spans.decoder), positions, None,
                     inputs={"decoder_tokens": whole(spans.decoder)})
    inputs = {"token_types": whole(length)} if config.model.token_types else {}
    return Batch(whole(length), whole(length), torch.ones(rows, length), torch.arange(length).expand(rows, -1).contiguous(), None, inputs=inputs)


class _Biased(torch.autograd.Function):
    """Attention with a bias of the scores as a kernel for GPUs does it: it keeps its operands, its result and a number a row."""

    @staticmethod
    def forward(ctx, q, k, v, bias):
        out, rows = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[2], q.shape[0], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, bias, out, rows)
        return out

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:4])


@contextlib.contextmanager
def _world(rank: int, ranks: int) -> Iterator[None]:
    """A fake process group of which this process is one rank."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    install("cpu")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Inside, kernels take the path of a GPU, as far as storages go; parameters are replaced where torch would swap fake tensors, which it cannot."""
    import importlib

    from megatron.core.optimizer import clip_grads

    from megatron_ext.models import attention as core

    head, attention = (importlib.import_module(f"kernels.{name}") for name in ("linear_cross_entropy", "attention"))

    def flash(q, k, v, mask, causal, scale, dropout):  # queries, keys, values, result and a number a row are kept, with dropout too
        return attention._attention(q, k, v, mask, None, None, causal, scale)[0]

    def dropout(x, p=0.5, training=True, inplace=False):  # keeps a mask of bytes; the CPU's keeps one of x's dtype
        return torch.native_dropout(x, p, training)[0] if training and p else x

    def biased(q, k, v, bias, *, scale, dropout):
        return _Biased.apply(q, k, v, bias)

    with (
        mock.patch.object(core, "biased_attention", biased),
        mock.patch.object(torch.compiler, "is_compiling", lambda: True),  # registered ops: one operation each, saving what they save on a GPU
        mock.patch.object(head, "_recomputes", lambda *_: True),
        mock.patch.object(attention, "_sdpa", flash),
        mock.patch.object(clip_grads, "l2_norm_impl", lambda *_: (torch.ones(1), None)),  # a reduction, in a kernel; the CPU's squares a copy
        mock.patch.object(torch.nn.functional, "dropout", dropout),
        mock.patch.object(dist, "all_gather_object", _gather_own),
        mock.patch.object(torch.nn.Module, "_apply", _apply),
    ):
        yield


def _gather_own(objects: list, item: object, group=None) -> None:
    objects[:] = [item] * len(objects)


def _apply(module: torch.nn.Module, fn, recurse: bool = True) -> torch.nn.Module:
    for child in module.children() if recurse else ():
        child._apply(fn)
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        with torch.no_grad():
            value = fn(parameter)
        if value is not parameter:
            made = torch.nn.Parameter(value, parameter.requires_grad)
            made.__dict__.update(parameter.__dict__)
            module._parameters[name] = made
    for name, held in module._buffers.items():
        if held is not None:
            module._buffers[name] = fn(held)
    return module
