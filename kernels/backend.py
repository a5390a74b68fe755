"""Which implementation serves an op on this machine, and why nothing better does.

An op has backends, best first. A backend says by itself whether it can serve on a device: its probe returns None, or one sentence on why not.
`choose(op)` takes the first that can. A backend that is asked for by name and cannot serve is an error with the line that installs it,
never a silent fallback. To add one: a probe, and a row in `ops()`. Probes look (`find_spec`, torch's own flags) and import nothing heavy.
"""
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from importlib.util import find_spec


class MissingBackend(ValueError):
    """A backend that was asked for cannot serve the op here: `.op`, `.backend`, `.reason`, `.install` (a command, or "")."""

    def __init__(self, op: str, backend: str, reason: str, install: str = ""):
        self.op, self.backend, self.reason, self.install = op, backend, reason, install
        super().__init__(f"{backend} cannot serve {op}: {reason}" + (f"; install it with: {install}" if install else ""))

    def __reduce__(self):
        return type(self), (self.op, self.backend, self.reason, self.install)


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Attributes:
        reason: why it is good.
        probe: device type ("cuda", "cpu") -> None (it can serve there) or one sentence on why not.
        install: the command that installs it.
        executed: whether this code path has ever run anywhere; `doctor` and the README list those that have not.
    """

    name: str
    reason: str
    probe: Callable[[str], str | None]
    install: str = ""
    executed: bool = True


@dataclass(frozen=True)
class Choice:
    """The backend that serves `op`, why, and for each of the others (name, why not)."""

    op: str
    backend: str
    reason: str
    alternatives: tuple[tuple[str, str], ...]


def _always(device: str) -> None:
    return None


def _triton(device: str) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"triton compiles for GPUs, the tensors are on {device} (TRITON_INTERPRET=1 interprets its kernels there, slowly, for tests)"
    return None


def _apex_gemm(device: str) -> str | None:
    # The path alone: megatron_ext's platform puts a stand-in of that name among the loaded modules, for megatron-core to import.
    if PathFinder.find_spec("fused_weight_gradient_mlp_cuda") is None:
        return "Apex's extension fused_weight_gradient_mlp_cuda is not installed"
    return None if device == "cuda" else f"Apex runs on NVIDIA GPUs, the tensors are on {device}"


def _accumulating_gemm(device: str) -> str | None:
    import torch

    if device != "cuda" or tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])) >= (2, 10):
        return None
    return f"torch {torch.__version__} cannot add a product of bf16 matrices to an fp32 one (2.10 and later can)"


def _fused(torch_reason: str, triton_reason: str) -> tuple[Backend, ...]:
    """An op with a Triton kernel and a torch path."""
    return Backend("triton", triton_reason, _triton, "pip install 'triton>=3.4,<4'"), Backend("torch", torch_reason, _always)


def _library(module: str, needs: str) -> Callable[[str], str | None]:
    """A probe: a library for GPUs that is installed. `module` may name a submodule; its package is looked at, not imported."""

    def probe(device: str) -> str | None:
        package, _, part = module.partition(".")
        try:
            found = find_spec(package)
        except ValueError:  # a stand-in of ours under a library's name (megatron_ext/platform): it has no spec
            found = None
        places = (found.submodule_search_locations or ()) if found else ()
        if found is None or part and not any(os.path.exists(os.path.join(place, part)) for place in places):
            return f"{needs} is not installed"
        return None if device == "cuda" else f"{needs} runs on NVIDIA GPUs, the tensors are on {device}"

    return probe


def _attention() -> tuple[Backend, ...]:
    """Best first; what each can do with a given call (mask, dropout, head size, GPU) stands in kernels/attention_choice.py."""
    return (
        Backend("flash-attn-3", "flash-attention's kernels for Hopper, packed and dense", _library("flash_attn_interface", "flash-attn 3"),
                "pip install --no-build-isolation 'git+https://github.com/Dao-AILab/flash-attention.git#subdirectory=hopper'", executed=False),
        Backend("flash-attn-4", "flash-attention's kernels for Hopper and Blackwell, packed and dense",
                _library("flash_attn.cute", "flash-attn 4"), "pip install --pre flash-attn-4", executed=False),
        Backend("flash-attn-2", "flash-attention's kernels for Ampere and later, packed and dense, with dropout",
                _library("flash_attn_2_cuda", "flash-attn 2"), "pip install --no-build-isolation 'flash-attn>=2.7'", executed=False),
        Backend("transformer-engine", "cuDNN's fused attention through Transformer Engine, packed and dense, with dropout",
                _library("transformer_engine", "Transformer Engine"), "pip install --no-build-isolation 'transformer-engine[pytorch]'",
                executed=False),
        Backend("varlen", "torch's own flash kernel for packed sequences", _torch_varlen, "pip install 'torch>=2.13'", executed=False),
        Backend("torch", "scaled_dot_product_attention; packed sequences of one length are computed together", _always),
        Backend("flex", "flex_attention with a mask of blocks: packed sequences in fp32 on a GPU", _always),
    )


def _torch_varlen(device: str) -> str | None:
    if device != "cuda":
        return f"torch.nn.attention.varlen runs on NVIDIA GPUs, the tensors are on {device}"
    import torch

    path = os.path.join(os.path.dirname(torch.__file__), "nn", "attention", "varlen.py")
    return None if os.path.exists(path) else f"torch {torch.__version__} has no torch.nn.attention.varlen"


def _scaled_mm(device: str, blockwise: bool) -> str | None:
    import torch

    if not hasattr(torch, "_scaled_mm"):
        return f"torch {torch.__version__} has no _scaled_mm (2.1 and later have)"
    if device != "cuda":
        return "torch._scaled_mm takes one scale a tensor or a row on CPUs, not blocks" if blockwise else None
    sm = torch.cuda.get_device_capability()
    if blockwise and sm != (9, 0):
        return f"cuBLAS multiplies blocks with a scale each on sm_90 only, this GPU is sm_{sm[0]}{sm[1]}"
    if blockwise and tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2])) < (12, 9):
        return f"cuBLAS multiplies blocks with a scale each from CUDA 12.9 on, this torch is built for {torch.version.cuda}"
    return None if sm >= (8, 9) else f"FP8 matrix products need sm_89 or later, this GPU is sm_{sm[0]}{sm[1]}"


def _scaled_products(blockwise: bool) -> tuple[Backend, ...]:
    """The matrix products of an FP8 linear layer."""
    return (
        Backend("scaled_mm", "torch._scaled_mm: FP8 tensor cores, scales applied to the sums", lambda device: _scaled_mm(device, blockwise),
                executed=not blockwise),
        Backend("emulation", "the FP8 operands read back to fp32 and multiplied there: the same numbers, no speed", _always),
    )


def ops() -> dict[str, tuple[Backend, ...]]:
    """Every op of the project with its backends, best first."""
    return {
        "adamw": _fused("torch's fused multi-tensor kernel: one pass over weights, gradients and moments",
                        "one launch for all tensors, main weights rounded into the model's in the same pass"),
        "attention": _attention(),
        "fp8": _fused("rounds in pieces that stay in the cache", "amax, cast and transpose in one pass, the bits made by integer arithmetic or the hardware"),
        "fp8_linear": _scaled_products(blockwise=False),
        "fp8_linear_blockwise": _scaled_products(blockwise=True),
        "gae": _fused("a blocked scan, 32 steps of all blocks at once", "one scan a rollout, everything read once"),
        "grad_norm": _fused("blocks summed in fp32, their sums in fp64", "all tensors in one launch, chunks summed in fp32, their sums in fp64"),
        "bias_gelu": _fused("PyTorch's expression; on a GPU and compiled its backward recomputes",
                            "bias and activation in one pass each way, the bias gradient summed on the way"),
        "geglu": _fused("PyTorch's expression; on a GPU and compiled its backward recomputes", "one pass over memory each way, nothing kept but the input"),
        "layer_norm": _fused("torch's own layer norm, forward and backward", "residual add, statistics and norm in one pass over memory each way"),
        "linear_cross_entropy": _fused("tiles of logits that stay in the cache, fp32 sums", "tiles of fp32 logits, read once and written once between the products"),
        "rms_norm": _fused("rows in pieces that stay in the cache", "residual add, statistics and norm in one pass over memory each way"),
        "rope": _fused("fp32 arithmetic, nothing kept but the tables", "queries and keys in one launch, any strides of a fused projection"),
        "swiglu": _fused("PyTorch's expression; on a GPU and compiled its backward recomputes", "one pass over memory each way, nothing kept but the input"),
        "wgrad_accumulate": (
            Backend("apex", "Apex's fused_weight_gradient_mlp_cuda: one cuBLAS call", _apex_gemm,
                    "pip install --no-build-isolation 'git+https://github.com/NVIDIA/apex' (with APEX_CPP_EXT=1 APEX_CUDA_EXT=1)", executed=False),
            Backend("torch", "one cuBLAS call that adds to the fp32 gradient; on the CPU, pieces that stay in the cache", _accumulating_gemm,
                    "pip install 'torch>=2.10'"),
            Backend("triton", "a GEMM that adds its tiles to the gradient", _triton, "pip install 'triton>=3.4,<4'"),
        ),
    }


def default_device() -> str:
    """The device type that a run here would use."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def choose(op: str, backend: str = "auto", *, device: str | None = None, table: Mapping[str, tuple[Backend, ...]] | None = None) -> Choice:
    """What serves `op`.

    Args:
        op: a key of `ops()`.
        backend: "auto" for the best that can serve here, or the name of one.
        device: device type of the tensors; None = `default_device()`.
        table: other ops than the project's own.

    Raises:
        MissingBackend: none can serve, or the one asked for cannot, or it is unknown for this op.
        KeyError: unknown op.
    """
    device = device or default_device()
    backends = (ops() if table is None else table)[op]
    if device != "cuda":  # Triton serves CPU tensors through its interpreter only: when asked, not because it can
        backends = tuple(sorted(backends, key=lambda b: b.name == "triton"))
    named = {b.name: b for b in backends}
    if backend not in ("auto", *named):
        raise MissingBackend(op, backend, f"unknown here; there are: {', '.join(named)}")
    why_not = {b.name: b.probe(device) for b in backends}
    if backend == "auto":
        chosen = next((b for b in backends if why_not[b.name] is None), None)
        if chosen is None:
            raise MissingBackend(op, "any backend", "; ".join(f"{b.name}: {why_not[b.name]}" for b in backends), backends[-1].install)
    else:
        chosen = named[backend]
        if (why := why_not[backend]) is not None:
            # Installing does not help where it is there and the tensors are elsewhere.
            raise MissingBackend(op, backend, why, "" if "the tensors are on" in why else chosen.install)
    others = tuple((b.name, why_not[b.name] or f"can serve, but {chosen.name} " + ("is preferred" if backend == "auto" else "was asked for"))
                   for b in backends if b is not chosen)
    return Choice(op, chosen.name, chosen.reason, others)


@cache
def serving(op: str, backend: str, device: str, index: int | None = None) -> str:
    """The name of what serves `op` on `device` ("cuda", "cpu"): what the registered ops ask at each call, inside
    their bodies, where `torch.compile` does not look. `index`: which GPU, for an op whose backends ask what it can do. Raises as `choose`."""
    if index is None or device != "cuda":
        return choose(op, backend, device=device).backend
    import torch

    with torch.cuda.device(index):
        return choose(op, backend, device=device).backend
