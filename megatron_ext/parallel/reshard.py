"""The weights of one layout in another, on the same ranks: a policy that trains in TP2 x PP2 writes its rollouts as four replicas.

Once, every rank tells the others which boxes of which global tensors its parts of the source and of the target are: megatron-core's
sharded state dict says so, gate and up-projection of gated units being boxes of their own. A target box is the union of its overlaps with
source boxes, and each overlap comes from one of the ranks that hold it: the target's rank itself, else one on its host, else whichever
has least to send so far, the largest first. Every rank computes this plan from the same boxes, so that nothing is negotiated when weights
move.

A move is made of messages of at most `chunk` bytes, each packed from many overlaps or cut out of one. In turn k = 1 .. N-1 rank i sends
to rank i + k and receives from rank i - k: a rank holds two messages at most besides its models, and none waits in a circle, since all go
through the turns in one order and both ends of a pair know how many messages it has. No whole tensor is gathered, and what a rank has
never travels.

Rows that pad a vocabulary are as many as a layout needs. Those of the source do not travel, those of the target are zero.
"""
import math
import socket
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import Tensor

from megatron_ext.models.fp8 import Fp8Linear
from megatron_ext.models.initialise import VOCABULARY, sharded_tensors

if TYPE_CHECKING:
    from megatron_ext.train.engine import Engine

CHUNK = 64 << 20  # bytes: long enough for the full bandwidth of any network
WIDEST = 16  # bytes an element may have


@dataclass(frozen=True)
class Box:
    """Elements [low, low + extent) of a global tensor. `shape`: of all of it; its first `lead` axes number layers, and a box is in one."""

    key: str
    shape: tuple[int, ...]
    low: tuple[int, ...]
    extent: tuple[int, ...]
    lead: int
    dtype: torch.dtype

    @property
    def tensor(self) -> tuple:
        """What boxes have in common that may overlap."""
        return self.key, self.low[: self.lead]


@dataclass(frozen=True)
class Copy:
    """Elements [low, low + extent) of a global tensor go from the sender's box number `source` to the receiver's number `target`."""

    sender: int
    receiver: int
    source: int
    target: int
    low: tuple[int, ...]
    extent: tuple[int, ...]
    size: int  # bytes
    dtype: torch.dtype


@dataclass(frozen=True)
class Moved:
    """Bytes that a rank sends to others, receives from others, and copies at home."""

    sent: int
    received: int
    local: int


def plan(source: Sequence[Sequence[Box]], target: Sequence[Sequence[Box]], hosts: Sequence[str]) -> list[Copy]:
    """What goes where. A function of what all ranks know, hence the same on all of them.

    Args:
        source, target: of each rank its boxes.
        hosts: of each rank the machine that it is on.
    Raises:
        ValueError: not one model: a tensor that one of the two lacks, another shape or dtype, a part that nobody holds.
    """
    _same_model(source, target)
    holders: dict[tuple, dict[tuple, dict[int, int]]] = defaultdict(dict)  # tensor -> (low, extent) -> rank -> number
    for rank, boxes in enumerate(source):
        for number, box in enumerate(boxes):
            holders[box.tensor].setdefault((box.low, box.extent), {}).setdefault(rank, number)
    wanted = [(rank, number, box) for rank, boxes in enumerate(target) for number, box in enumerate(boxes)]
    wanted.sort(key=lambda one: (-math.prod(one[2].extent), one[2].key, one[2].low, one[:2]))
    load, copies = [0] * len(source), []
    for rank, number, box in wanted:
        covered = 0
        for (low, extent), ranks in holders[box.tensor].items():
            start = tuple(max(a, b) for a, b in zip(low, box.low))
            shared = tuple(min(a + n, b + m) - s for a, n, b, m, s in zip(low, extent, box.low, box.extent, start))
            if min(shared, default=1) <= 0:
                continue
            sender = rank if rank in ranks else min(ranks, key=lambda one: (hosts[one] != hosts[rank], load[one], one))
            size = math.prod(shared) * box.dtype.itemsize
            copies.append(Copy(sender, rank, ranks[sender], number, start, shared, size, box.dtype))
            covered += math.prod(shared)
            load[sender] += size if sender != rank else 0
        if covered != math.prod(box.extent):
            raise ValueError(f"{box.key}: of the {math.prod(box.extent)} elements from {box.low} on, the source holds {covered}")
    return copies


