"""Models that wait in host memory while others use the device.

What an engine holds lies in storages: parameters (with the distributed optimizer those that train are views of one buffer), gradient
buffers, main weights and moments, and what modules keep besides (FP8's histories and scales). Each is copied to host memory, and its
bytes are given back with `resize_(0)`; the storage object stays, so that every view of it is right again once the bytes are back,
wherever they then lie. megatron-core's own helpers (`_ParamAndGradBuffer.offload_to_cpu`, `MegatronOptimizer.offload_to_cpu`; 0.16 and
0.19) do so for the buffers of the data-parallel wrapper alone: frozen weights, models that do not train and modules' buffers stay, and
fp32 main weights, which are views of the parameters, would become copies.

Gradients are dropped: a step begins by setting them to zero. On CUDA the host's memory is pinned, in blocks of a power of two, which
torch keeps for the next model that leaves, and copies are asynchronous. On the CPU the "device" is memory too, and all else is as on
CUDA.

Nothing here is collective: a rank that fails waits for nobody.
"""
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor, UntypedStorage

if TYPE_CHECKING:
    from megatron_ext.train.engine import Engine

PARTS = ("parameters", "gradients", "optimizer", "buffers")
BLOCK = 256 << 20  # bytes: torch rounds pinned memory up to a power of two


def device_bytes(engine: "Engine") -> dict[str, int]:
    """Bytes of the device that this rank's part of an engine holds now, by part: parameters, gradients (with their buffers), optimizer
    (moments, and main weights where those are no views of the parameters), buffers (what else modules keep). All 0 while off-loaded."""
    return {part: sum(storage.nbytes() for storage in storages) for part, storages in _storages(engine).items()}


def state_bytes(engine: "Engine") -> dict[str, int]:
    """Bytes of what training keeps, by part: weights, their gradients, and main weights and moments of the optimizer, where those are no views of the
    weights. As `plan` counts them beforehand (plan/buffers.py): scalars such as Adam's step, and all else that `device_bytes` sees, are left out. The engine
    is on its device, and trains; its tensors may be fake."""
    weights = [weight for chunk in engine.chunks for weight in chunk.parameters()]
    inner = [part.optimizer for part in engine.optimizer.chained_optimizers if part.optimizer is not None]
    main, moments = _tensors([one.param_groups for one in inner]), _tensors([one.state for one in inner])
    parts = {"weights": weights, "gradients": [weight.main_grad for weight in weights if hasattr(weight, "main_grad")],
             "optimizer": [*main, *(tensor for tensor in moments if tensor.dim())]}
    seen: set[int] = set()
    return {part: sum(storage.nbytes() for storage in _unseen(tensors, seen)) for part, tensors in parts.items()}


class Away:
    """Stands where an engine's chunks were while they are in host memory. Freed tensors must not be touched (on the CPU that ends the
    process), and whatever is asked of an engine begins with its chunks: it raises a RuntimeError that says what to do."""

    def __init__(self, chunks: list[torch.nn.Module], message: str):
        self.chunks, self.message = chunks, message

    def refuse(self, *_) -> NoReturn:
        raise RuntimeError(self.message)

    __iter__ = __len__ = __getitem__ = refuse


