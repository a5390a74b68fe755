"""AdamW: Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101; Adam: Kingma & Ba 2015, arXiv 1412.6980).

With gradient g, step t = 1, 2, ..., learning rate a, decay w:

    m_t = b1 m_{t-1} + (1 - b1) g            first moment   (`exp_avg`)
    v_t = b2 v_{t-1} + (1 - b2) g^2          second moment  (`exp_avg_sq`)
    p  <- p (1 - a w)                        decay, apart from the gradient (adam_w_mode; else g <- g + w p, Adam with L2)
    p  <- p - a / (1 - b1^t) * m_t / (sqrt(v_t) / sqrt(1 - b2^t) + eps)

The class has the interface of Apex's and Transformer Engine's `FusedAdam`, which megatron-core's distributed optimizer and its
checkpoints are written against: `step` is an int in the parameter *group*, the state of a parameter is `exp_avg` and `exp_avg_sq`.
It serves CPU and CUDA. The update of a whole group is one call of torch's own fused kernel (one pass over memory); what that kernel
does not take (no bias correction, strided tensors) goes through `adamw_reference_`, which is also what the kernel is tested against.

Measured on one CPU thread, 4.3 M parameters in 27 tensors: 2.4 ms, torch.optim.AdamW(fused=True) 2.8 ms, a loop over tensors 10.2 ms,
`torch._foreach_*` 16.2 ms (`python benchmarks/bench_adamw.py`).
"""
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


def adamw_reference_(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, step: int, lr: float, betas: tuple[float, float], eps: float,
    weight_decay: float, bias_correction: bool = True, adam_w_mode: bool = True,
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
    param.addcdiv_(exp_avg, (exp_avg_sq.sqrt() / correction2**0.5).add_(eps), value=-lr / correction1)


def adamw_(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor], *, step: int, lr: float,
    betas: tuple[float, float], eps: float, weight_decay: float, bias_correction: bool = True, adam_w_mode: bool = True,
) -> None:
    """One update of many tensors, in place.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: lists of one length; the i-th tensors have one shape and device. fp32 (or fp64) throughout.
        step: number of this update, the first is 1.
    """
    fused, rest = defaultdict(list), []
    for row in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        # The fused kernel walks flat memory, so it needs the same order of elements in all four tensors.
        if bias_correction and all(t.is_contiguous() for t in row):
            fused[row[0].device, row[0].dtype].append(row)
        else:
            rest.append(row)
    kernel = torch._fused_adamw_ if adam_w_mode else torch._fused_adam_
    for (device, _), rows in fused.items():
        p, g, m, v = (list(column) for column in zip(*rows, strict=True))
        count = torch.full((), float(step), dtype=torch.float32, device=device)
        kernel(p, g, m, v, [], [count] * len(p), lr=lr, beta1=betas[0], beta2=betas[1], weight_decay=weight_decay, eps=eps,
               amsgrad=False, maximize=False)
    for p, g, m, v in rest:
        adamw_reference_(p, g, m, v, step=step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
                         bias_correction=bias_correction, adam_w_mode=adam_w_mode)


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay, as megatron-core wants it.

    Args:
        params: tensors or parameter groups; a group may be empty (a rank of the distributed optimizer may own nothing of it).
            fp32 or fp64 when `step` is called. megatron-core hands over its bf16 weights first and puts fp32 main weights in their place.
        lr: learning rate; a group's own `lr`, `betas`, `eps`, `weight_decay`, `bias_correction` go before these defaults.
        adam_w_mode: False = weight decay as L2 in the gradient.
        set_grad_none: what `zero_grad()` does without an argument (Apex's and TE's name); None = set to None, torch's default.
        amsgrad, capturable, master_weights: options of `FusedAdam` that this class does not have.

    Raises:
        ValueError: a value out of range, or one of those three is asked for.
    """

    def __init__(
        self, params: Iterable, lr: float = 1e-3, bias_correction: bool = True, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 0.0, amsgrad: bool = False, *, adam_w_mode: bool = True, set_grad_none: bool | None = None,
        capturable: bool = False, master_weights: bool = False,
    ):
        for name, asked in (("amsgrad", amsgrad), ("capturable", capturable), ("master_weights", master_weights)):
            if asked:
                raise ValueError(f"AdamW: {name}={asked} is not supported")
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= b < 1 for b in betas):
            raise ValueError(f"AdamW: lr={lr}, eps={eps}, weight_decay={weight_decay} must be >= 0 and betas={betas} in [0, 1)")
        self.adam_w_mode = adam_w_mode
        self.set_grad_none = True if set_grad_none is None else set_grad_none
        super().__init__(params, {
            "lr": lr, "bias_correction": bias_correction, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "step": 0})

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        super().zero_grad(set_to_none=self.set_grad_none if set_to_none is None else set_to_none)

    def initialize_state(self, param: Tensor) -> None:
        """Zero moments for one parameter, as `step` makes them when it first sees a gradient."""
        self.state[param]["exp_avg"] = torch.zeros_like(param.data)
        self.state[param]["exp_avg_sq"] = torch.zeros_like(param.data)

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Tensor | None:
        """One update of every parameter that has a gradient. The group's `step` counts calls, so that all groups, empty ones too, agree."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["step"] += 1
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if p.dtype not in (torch.float32, torch.float64):
                    raise TypeError(f"AdamW updates fp32 main weights, got a parameter of {p.dtype}")
                if not self.state[p]:
                    self.initialize_state(p)
            if params:
                adamw_(
                    params, [p.grad.to(p.dtype) for p in params], [self.state[p]["exp_avg"] for p in params],
                    [self.state[p]["exp_avg_sq"] for p in params], step=group["step"], lr=group["lr"], betas=group["betas"],
                    eps=group["eps"], weight_decay=group["weight_decay"], bias_correction=group["bias_correction"],
                    adam_w_mode=self.adam_w_mode)
        return loss