def _same_model(source: Sequence[Sequence[Box]], target: Sequence[Sequence[Box]]) -> None:
    have, want = ({box.key: (box.shape, box.dtype) for boxes in side for box in boxes} for side in (source, target))
    for side, others, name in ((have, want, "target"), (want, have, "source")):
        if missing := sorted(side.keys() - others.keys()):
            raise ValueError(f"weights move between layouts of one model, but the {name} has no {', '.join(missing[:4])}")
    for key in sorted(have):
        if have[key] != want[key]:
            raise ValueError(f"weights move between layouts of one model, but {key} is {have[key]} in the source and {want[key]} there")


def cut(low: tuple[int, ...], extent: tuple[int, ...], most: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The box [low, low + extent) as boxes of at most `most` elements, in order: (low, extent) of each."""
    size = math.prod(extent)
    if size <= most:
        yield low, extent
        return
    axis = next(axis for axis, n in enumerate(extent) if n > 1)
    rows = max(1, most * extent[axis] // size)
    for start in range(0, extent[axis], rows):
        part = (*extent[:axis], min(rows, extent[axis] - start), *extent[axis + 1 :])
        yield from cut((*low[:axis], low[axis] + start, *low[axis + 1 :]), part, most)


def messages(copies: Iterable[Copy], chunk: int) -> list[list[Copy]]:
    """The copies of one pair of ranks, cut and packed into messages of at most `chunk` bytes. Wide elements come first, so that each lies
    at a multiple of its own size."""
    packed, room = [], 0
    for one in sorted(copies, key=lambda one: -one.dtype.itemsize):
        width = one.dtype.itemsize
        for low, extent in cut(one.low, one.extent, chunk // width):
            size = math.prod(extent) * width
            if size > room:
                packed.append([])
                room = chunk
            packed[-1].append(Copy(one.sender, one.receiver, one.source, one.target, low, extent, size, one.dtype))
            room -= size
    return packed


class _Part:
    """This rank's part of a model: its boxes, and the tensors that they are (views of the parameters)."""

    def __init__(self, engine: "Engine"):
        self.boxes: list[Box] = []
        self._tensors: list[Tensor] = []
        self._padding: list[Tensor] = []
        state = engine.sharded_state(loading=False, weights_only=True)
        for value in nested_values(state):
            if isinstance(value, ShardedObject) and not _is_empty(value.data):
                raise ValueError(f"{value.key} is part of the model and no tensor: layouts of such layers cannot exchange their weights")
        for tensor in sharded_tensors(state):
            lead = tensor.prepend_axis_num
            shape, low, extent = list(tensor.global_shape), tuple(tensor.global_offset), [1] * lead + list(tensor.local_shape)
            data = tensor.data.detach()[(None,) * lead]
            if tensor.key.endswith(VOCABULARY):  # rows of words, and padding behind them
                words = min(extent[lead], max(0, engine.vocab_size - low[lead]))
                self._padding.append(data.narrow(lead, words, extent[lead] - words))
                shape[lead], extent[lead] = engine.vocab_size, words
            self.boxes.append(Box(sys.intern(tensor.key), tuple(shape), low, tuple(extent), lead, data.dtype))
            self._tensors.append(data)

    def view(self, number: int, one: Copy) -> Tensor:
        return self._tensors[number][tuple(slice(a - b, a - b + n) for a, b, n in zip(one.low, self.boxes[number].low, one.extent))]

    def blank_padding(self) -> None:
        for rows in self._padding:
            rows.zero_()


class Reshard:
    """Moves the weights of one engine to another. Made once; `run` whenever the source has changed. Both are collective.

    Args:
        source, target: one model in two layouts of the same ranks. (In the same layout all is copied at home.)
        chunk: bytes of the largest message.
    Attributes:
        moves: what `run` moves on this rank.
    Raises:
        ValueError: other ranks, not one model, layers with state that is no tensor (Transformer Engine's FP8 recipes).
    """

    def __init__(self, source: "Engine", target: "Engine", *, chunk: int = CHUNK):
        if source.layout.ranks != target.layout.ranks:
            raise ValueError(f"weights move on the same ranks; the source is on {source.layout.ranks}, the target on {target.layout.ranks}")
        if chunk < WIDEST:
            raise ValueError(f"chunk must be at least {WIDEST} bytes, got {chunk}")
        self._source, self._target, self._chunk = source, target, chunk
        self._group, self._ranks = source.groups.intra_dist_opt, source.layout.ranks
        self._me = self._ranks.index(dist.get_rank())
        self._from, self._to = _Part(source), _Part(target)
        everyone: list = [None] * len(self._ranks)
        dist.all_gather_object(everyone, (self._from.boxes, self._to.boxes, socket.gethostname()), group=self._group)
        copies = [one for one in plan(*zip(*everyone)) if self._me in (one.sender, one.receiver)]
        self._local = [one for one in copies if one.sender == one.receiver]
        sent, received = defaultdict(list), defaultdict(list)
        for one in copies:
            if one.sender != one.receiver:
                side, other = (sent, one.receiver) if one.sender == self._me else (received, one.sender)
                side[other].append(one)
        self._sent, self._received = ({other: messages(some, chunk) for other, some in side.items()} for side in (sent, received))
        self.moves = Moved(*(sum(one.size for some in side for one in some) for side in (sent.values(), received.values(), [self._local])))

    @torch.no_grad()
    def run(self) -> Moved:
        """Copies the newest weights, bit for bit, and what follows from them: scales of FP8, main weights of an optimizer."""
        with self._source.complete_weights(), self._target.complete_weights():
            for one in self._local:
                self._to.view(one.target, one).copy_(self._from.view(one.source, one))
            self._exchange()
            self._to.blank_padding()
        for module in (module for model in self._target.models for module in model.modules()):
            if isinstance(module, Fp8Linear) and module.recipe.kind == "delayed":
                module.take_scales()
        if self._target.optimizer is not None:
            self._target.optimizer.reload_model_params()
        return self.moves

    def _exchange(self) -> None:
        size = len(self._ranks)
        for turn in range(1, size):
            there, back = (self._me + turn) % size, (self._me - turn) % size
            out, come = self._sent.get(there, []), self._received.get(back, [])
            for number in range(max(len(out), len(come))):
                operations, arrived = [], ()
                if number < len(out):
                    buffer = self._buffer(out[number])
                    for one, packed in _windows(out[number], buffer):
                        packed.copy_(self._from.view(one.source, one))
                    operations.append(dist.P2POp(dist.isend, buffer, self._ranks[there], self._group))
                if number < len(come):
                    buffer = self._buffer(come[number])
                    arrived = _windows(come[number], buffer)
                    operations.append(dist.P2POp(dist.irecv, buffer, self._ranks[back], self._group))
                for work in dist.batch_isend_irecv(operations):
                    work.wait()
                for one, packed in arrived:
                    self._to.view(one.target, one).copy_(packed)

    def _buffer(self, message: list[Copy]) -> Tensor:
        return torch.empty(sum(one.size for one in message), dtype=torch.uint8, device=self._target.platform.device)


def _is_empty(data: object) -> bool:
    return data is None or (isinstance(data, Tensor) and data.numel() == 0)


def _windows(message: list[Copy], buffer: Tensor) -> Iterator[tuple[Copy, Tensor]]:
    """Each copy of a message, and where it lies in the message's bytes."""
    place = 0
    for one in message:
        yield one, buffer[place : place + one.size].view(one.dtype).view(one.extent)
        place += one.size
