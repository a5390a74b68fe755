"""AdamW: Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101; Adam: Kingma & Ba 2015, arXiv 1412.6980).

With gradient g, step t = 1, 2, ..., learning rate a, decay w:

    m_t = b1 m_{t-1} + (1 - b1) g            first moment   (`exp_avg`)
    v_t = b2 v_{t-1} + (1 - b2) g^2          second moment  (`exp_avg_sq`)
    p  <- p (1 - a w)                        decay, apart from the gradient (adam_w_mode; else g <- g + w p, Adam with L2)
    p  <- p - a / (1 - b1^t) * m_t / (sqrt(v_t) / sqrt(1 - b2^t) + eps)

The class has the interface of Apex's and Transformer Engine's `FusedAdam`, which megatron-core's distributed optimizer and its checkpoints are
written against: `step` is an int in the parameter *group*, the state of a parameter is `exp_avg` and `exp_avg_sq`. With `master_weights` bf16 and
fp16 parameters have fp32 main weights in `master_param` (and fp32 moments), and are those weights rounded to nearest even after every step.

It serves CPU and CUDA. A whole group is one call: Triton's multi-tensor kernel (`kernels/adamw_triton.py`), or torch's own fused kernel, both one
pass over memory. What they do not take (strided or fp64 tensors; torch's: no bias correction) goes through `adamw_reference_`, which is also what
they are tested against, and what serves where torch has no fused kernel.

Measured on one CPU thread, in turns, 3.7 M fp32 parameters in 26 tensors, as shares of a loop over tensors: 0.40, torch.optim.AdamW fused 0.46,
foreach 1.44; bf16 beside main weights: 0.55, 0.81, 2.07 (`python benchmarks/bench_adamw.py --threads 1 --quick`; the machine was busy).
"""
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from kernels import adamw_triton
from kernels.backend import serving
from kernels.checks import check_dtype, check_integer

MAIN = (torch.float32, torch.float64)
PIECE = 1 << 22  # elements: gradients that have to be widened for torch's kernel are widened piece by piece


def adamw_reference_(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, step: int | Tensor, lr: float | Tensor, betas: tuple[float, float],
    eps: float, weight_decay: float, bias_correction: bool = True, adam_w_mode: bool = True,
) -> None:
    """One update of one tensor, in place, in the order of the formulas above. All four tensors: one shape, any strides, one dtype."""
    beta1, beta2 = betas
    if adam_w_mode:
        param.mul_(1 - lr * weight_decay)
    elif weight_decay:
        grad = grad.add(param, alpha=weight_decay)
    exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    correction1 = 1 - beta1**step if bias_correction else 1.0
    correction2 = 1 - beta2**step if bias_correction else 1.0
    below = (exp_avg_sq.sqrt() / correction2**0.5).add_(eps)
    if isinstance(lr, Tensor):  # addcdiv_ takes numbers alone
        param.sub_(exp_avg / below * (lr / correction1))
    else:
        param.addcdiv_(exp_avg, below, value=-lr / correction1)


