"""What tests see of the tensors that an engine holds on this rank."""
import gc
from contextlib import contextmanager

import torch
import torch.distributed as dist

WORDS = 101  # 101 rows of the table on one rank, 102 on two


class Values:
    """The squared distance of a scalar head's numbers from the labels."""

    names = ()

    def needed(self, batch):
        return None

    def score(self, model, hidden, batch):
        return model.values(hidden)

    def loss(self, values, batch):
        return ((values - batch.labels / WORDS) ** 2).sum(), values.numel(), {}


def state_of(engine) -> list:
    """Copies of all that training goes on from, on this rank."""
    found = kept(engine)
    for part in engine.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for weight in group["params"]:
                found += [weight, *(value for value in part.optimizer.state[weight].values() if isinstance(value, torch.Tensor))]
    return [tensor.detach().clone() for tensor in found]


def kept(engine) -> list:
    """A model's tensors on this rank: parameters, histories, scales."""
    found = [tensor for model in engine.models for tensor in (*model.parameters(), *model.buffers())]
    return found + [module.scales for model in engine.models for module in model.modules() if getattr(module, "scales", None) is not None]


def same_bits(these: list, those: list) -> bool:
    return len(these) == len(those) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))
        for a, b in zip(these, those)
    )


def equal(engine, other) -> bool:
    return same_bits([one.detach() for one in kept(engine)], [one.detach() for one in kept(other)])


def lacking(source, target) -> int:
    """Bytes of the target's weights on this rank that the source has on other ranks only, element by element."""
    from megatron_ext.models.initialise import sharded_tensors

    held, itemsize = ({}, {}), {}
    for engine, mask in zip((source, target), held):
        for tensor in sharded_tensors(engine.sharded_state(loading=False, weights_only=True)):
            shape = [min(n, WORDS) if tensor.allow_shape_mismatch else n for n in tensor.global_shape]
            low, extent = tensor.global_offset, (*(1,) * tensor.prepend_axis_num, *tensor.local_shape)
            mask.setdefault(tensor.key, torch.zeros(shape, dtype=torch.bool))[tuple(slice(a, a + n) for a, n in zip(low, extent))] = True
            itemsize[tensor.key] = tensor.data.element_size()
    have, want = held
    return sum(int((mask & ~have.get(key, torch.zeros_like(mask))).sum()) * itemsize[key] for key, mask in want.items())


@contextmanager
def messages():
    """Notes (rank that it goes to, bytes) of every message that this rank sends."""
    sizes, original = [], dist.P2POp

    def noting(operation, tensor, peer, group):
        if operation is dist.isend:
            sizes.append((peer, tensor.nbytes))
        return original(operation, tensor, peer, group)

    dist.P2POp = noting
    try:
        yield sizes
    finally:
        dist.P2POp = original


def alive() -> int:
    """Bytes of all tensors of this process."""
    gc.collect()
    storages = [one.untyped_storage() for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def sizes_of(engine) -> dict:
    weights = [weight for model in engine.models for weight in model.parameters()]
    trained = [weight for weight in weights if weight.requires_grad]
    return {
        "all": sum(weight.numel() for weight in weights), "trained": sum(weight.numel() for weight in trained), "tensors": len(trained),
        "itemsize": weights[0].element_size(), "chunks": len(engine.chunks),
    }


def refusal(use, kind: type[Exception]) -> str | None:
    try:
        use()
    except kind as error:
        return str(error)
    return None
