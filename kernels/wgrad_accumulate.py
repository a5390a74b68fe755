"""The weight gradient of a linear layer, added straight into the main gradient: main_grad += dy^T x, accumulated in fp32.

With y = x W^T, W [out, in], a micro-batch adds dW = dy^T x to the gradient of the step. Computing dW first costs a temporary of W's size, and
writes and reads it once more; a GEMM with beta = 1 does without. It is what megatron-core's `gradient_accumulation_fusion` asks of Apex's
`fused_weight_gradient_mlp_cuda` (Shoeybi et al. 2019, arXiv 1909.08053, and Korthikanti et al. 2022, arXiv 2205.05198, train with it).

On CUDA the product of bf16 or fp16 operands reaches an fp32 main gradient unrounded, in one cuBLAS call (or Triton's). On the CPU, oneDNN has
no fp32 output for bf16 operands: the product is rounded to bf16 once, piece by piece, as PyTorch's own expression does, and the sum is fp32;
where the CPU has no bf16 or fp16 multiplication, pieces are widened and multiplied in fp32. Temporaries stay below PIECE elements.

Flops: 2 tokens out in. Memory traffic: dy, x read once, main_grad read and written once.
Shapes: main_grad [out, in], dy [..., out], x [..., in], rows collapsible.
"""
import torch
from torch import Tensor

from kernels.autocast import outside_autocast
from kernels.backend import serving
from kernels.checks import check_device, check_dtype, check_last_dense, check_shape, rows_of
from kernels.jit import Launch, dot, narrow, on_device_of, tl, triton
from kernels.tiles import wgrad

PIECE = 1 << 20  # elements of a temporary on the CPU: 4 MB in fp32, what stays in a core's cache


def wgrad_accumulate_reference(main_grad: Tensor, dy: Tensor, x: Tensor) -> Tensor:
    """The unfused expression, in the tensors' own dtypes: what the op is compared with in fp64, and what it replaces. Returns the sum."""
    return main_grad + (dy.reshape(-1, dy.shape[-1]).t() @ x.reshape(-1, x.shape[-1])).to(main_grad.dtype)