def _in_torch(rows: list[tuple[Tensor, ...]], *, step, lr, betas, eps, weight_decay, bias_correction, adam_w_mode, grad_scale, found_inf) -> None:
    """Rows of (weights, gradient, exp_avg, exp_avg_sq[, weights to write besides])."""
    name = "_fused_adamw_" if adam_w_mode else "_fused_adam_"  # private names: torch.optim.AdamW(fused=True) calls them too
    has_fused = bias_correction and hasattr(torch, name)

    def fused(p: list, g: list, m: list, v: list) -> None:
        count = step.float() if isinstance(step, Tensor) else torch.full((), float(step), dtype=torch.float32, device=p[0].device)
        getattr(torch, name)(p, g, m, v, [], [count] * len(p), lr=lr, beta1=betas[0], beta2=betas[1], weight_decay=weight_decay, eps=eps,
                             amsgrad=False, maximize=False, found_inf=None if found_inf is None else (found_inf != 0).float())

    def wide(grad: Tensor, dtype: torch.dtype) -> Tensor:
        return grad.to(dtype) if grad_scale is None else grad.to(dtype) / grad_scale

    together, rest = defaultdict(list), []
    for row in rows:
        p, g, m, v, *_ = row
        # The fused kernel walks flat memory, so it needs the same order of elements in all four tensors.
        if not (has_fused and all(t.is_contiguous() for t in (p, g, m, v))):
            rest.append((p, wide(g, p.dtype), m, v))
        elif g.dtype == p.dtype and grad_scale is None:
            together[p.dtype].append((p, g, m, v))
        else:
            for part in zip(*(t.view(-1).split(PIECE) for t in (p, g, m, v)), strict=True):
                fused([part[0]], [wide(part[1], p.dtype)], [part[2]], [part[3]])
    for kind in together.values():
        fused(*(list(column) for column in zip(*kind, strict=True)))
    for p, g, m, v in rest:
        before = [] if found_inf is None else [t.clone() for t in (p, m, v)]
        adamw_reference_(p, g, m, v, step=step.double() if isinstance(step, Tensor) else step, lr=lr, betas=betas, eps=eps,
                         weight_decay=weight_decay, bias_correction=bias_correction, adam_w_mode=adam_w_mode)
        for now, old in zip((p, m, v), before, strict=False):
            now.copy_(torch.where(found_inf != 0, old, now))
    for p, _, _, _, *low in rows:
        for t in low:
            t.copy_(p)


@torch.library.custom_op("kernels::adamw_", mutates_args=("params", "exp_avgs", "exp_avg_sqs", "model_params"))
def _adamw_op(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor], model_params: Sequence[Tensor],
    step: int, step_tensor: Tensor | None, lr: float, lr_tensor: Tensor | None, beta1: float, beta2: float, eps: float, weight_decay: float,
    bias_correction: bool, adam_w_mode: bool, grad_scale: Tensor | None, found_inf: Tensor | None, backend: str,
) -> None:
    rows = list(zip(params, grads, exp_avgs, exp_avg_sqs, *([model_params] if model_params else []), strict=True))
    count, rate = step if step_tensor is None else step_tensor, lr if lr_tensor is None else lr_tensor
    common = {"betas": (beta1, beta2), "eps": eps, "weight_decay": weight_decay, "adam_w_mode": adam_w_mode, "grad_scale": grad_scale,
              "found_inf": found_inf}
    if serving("adamw", backend, params[0].device.type) == "triton":
        taken, rows = [r for r in rows if _flat_fp32(r)], [r for r in rows if not _flat_fp32(r)]
        on_device = step_tensor is not None or lr_tensor is not None
        t = step_tensor.double() if step_tensor is not None else step
        rate_ = lr_tensor.double() if lr_tensor is not None else lr
        correction1, correction2 = (1 - beta1**t, 1 - beta2**t) if bias_correction else (1.0, 1.0)
        numbers = (1 - rate_ * weight_decay, rate_ / correction1, correction2**0.5)
        if on_device:  # in fp64: 1 - 0.999 would lose five digits in fp32
            numbers = torch.stack([n if isinstance(n, Tensor) else torch.full((), n, dtype=torch.float64, device=params[0].device)
                                   for n in numbers]).float()
        adamw_triton.update(taken, numbers=numbers, **common)
    if rows:
        _in_torch(rows, step=count, lr=rate, bias_correction=bias_correction, **common)


@_adamw_op.register_fake
def _(*arguments):
    return None


def _flat_fp32(row: tuple[Tensor, ...]) -> bool:
    p, g, m, v, *_ = row
    return all(t.dtype == torch.float32 for t in (p, m, v)) and g.dtype != torch.float64 and all(t.is_contiguous() for t in row)


