"""Stands in for what megatron-core asks of CUDA on a machine without a GPU: "cuda" means the CPU.

megatron-core has no CPU path: it asks for `torch.cuda.current_device()`, makes tensors with `device="cuda"`, and waits on streams.
The patches below answer those calls on the CPU. torch_npu's `transfer_to_npu` does the same for another device. They hide a tensor
that was left on the wrong device, which is why the tests also run a forward pass under `FakeTensorMode` with `device="cuda"`.

The functions themselves are wrapped. A `TorchFunctionMode` would be shorter, but it is not active inside autograd's backward, where
activation recomputation makes its tensors.
"""
import contextlib
import functools

import torch

from megatron_ext.platform.patch import Patch

CPU = torch.device("cpu")
FACTORIES = (  # noqa: SIM905
    "empty zeros ones full tensor arange rand randn randint randperm as_tensor eye linspace empty_strided scalar_tensor "
    "empty_like zeros_like ones_like full_like rand_like randn_like"
).split()
TENSOR_TYPES = {
    "FloatTensor": torch.float,
    "HalfTensor": torch.half,
    "BFloat16Tensor": torch.bfloat16,
    "DoubleTensor": torch.double,
    "LongTensor": torch.long,
    "IntTensor": torch.int,
    "ByteTensor": torch.uint8,
}


class _Stream:
    """A stream or event on which nothing is ever pending."""

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        return lambda *args, **kwargs: None

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return False


def _on_cpu(device):
    """`device`, with any CUDA device replaced by the CPU; anything else (a dtype, another tensor) as it is."""
    if isinstance(device, str) and device.startswith("cuda"):
        return CPU
    if isinstance(device, torch.device) and device.type == "cuda":
        return CPU
    return device


def _redirected(function):
    """`function` with `device="cuda"` and `pin_memory=True` taken back: neither exists without CUDA."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if kwargs.get("device") is not None:
            kwargs["device"] = _on_cpu(kwargs["device"])
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    return wrapper


def _apply_current_device():
    torch.cuda.current_device = lambda: CPU
    for name in ("synchronize", "set_device", "empty_cache"):
        setattr(torch.cuda, name, lambda *args, **kwargs: None)


def _probe_current_device():
    torch.cuda.synchronize()
    assert torch.empty(1, device=torch.cuda.current_device()).device == CPU


def _apply_streams():
    torch.cuda.Stream = torch.cuda.Event = _Stream
    torch.cuda.current_stream = lambda *args, **kwargs: _Stream()
    torch.cuda.stream = lambda stream: contextlib.nullcontext()


def _probe_streams():
    torch.cuda.Stream().wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.Event().record()


class _TensorType(type):
    """A class like torch.cuda.FloatTensor: calling it makes a tensor, and tensors of its dtype are its instances."""

    def __call__(cls, *args, **kwargs):
        return torch.tensor(*args, dtype=cls.dtype, **kwargs)

    def __instancecheck__(cls, value):
        return isinstance(value, torch.Tensor) and value.dtype == cls.dtype


def _apply_tensor_types():
    for name, dtype in TENSOR_TYPES.items():
        setattr(torch.cuda, name, _TensorType(name, (), {"dtype": dtype}))


def _probe_tensor_types():
    assert torch.cuda.FloatTensor([1.0]).dtype == torch.float32
    assert isinstance(torch.ones(1), torch.cuda.FloatTensor) and not isinstance(torch.ones(1), torch.cuda.HalfTensor)


def _apply_factories():
    # `with torch.device("meta")` knows torch's functions by identity, and lists them when it is first used: after this it would list ours, find none of
    # its own inside them, and do nothing. (transformers builds models so: its rotary frequencies were whatever lay in memory.)
    from torch.utils._device import _device_constructors

    _device_constructors()
    for name in FACTORIES:
        setattr(torch, name, _redirected(getattr(torch, name)))


def _probe_factories():
    for value in (torch.empty(1, device="cuda"), torch.zeros_like(torch.ones(1), device="cuda")):
        assert value.device == CPU
    assert torch.tensor([1.0], pin_memory=True, device="cuda:0").device == CPU
    with torch.device("meta"):
        assert torch.arange(3).is_meta


def _apply_moves():
    to = _redirected(torch.Tensor.to)
    torch.Tensor.to = lambda self, *args, **kwargs: to(self, *map(_on_cpu, args), **kwargs)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self


def _probe_moves():
    assert torch.ones(1).cuda().to("cuda").device == CPU
    torch.nn.Linear(1, 1).cuda()


def _apply_type_names():
    original = torch.Tensor.type

    def type_(self, dtype=None, *args, **kwargs):
        if dtype is not None:
            return original(self, dtype, *args, **kwargs)
        return original(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = type_


def _probe_type_names():
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"


def _apply_generator():
    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    torch.cuda.manual_seed = torch.manual_seed


def _probe_generator():
    torch.cuda.manual_seed(5)
    state, first = torch.cuda.get_rng_state(), torch.rand(1)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(1), first)


def _apply_megatron_generator():
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)


def _probe_megatron_generator():
    from megatron.core.tensor_parallel import random

    state = random._get_cuda_rng_state()
    first = torch.rand(1)
    random._set_cuda_rng_state(state)
    assert torch.equal(torch.rand(1), first)


def _apply_gradient_norm():
    from megatron.core.optimizer import clip_grads

    from kernels.grad_norm import grad_norm

    def norm(chunk_size, noop_flag, tensor_lists, per_tensor, *args):
        return grad_norm(tensor_lists[0]).reshape(1), None

    clip_grads.l2_norm_impl = norm


def _probe_gradient_norm():
    from megatron.core.optimizer import clip_grads

    values = torch.linspace(0.5, 1.5, (1 << 22) + 5)
    found = float(clip_grads.l2_norm_impl(65536, None, [[values, values]], False)[0])
    assert abs(found / float(values.double().square().sum().mul(2).sqrt()) - 1) < 1e-6


PATCHES = (
    Patch("current-device", "megatron-core makes tensors on torch.cuda.current_device() and synchronises with it",
          _apply_current_device, _probe_current_device),
    Patch("streams", "gradient buckets and checkpoint writers use streams and events", _apply_streams, _probe_streams),
    Patch("tensor-types", "norms and counters are made with torch.cuda.FloatTensor and its kin", _apply_tensor_types, _probe_tensor_types),
    Patch("factories", 'megatron-core makes tensors with device="cuda" and pin_memory=True', _apply_factories, _probe_factories),
    Patch("moves", "megatron-core moves tensors and modules with .cuda() and .to('cuda')", _apply_moves, _probe_moves),
    Patch("type-names", "gradient clipping asserts that Tensor.type() is 'torch.cuda.FloatTensor'", _apply_type_names, _probe_type_names),
    Patch("generator", "dropout regions save and restore the state of the CUDA generator", _apply_generator, _probe_generator),
    Patch("megatron-generator", "megatron-core's random-number tracker reads torch.cuda.default_generators",
          _apply_megatron_generator, _probe_megatron_generator),
    Patch("gradient-norm", "torch.norm sums fp32 in order on the CPU: 7e-5 off at 4 million elements, so that clipping depended on how the "
          "model was cut into tensors", _apply_gradient_norm, _probe_gradient_norm),
)