class Offload:
    """Moves an engine between the device and host memory.

    Args:
        engine: it is on the device.
        name: what errors call it.
    """

    def __init__(self, engine: "Engine", name: str = "model"):
        self.engine, self.name = engine, name
        self._away: Away | None = None
        self._kept: list[tuple[UntypedStorage, int]] = []
        self._dropped: list[tuple[UntypedStorage, int]] = []
        self._host: list[Tensor] = []
        self._guards: list = []

    @property
    def host_bytes(self) -> int:
        return sum(block.numel() for block in self._host)

    def state(self) -> tuple[bool, int]:
        """What decides how much the engine holds: whether it is away, and of how many tensors the optimizer has made its moments."""
        parts = [] if self.engine.optimizer is None else self.engine.optimizer.chained_optimizers
        return self._away is not None, sum(len(part.optimizer.state) for part in parts if part.optimizer is not None)

    def to_host(self) -> None:
        """Frees all that the engine holds on the device; until `to_device` its use raises RuntimeError. Nothing where it has left."""
        if self._away is not None:
            return
        engine, cuda = self.engine, self.engine.platform.is_cuda
        _finish_gathering(engine.chunks)
        if engine.optimizer is not None:
            engine.optimizer.zero_grad()
        for model in engine.models:
            model.set_input_tensor(None)  # of the last micro-batch
        found = _storages(engine)
        self._dropped = [(storage, storage.nbytes()) for storage in found.pop("gradients")]
        self._kept = [(storage, storage.nbytes()) for storages in found.values() for storage in storages]
        total = sum(size for _, size in self._kept)
        self._host = [torch.empty(min(BLOCK, total - start), dtype=torch.uint8, pin_memory=cuda) for start in range(0, total, BLOCK)]
        for here, there in self._pairs():
            there.copy_(here, non_blocking=True)
        for storage, _ in (*self._kept, *self._dropped):
            storage.resize_(0)
        message = f"the {self.name} ({engine.layout}) is off-loaded to host memory: Offload.to_device() has to bring it back first"
        self._away = Away(engine.chunks, message)
        self._guards = [model.register_forward_pre_hook(self._away.refuse) for model in engine.models]
        engine.chunks = self._away
        if cuda:
            torch.cuda.empty_cache()  # others need the memory in other pieces

    def to_device(self) -> None:
        """Brings everything back, bit for bit; gradients are zero. Does nothing where it is there already."""
        if self._away is None:
            return
        for storage, size in (*self._kept, *self._dropped):
            storage.resize_(size)
        for here, there in self._pairs():
            here.copy_(there, non_blocking=True)
        for storage, _ in self._dropped:
            _bytes(storage).zero_()
        for guard in self._guards:
            guard.remove()
        self.engine.chunks = self._away.chunks
        self._away, self._kept, self._dropped, self._host, self._guards = None, [], [], [], []

    @contextmanager
    def needed(self) -> Iterator["Engine"]:
        """Inside, the engine is on the device; afterwards it is where it was before. Such blocks may lie in one another. After an exception
        it stays: copies might wait for a device or a rank that is lost, and hide what happened."""
        was_away = self._away is not None
        self.to_device()
        yield self.engine
        if was_away:
            self.to_host()

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(bytes on the device, bytes on the host): the storages one behind another in the blocks."""
        place = 0
        for storage, _ in self._kept:
            rest = _bytes(storage)
            while rest.numel():
                block, start = divmod(place, BLOCK)
                size = min(rest.numel(), BLOCK - start)
                yield rest[:size], self._host[block][start : start + size]
                rest, place = rest[size:], place + size


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _finish_gathering(chunks: Iterable[torch.nn.Module]) -> None:
    """Waits for gathers that a module's hook has begun and no other module has asked for: they write into parameters."""
    for chunk in chunks:
        if isinstance(chunk, DistributedDataParallel):
            for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
                if group.param_gather_handle is not None:
                    group.param_gather_handle.wait()
                    group.param_gather_handle = None


def _storages(engine: "Engine") -> dict[str, list[UntypedStorage]]:
    """Every storage of the device once, under the first part that it belongs to."""
    found: dict[str, list[UntypedStorage]] = {part: [] for part in PARTS}
    seen: set[int] = set()

    def take(part: str, *values: object) -> None:
        found[part] += _unseen((tensor for tensor in _tensors(values) if tensor.device.type == engine.platform.device.type), seen)

    chunks = engine.chunks.chunks if isinstance(engine.chunks, Away) else engine.chunks
    wrappers = [chunk for chunk in chunks if isinstance(chunk, DistributedDataParallel)]
    buffers = [vars(buffer) for wrapper in wrappers for buffer in (*wrapper.buffers, *wrapper.expert_parallel_buffers)]
    weights = [weight for chunk in chunks for weight in chunk.parameters()]
    parts = [] if engine.optimizer is None else engine.optimizer.chained_optimizers
    inner = [part.optimizer for part in parts if part.optimizer is not None]
    main = list(_tensors([optimizer.param_groups for optimizer in inner]))

    take("parameters", weights, [buffer["param_data"] for buffer in buffers])
    take("gradients", buffers, [_grad(weight) for weight in (*weights, *main)])
    take("optimizer", main, [optimizer.state for optimizer in inner], [vars(part) for part in parts],
         [vars(part.grad_scaler) for part in parts if getattr(part, "grad_scaler", None) is not None])
    take("buffers", [vars(module) for chunk in chunks for module in chunk.modules()])
    return found


def _unseen(tensors: Iterable[Tensor], seen: set[int]) -> Iterator[UntypedStorage]:
    """The storages that are not in `seen`, to which they are added."""
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:  # the address of the bytes is 0 where they are freed, and a fake tensor has none
            seen.add(storage._cdata)
            yield storage


def _tensors(values: object) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (dict, list, tuple)):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _tensors(value)


def _grad(tensor: Tensor) -> Tensor | None:
    with warnings.catch_warnings():  # fp32 main weights are views of parameters: torch doubts that their gradients are meant
        warnings.simplefilter("ignore")
        return tensor.grad