@torch.no_grad()
def adamw_(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor], *, step: int | Tensor,
    lr: float | Tensor, betas: tuple[float, float], eps: float, weight_decay: float, bias_correction: bool = True, adam_w_mode: bool = True,
    model_params: Sequence[Tensor] = (), grad_scale: Tensor | None = None, found_inf: Tensor | None = None, backend: str = "auto",
) -> None:
    """One update of many tensors, in place. Not differentiable.

    Args:
        params, exp_avgs, exp_avg_sqs: lists of one length on one device; the i-th tensors have one shape. fp32 (or fp64) throughout.
        grads: beside them; fp32, fp64, bf16 or fp16.
        step: number of this update, the first is 1; an int, or an integer scalar tensor on the device.
        lr: a number, or a scalar tensor on the device. With tensors for both, a CUDA graph of the call reads them at each replay.
        model_params: bf16 or fp16 weights to set to params, rounded to nearest even; none, or one for each.
        grad_scale: fp32 scalar tensor that gradients are divided by. found_inf: scalar tensor, not 0 = do nothing. Neither is waited for.
        backend: triton, torch, or auto.
    Raises:
        TypeError, ValueError: a dtype, shape, device or length that does not fit, naming it. MissingBackend: the backend cannot serve here.
    """
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if model_params:
        lists["model_params"] = model_params
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            raise ValueError(f"adamw_: {name} has {len(tensors)} tensors, params {len(params)}")
        for i, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
            if tensor.shape != param.shape or tensor.device != params[0].device:
                raise ValueError(f"adamw_: {name}[{i}] has shape {tuple(tensor.shape)} on {tensor.device}, expected {tuple(param.shape)} on "
                                 f"{params[0].device}")
            if name in ("params", "exp_avgs", "exp_avg_sqs") and tensor.dtype not in MAIN or not tensor.is_floating_point():
                raise TypeError(f"adamw_: {name}[{i}] is {tensor.dtype}; weights and moments must be float32 or float64, gradients floating")
    for name, scalar in (("step", step), ("lr", lr), ("grad_scale", grad_scale), ("found_inf", found_inf)):
        if isinstance(scalar, Tensor) and (scalar.numel() != 1 or params and scalar.device != params[0].device):
            raise ValueError(f"adamw_: {name} must be a scalar on {params[0].device}, got shape {tuple(scalar.shape)} on {scalar.device}")
    if not isinstance(step, Tensor):
        check_integer("adamw_", "step", step)
        if step < 1:
            raise ValueError(f"adamw_: step is {step}; the first update is 1")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"adamw_: betas are {betas}; they must be in [0, 1)")
    if grad_scale is not None:
        check_dtype("adamw_", "grad_scale", grad_scale, (torch.float32,))
    if params:
        by_tensor = isinstance(step, Tensor), isinstance(lr, Tensor)
        _adamw_op(
            list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), list(model_params), 0 if by_tensor[0] else step,
            step.reshape(()) if by_tensor[0] else None, 0.0 if by_tensor[1] else lr, lr.reshape(()) if by_tensor[1] else None, *betas, eps,
            weight_decay, bias_correction, adam_w_mode, grad_scale, found_inf, backend)


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay, as megatron-core wants it.

    Args:
        params: tensors or parameter groups; a group may be empty (a rank of the distributed optimizer may own nothing of it).
            fp32 or fp64 when `step` is called, unless master_weights. megatron-core hands over its bf16 weights first and puts fp32 main weights
            in their place. Gradients: any floating dtype.
        lr: learning rate; a group's own `lr`, `betas`, `eps`, `weight_decay`, `bias_correction` go before these defaults.
        adam_w_mode: False = weight decay as L2 in the gradient.
        set_grad_none: what `zero_grad()` does without an argument (Apex's and TE's name); None = set to None, torch's default.
        capturable: `step` in the group is an int32 tensor on the device, and a group's `lr` may be a tensor too: a CUDA graph of `step` counts on
            and reads the rate at each replay (a number is captured as it stands). Gradients must stay where they are, as for any graph, and one
            step comes before the capture.
        master_weights: fp32 main weights for bf16 and fp16 parameters, in their state as `master_param`.
        backend: triton, torch, or auto.
        amsgrad: an option of `FusedAdam` that this class does not have.

    Raises:
        ValueError: a value out of range, or amsgrad.
    """

    def __init__(
        self, params: Iterable, lr: float | Tensor = 1e-3, bias_correction: bool = True, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 0.0, amsgrad: bool = False, *, adam_w_mode: bool = True, set_grad_none: bool | None = None,
        capturable: bool = False, master_weights: bool = False, backend: str = "auto",
    ):
        if amsgrad:
            raise ValueError("AdamW: amsgrad=True is not supported")
        if isinstance(lr, Tensor) and not capturable:
            raise ValueError("AdamW: lr is a tensor; that needs capturable=True")
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= b < 1 for b in betas):
            raise ValueError(f"AdamW: lr={lr}, eps={eps}, weight_decay={weight_decay} must be >= 0 and betas={betas} in [0, 1)")
        self.adam_w_mode, self.capturable, self.master_weights, self.backend = adam_w_mode, capturable, master_weights, backend
        self.set_grad_none = True if set_grad_none is None else set_grad_none
        super().__init__(params, {
            "lr": lr, "bias_correction": bias_correction, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "step": 0})

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        super().zero_grad(set_to_none=self.set_grad_none if set_to_none is None else set_to_none)

    def initialize_state(self, param: Tensor) -> None:
        """Zero moments (and main weights) for one parameter, as `step` makes them when it first sees a gradient."""
        dtype = param.dtype if param.dtype in MAIN or not self.master_weights else torch.float32
        self.state[param]["exp_avg"] = torch.zeros_like(param.data, dtype=dtype)
        self.state[param]["exp_avg_sq"] = torch.zeros_like(param.data, dtype=dtype)
        if dtype != param.dtype:
            self.state[param]["master_param"] = param.detach().to(dtype)

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, which rounds the state of bf16 parameters to bf16: here the fp32 tensors of the state stay what they are."""
        super().load_state_dict(state_dict)
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        for key, param in zip(saved, (p for group in self.param_groups for p in group["params"]), strict=True):
            if param.dtype not in MAIN:
                for name, value in state_dict["state"].get(key, {}).items():
                    if isinstance(value, Tensor) and value.dtype in MAIN:
                        self.state[param][name] = value.to(param.device, copy=True)

    def _count(self, group: dict, found_inf: Tensor | None) -> int | Tensor:
        """The number of this update; the group's `step` is counted on, but not where found_inf says that nothing will be done."""
        if not self.capturable:
            group["step"] = int(group["step"]) + 1  # a checkpoint of a capturable one holds a tensor
            return group["step"]
        device = next((p.device for g in (group, *self.param_groups) for p in g["params"]), torch.device("cpu"))
        if not isinstance(group["step"], Tensor) or group["step"].device != device:
            group["step"] = torch.as_tensor(group["step"], dtype=torch.int32, device=device)
        group["step"].add_(1 if found_inf is None else (found_inf == 0).reshape(()))
        return group["step"]

    @torch.no_grad()
    def step(self, closure: Callable | None = None, *, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> Tensor | None:
        """One update of every parameter that has a gradient. The group's `step` counts calls, so that all groups, empty ones too, agree.

        grad_scale (gradients are divided by it) and found_inf (not 0: nothing is done, nothing is counted) are scalar tensors on the device that
        are not waited for; found_inf needs capturable, because an int cannot count on what the host does not know.
        """
        if found_inf is not None and not self.capturable:
            raise ValueError("AdamW: found_inf needs capturable=True")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            count = self._count(group, found_inf)
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if p.dtype not in MAIN and not self.master_weights:
                    raise TypeError(f"AdamW updates fp32 main weights, got a parameter of {p.dtype}; master_weights=True keeps some")
                if not self.state[p]:
                    self.initialize_state(p)
            for plain in (True, False):
                mine = [p for p in params if (p.dtype in MAIN) == plain]
                state = [self.state[p] for p in mine]
                if not plain:
                    for p, s in zip(mine, state, strict=True):
                        if "master_param" not in s:  # a checkpoint made without main weights
                            s["master_param"] = p.detach().float()
                if mine:
                    adamw_(
                        mine if plain else [s["master_param"] for s in state], [p.grad for p in mine], [s["exp_avg"] for s in state],
                        [s["exp_avg_sq"] for s in state], step=count, lr=group["lr"], betas=group["betas"], eps=group["eps"],
                        weight_decay=group["weight_decay"], bias_correction=group["bias_correction"], adam_w_mode=self.adam_w_mode,
                        model_params=() if plain else mine, grad_scale=grad_scale, found_inf=found_inf, backend=self.backend)
        return loss