@triton.jit
def _accumulate(main_ptr, dy_ptr, x_ptr, tokens, out_width, in_width, main_stride, dy_stride, x_stride, BM: tl.constexpr, BN: tl.constexpr,
                BK: tl.constexpr, GROUP: tl.constexpr):
    # Tiles of GROUP rows are taken column by column, so that programs which run together share their pieces of x in the L2 cache.
    tile = tl.program_id(0)
    tall = tl.cdiv(out_width, BM)
    wide = tl.cdiv(in_width, BN)
    first = tile // (GROUP * wide) * GROUP
    size = min(tall - first, GROUP)
    row = (first + tile % (GROUP * wide) % size).to(tl.int64) * BM + tl.arange(0, BM)
    col = (tile % (GROUP * wide) // size).to(tl.int64) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    dy_ptrs = dy_ptr + k[:, None].to(tl.int64) * dy_stride + row[None, :]
    x_ptrs = x_ptr + k[:, None].to(tl.int64) * x_stride + col[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    for start in range(0, tokens, BK):
        live = start + k[:, None] < tokens
        dy = tl.load(dy_ptrs, mask=live & (row[None, :] < out_width), other=0.0)
        x = tl.load(x_ptrs, mask=live & (col[None, :] < in_width), other=0.0)
        acc = dot(tl.trans(dy), x, acc)
        dy_ptrs += tl.cast(BK, tl.int64) * dy_stride
        x_ptrs += tl.cast(BK, tl.int64) * x_stride
    inside = (row[:, None] < out_width) & (col[None, :] < in_width)
    main_ptrs = main_ptr + row[:, None] * main_stride + col[None, :]
    main = tl.load(main_ptrs, mask=inside, other=0.0).to(tl.float32)
    tl.store(main_ptrs, narrow(main + acc, main_ptr.dtype.element_ty), mask=inside)


def _multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of `dtype` itself; what it only emulates is slower than fp32 by an order of magnitude."""
    if dtype == torch.float32:
        return True
    ask = {torch.bfloat16: "_is_avx512_bf16_supported", torch.float16: "_is_avx512_fp16_supported"}[dtype]
    return any(getattr(torch.cpu, name, bool)() for name in (ask, "_is_amx_fp16_supported" if dtype == torch.float16 else "_is_amx_tile_supported"))


@outside_autocast
def _on_cpu(main_grad: Tensor, dy: Tensor, x: Tensor) -> None:
    rows = max(PIECE // max(x.shape[1], 1), 16)
    if _multiplies(dy.dtype):
        if main_grad.dtype == dy.dtype:
            main_grad.addmm_(dy.t(), x)
        else:
            for i in range(0, main_grad.shape[0], rows):
                main_grad[i:i + rows] += dy[:, i:i + rows].t() @ x
        return
    tokens = max(PIECE // max(main_grad.shape), 16)
    for i in range(0, main_grad.shape[0], rows):
        total = main_grad[i:i + rows].float()  # itself where it is fp32
        for t in range(0, dy.shape[0], tokens):
            total.addmm_(dy[t:t + tokens, i:i + rows].float().t(), x[t:t + tokens].float())
        if total.dtype != main_grad.dtype:
            main_grad[i:i + rows] = total


@torch.library.custom_op("kernels::wgrad_accumulate_", mutates_args=("main_grad",))
def _wgrad_op(main_grad: Tensor, dy: Tensor, x: Tensor, backend: str) -> None:
    if not (main_grad.numel() and dy.shape[0]):
        return
    served = serving("wgrad_accumulate", backend, main_grad.device.type)
    if served == "apex":
        import fused_weight_gradient_mlp_cuda as apex

        (apex.wgrad_gemm_accum_fp32 if main_grad.dtype == torch.float32 else apex.wgrad_gemm_accum_fp16)(x, dy, main_grad)
    elif served == "triton":
        (out_width, in_width), choice = main_grad.shape, wgrad(dy.element_size())
        grid = (triton.cdiv(out_width, choice["BM"]) * triton.cdiv(in_width, choice["BN"]),)
        with on_device_of(main_grad):
            _accumulate[grid](main_grad, dy, x, dy.shape[0], out_width, in_width, main_grad.stride(0), dy.stride(0), x.stride(0), **choice)
    elif main_grad.device.type == "cpu":
        _on_cpu(main_grad, dy, x)
    elif main_grad.dtype == dy.dtype:
        main_grad.addmm_(dy.t(), x)  # cuBLAS accumulates in fp32 inside and rounds once
    else:
        torch.addmm(main_grad, dy.t(), x, out_dtype=torch.float32, out=main_grad)


@_wgrad_op.register_fake
def _(main_grad, dy, x, backend):
    return None


@torch.no_grad()
def wgrad_accumulate_(main_grad: Tensor, dy: Tensor, x: Tensor, *, backend: str = "auto") -> None:
    """main_grad += dy^T x, in place. Not differentiable: it is itself half of a backward.

    Args:
        main_grad: [out, in], fp32, or the dtype of dy and x; the last dimension dense.
        dy, x: [..., out] and [..., in], one dtype of fp32, bf16, fp16, and as many rows; the last dimension dense.
        backend: apex, torch, triton, or auto.
    Raises:
        TypeError: a dtype, or a pair of them, that is not taken. ValueError: a shape, stride or device that does not fit.
        MissingBackend: the backend asked for cannot serve here.
    """
    check_dtype("wgrad_accumulate_", "main_grad", main_grad)
    check_dtype("wgrad_accumulate_", "dy", dy)
    check_dtype("wgrad_accumulate_", "x", x, (dy.dtype,))
    if main_grad.dtype not in (torch.float32, dy.dtype):
        check_dtype("wgrad_accumulate_", "main_grad", main_grad, (torch.float32, dy.dtype))
    if main_grad.dim() != 2:
        raise ValueError(f"wgrad_accumulate_: main_grad has shape {tuple(main_grad.shape)}, expected [out, in]")
    for name, tensor in (("dy", dy), ("x", x)):
        check_device("wgrad_accumulate_", name, tensor, main_grad.device)
    check_last_dense("wgrad_accumulate_", "main_grad", main_grad)
    check_last_dense("wgrad_accumulate_", "dy", dy)
    check_last_dense("wgrad_accumulate_", "x", x)
    if dy.dim() != 2 or x.dim() != 2:
        dy, x = rows_of("wgrad_accumulate_", "dy", dy), rows_of("wgrad_accumulate_", "x", x)
    check_shape("wgrad_accumulate_", "dy", dy, (dy.shape[0], main_grad.shape[0]))
    check_shape("wgrad_accumulate_", "x", x, (dy.shape[0], main_grad.shape[1]))
    if main_grad.shape[0] > 1 and main_grad.stride(0) < main_grad.shape[1]:
        raise ValueError(f"wgrad_accumulate_: main_grad (strides {main_grad.stride()}) overlaps itself")
    _wgrad_op(main_grad, dy.detach(), x.detach(), backend)


def launches() -> list[Launch]:
    """Every configuration of the tile table, for the static check; a GEMM, so bound by arithmetic."""
    found = []
    for dtype, size in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
        choice = wgrad(size)
        warps, stages = choice.pop("num_warps"), choice.pop("num_stages")
        for main in dict.fromkeys(("fp32", dtype)):
            found.append(Launch(
                "wgrad_accumulate", f"{dtype} into {main}", _accumulate,
                {"main_ptr": f"*{main}", "dy_ptr": f"*{dtype}", "x_ptr": f"*{dtype}", "tokens": "i32", "out_width": "i32", "in_width": "i32",
                 "main_stride": "i32", "dy_stride": "i32", "x_stride": "i32"},
                choice, warps, stages, multiples_of_16=("tokens", "out_width", "in_width", "main_stride", "dy_stride", "x_stride"),
                memory_bound=False))
    return found
