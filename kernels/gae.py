"""Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438), and whitening of advantages over the global batch.

With rewards r, values V, discount g and trace decay l, over one rollout whose last position is T and whose value afterwards is `bootstrap`
(0 where the rollout ended, the critic's estimate where it was cut off):

    d_t = r_t + g V_{t+1} - V_t,      A_t = d_t + g l A_{t+1},      returns_t = A_t + V_t,      V_{T+1} = bootstrap, A_{T+1} = 0.

A is a linear recurrence, composition of the maps a -> d_t + c_t a is associative, so it is a scan. The Triton kernel gives one program to a
rollout: it walks chunks from the end, scans each in parallel and carries A to the next. The torch path cuts the flat batch into blocks of 32
positions and walks the 32 steps of all blocks at once, then the blocks' first positions the same way (a recursion of depth log_32), and adds
what comes in: about 32 operations a level where a loop over time takes one a position.

Memory traffic: r, V (and the mask) are read once, A and returns written once: 16 bytes a token in fp32, 1 more with a mask.
Shapes: packed [tokens] with `cu_seqlens` [n + 1], or padded [batch, seq]. Positions that `mask` leaves out are skipped as though they were not
there: they get 0, and whatever stands in them (NaN too) reaches nothing. Advantages are constants of the policy loss: nothing here is differentiable.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import serving
from kernels.checks import check_device, check_dtype, check_group, check_shape, rows_of
from kernels.jit import Launch, on_device_of, tl, triton
from kernels.tiles import scan

MASKS = (torch.bool, torch.int8, torch.uint8, torch.int32, torch.int64)
BLOCK = 32  # steps of the torch path: fewer are more levels, more are more operations a level


def gae_reference(rewards: Tensor, values: Tensor, gamma: float = 1.0, lam: float = 0.95, mask: Tensor | None = None,
                  bootstrap: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The definition for [batch, seq], a loop over time in the inputs' own dtype: what the op is compared with in fp64, and what it replaces."""
    carried, following = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0]) if bootstrap is None else bootstrap
    live = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask.bool()
    found = []
    for t in reversed(range(rewards.shape[1])):
        advantage = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * carried
        carried = torch.where(live[:, t], advantage, carried)
        following = torch.where(live[:, t], values[:, t], following)
        found.append(torch.where(live[:, t], advantage, torch.zeros_like(advantage)))
    advantages = torch.stack(found[::-1], dim=1)
    return advantages, torch.where(live, advantages + values, torch.zeros_like(advantages))


@triton.jit
def _then(c_after, d_after, c, d):
    """The map a -> d + c a, applied after a -> d_after + c_after a. In a reverse scan the later position comes first."""
    return c * c_after, d + c * d_after


@triton.jit
def _nearest(live_after, v_after, live, v):
    return live | live_after, tl.where(live != 0, v, v_after)


@triton.jit
def _gae(r_ptr, v_ptr, mask_ptr, cu_ptr, boot_ptr, a_ptr, g_ptr, seq, r_stride, v_stride, mask_stride, gamma, decay,
         PACKED: tl.constexpr, MASKED: tl.constexpr, BOOT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first, length = row * seq, seq
    if PACKED:
        first = tl.load(cu_ptr + row).to(tl.int64)
        length = (tl.load(cu_ptr + row + 1).to(tl.int64) - first).to(tl.int32)
    r_ptr += first if PACKED else row * r_stride
    v_ptr += first if PACKED else row * v_stride
    mask_ptr += first if PACKED else row * mask_stride
    a_ptr += first
    g_ptr += first
    following = tl.load(boot_ptr + row).to(tl.float32) if BOOT else 0.0  # V at the nearest live position to the right of the chunk
    carried = 0.0
    at = tl.arange(0, BLOCK)
    chunk = (length + BLOCK - 1) // BLOCK
    while chunk > 0:
        chunk -= 1
        t = chunk * BLOCK + at
        inside = t < length
        live = inside
        if MASKED:
            live = inside & (tl.load(mask_ptr + t, mask=inside, other=0) != 0)
        # Loaded under `inside`, whose pattern is known, not under `live`: 16 bytes at a time
        r = tl.where(live, tl.load(r_ptr + t, mask=inside, other=0.0).to(tl.float32), 0.0)
        v = tl.where(live, tl.load(v_ptr + t, mask=inside, other=0.0).to(tl.float32), 0.0)
        later = t + 1 < length
        if MASKED:
            later = later & (tl.load(mask_ptr + t + 1, mask=later, other=0) != 0)
        v_next = tl.load(v_ptr + t + 1, mask=later & (at < BLOCK - 1), other=0.0).to(tl.float32)
        if MASKED:
            found, v_next = tl.associative_scan((((later & (at < BLOCK - 1)).to(tl.int32)), v_next), 0, _nearest, reverse=True)
            v_next = tl.where(found != 0, v_next, following)
        else:
            v_next = tl.where(later & (at < BLOCK - 1), v_next, following)
        delta = tl.where(live, r + gamma * v_next - v, 0.0)
        c = tl.where(live, decay, 1.0)
        product, local = tl.associative_scan((c, delta), 0, _then, reverse=True)
        advantage = local + product * carried
        tl.store(a_ptr + t, tl.where(live, advantage, 0.0), mask=inside)
        tl.store(g_ptr + t, tl.where(live, advantage + v, 0.0), mask=inside)
        carried = tl.sum(tl.where(at == 0, advantage, 0.0), axis=0)
        here = tl.sum(tl.where((at == 0) & live, v, 0.0), axis=0)
        opens = tl.sum(tl.where((at == 0) & live, 1, 0), axis=0)
        ahead = tl.sum(tl.where(at == 0, v_next, 0.0), axis=0)
        following = tl.where(opens != 0, here, ahead)


def _scan(d: Tensor, c: Tensor) -> Tensor:
    """A with A_t = d_t + c_t A_{t+1} along a vector; where c_t is 0 nothing is carried, not even NaN."""
    count = d.numel()
    blocks = max(-(-count // BLOCK), 1)
    width = max(min(BLOCK, count), 1)
    if blocks * width > count:
        d, c = F.pad(d, (0, blocks * width - count)), F.pad(c, (0, blocks * width - count))
    d, c = (x.view(blocks, width).t().clone(memory_format=torch.contiguous_format) for x in (d, c))  # a step of all blocks lies together
    fresh = c == 0
    step = torch.empty_like(d[0])
    for t in range(width - 2, -1, -1):
        torch.mul(c[t], d[t + 1], out=step)
        d[t] += step.masked_fill_(fresh[t], 0)
        c[t] *= c[t + 1]
    if blocks > 1:
        incoming = F.pad(_scan(d[0], c[0])[1:], (0, 1))
        d += (c * incoming).masked_fill_(c == 0, 0)
    return d.t().reshape(-1)[:count]


def _in_torch(rewards: Tensor, values: Tensor, ends: Tensor, sequence: Tensor | None, mask: Tensor | None, bootstrap: Tensor | None,
              gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Flat [tokens], fp32. ends [tokens]: one past the last position of each position's rollout; sequence [tokens]: its index, for bootstrap."""
    at = torch.arange(rewards.numel(), device=rewards.device)
    if mask is None:
        following = at + 1
        last = following >= ends
    else:
        rewards, values = rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)
        none = rewards.numel()
        nearest = torch.where(mask, at, none).flip(0).cummin(0).values.flip(0)
        following = torch.cat((nearest[1:], nearest.new_full((1,), none))) if none else nearest
        last = following >= ends
    v_next = values[following.clamp_(max=max(rewards.numel() - 1, 0))] if rewards.numel() else values
    v_next = v_next.masked_fill(last, 0) if bootstrap is None else torch.where(last, bootstrap[sequence], v_next)
    delta = torch.add(rewards, v_next, alpha=gamma).sub_(values)
    c = torch.full_like(delta, gamma * lam)
    if mask is not None:
        delta.masked_fill_(~mask, 0)
        c.masked_fill_(~mask, 1)
    c.masked_fill_(at + 1 >= ends, 0)
    advantages = _scan(delta, c)
    returns = advantages + values
    if mask is not None:
        advantages, returns = advantages.masked_fill(~mask, 0), returns.masked_fill_(~mask, 0)
    return advantages, returns


def _check_offsets(cu_seqlens: Tensor, tokens: int) -> None:
    """On the CPU an error at once; on a device the kernel's stream fails, because looking would wait for it."""
    right = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == tokens) & (cu_seqlens.diff() >= 0).all()
    if cu_seqlens.device.type != "cpu":
        torch._assert_async(right, "gae: cu_seqlens must rise from 0 to the number of tokens")
    elif not right:
        raise ValueError(f"gae: cu_seqlens must rise from 0 to the number of tokens ({tokens}), got {cu_seqlens.tolist()[:8]} ... {int(cu_seqlens[-1])}")


@torch.library.custom_op("kernels::gae", mutates_args=())
def _gae_op(rewards: Tensor, values: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None, bootstrap: Tensor | None, gamma: float, lam: float,
            backend: str) -> tuple[Tensor, Tensor]:
    packed = cu_seqlens is not None
    if packed:
        _check_offsets(cu_seqlens, rewards.numel())
    rows, seq = (cu_seqlens.numel() - 1, 0) if packed else rewards.shape
    if serving("gae", backend, rewards.device.type) == "triton":
        advantages = rewards.new_empty(rewards.shape, dtype=torch.float32)
        returns = torch.empty_like(advantages)
        if advantages.numel():
            choice = scan(rewards.numel() // rows if packed else seq)
            strides = (0, 0, 0) if packed else (rewards.stride(0), values.stride(0), 0 if mask is None else mask.stride(0))
            with on_device_of(rewards):
                _gae[(rows,)](
                    rewards, values, rewards if mask is None else mask, rewards if cu_seqlens is None else cu_seqlens,
                    rewards if bootstrap is None else bootstrap, advantages, returns, seq, *strides, gamma, gamma * lam,
                    PACKED=packed, MASKED=mask is not None, BOOT=bootstrap is not None, **choice)
        return advantages, returns
    if packed:
        lengths = cu_seqlens.diff()
        sequence = torch.repeat_interleave(lengths, output_size=rewards.numel())
        ends = cu_seqlens[1:][sequence]
    else:
        sequence = torch.arange(rows, device=rewards.device).repeat_interleave(seq)
        ends = (sequence + 1) * seq
    advantages, returns = _in_torch(
        rewards.reshape(-1).float(), values.reshape(-1).float(), ends, sequence, None if mask is None else mask.reshape(-1).bool(),
        None if bootstrap is None else bootstrap.float(), gamma, lam)
    return advantages.view(rewards.shape), returns.view(rewards.shape)


@_gae_op.register_fake
def _(rewards, values, cu_seqlens, mask, bootstrap, gamma, lam, backend):
    return rewards.new_empty(rewards.shape, dtype=torch.float32), rewards.new_empty(rewards.shape, dtype=torch.float32)


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, *, cu_seqlens: Tensor | None = None, mask: Tensor | None = None, gamma: float = 1.0, lam: float = 0.95,
        bootstrap: Tensor | None = None, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Advantages and returns of many rollouts by one scan. Nothing flows back: the results never require gradients.

    Args:
        rewards, values: [tokens] with cu_seqlens, else [batch, seq]; fp32, bf16 or fp16 (arithmetic is fp32).
        cu_seqlens: int32 or int64 [n + 1], rising from 0 to tokens: rollout i is positions cu_seqlens[i] to cu_seqlens[i + 1]. They never mix.
        mask: bool (or an integer type, 0 is out), the shape of rewards: positions that exist. Padding may be left, right, or between.
        gamma, lam: discount and trace decay, in [0, 1].
        bootstrap: [n] or [batch], the value after each rollout's last position; None = 0.
        backend: triton, torch, or auto.
    Returns:
        (advantages, returns): fp32, the shape of rewards; 0 where masked.
    Raises:
        TypeError: a dtype that is not listed. ValueError: a shape, device or number that does not fit, cu_seqlens that do not rise from 0 to tokens.
        MissingBackend: the backend asked for cannot serve here.
    """
    for name, number in (("gamma", gamma), ("lam", lam)):
        if not 0 <= number <= 1:
            raise ValueError(f"gae: {name} is {number}; it must be in [0, 1]")
    check_dtype("gae", "rewards", rewards)
    check_dtype("gae", "values", values)
    if rewards.dim() != (2 if cu_seqlens is None else 1):
        raise ValueError(f"gae: rewards has shape {tuple(rewards.shape)}; it must be [tokens] with cu_seqlens, [batch, seq] without")
    if cu_seqlens is not None:
        check_dtype("gae", "cu_seqlens", cu_seqlens, (torch.int32, torch.int64))
        if cu_seqlens.dim() != 1 or not cu_seqlens.numel():
            raise ValueError(f"gae: cu_seqlens has shape {tuple(cu_seqlens.shape)}, expected (n + 1,)")
    rollouts = rewards.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    for name, tensor, shape in (("values", values, rewards.shape), ("mask", mask, rewards.shape), ("bootstrap", bootstrap, (rollouts,))):
        if tensor is not None:
            check_shape("gae", name, tensor, shape)
    if mask is not None:
        check_dtype("gae", "mask", mask, MASKS)
    if bootstrap is not None:
        check_dtype("gae", "bootstrap", bootstrap)
    for name, tensor in (("rewards", rewards), ("values", values), ("cu_seqlens", cu_seqlens), ("mask", mask), ("bootstrap", bootstrap)):
        if tensor is not None:
            check_device("gae", name, tensor, rewards.device)
            rows_of("gae", name, tensor)
    return _gae_op(rewards.detach(), values.detach(), cu_seqlens, mask, None if bootstrap is None else bootstrap.detach(), gamma, lam, backend)


@torch.no_grad()
def masked_whiten(x: Tensor, mask: Tensor | None = None, *, group: dist.ProcessGroup | None = None, unbiased: bool = False, shift_mean: bool = True,
                  eps: float = 1e-8) -> Tensor:
    """(x - mean) / sqrt(variance + eps) over what the mask leaves in, of all ranks of `group` together; the same however the batch is split.

    Two passes: count and sum are all-reduced, then squared deviations from the common mean; sums are fp64, so that the split moves no bit that
    fp32 can show. Not differentiable.

    Args:
        x: any shape, fp32, bf16 or fp16. mask: its shape, bool or integer; None = all.
        group: ranks that hold the parts of the batch (data parallel, with context parallel where x is split over it); None = x is all of it.
        unbiased: divide by count - 1 (by 1 at least).
        shift_mean: False keeps the mean where it was.
    Returns:
        fp32, 0 where masked.
    Raises:
        TypeError, ValueError: a dtype, shape, device or group that does not fit, naming it.
    """
    check_dtype("masked_whiten", "x", x)
    if mask is not None:
        check_dtype("masked_whiten", "mask", mask, MASKS)
        check_shape("masked_whiten", "mask", mask, x.shape)
        check_device("masked_whiten", "mask", mask, x.device)
    check_group("masked_whiten", "group", group)
    live = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.bool()
    x = x.detach().float().masked_fill(~live, 0)
    sums = torch.stack((live.sum().double(), x.sum(dtype=torch.float64)))
    if group is not None:
        dist.all_reduce(sums, group=group)
    count = sums[0].clamp(min=1)
    mean = sums[1] / count
    deviations = (x.double() - mean).masked_fill_(~live, 0)
    squares = deviations.square().sum()
    if group is not None:
        dist.all_reduce(squares, group=group)
    variance = squares / ((count - 1).clamp(min=1) if unbiased else count)
    white = deviations * torch.rsqrt(variance + eps)
    return (white if shift_mean else white + mean).float().masked_fill_(~live, 0)


def launches() -> list[Launch]:
    """Every configuration of the tile table, for the static check. Packed rollouts start anywhere, so only padded ones load 16 bytes at a time."""
    found = []
    for length in (256, 1024):
        choice = scan(length)
        warps = choice.pop("num_warps")
        for dtype in ("fp32", "bf16"):
            for packed in (False, True):
                for masked in (False, True):
                    data = f"*{dtype}"
                    found.append(Launch(
                        "gae", f"{'packed' if packed else 'padded'}{' masked' if masked else ''} T<={choice['BLOCK']} {dtype}", _gae,
                        {"r_ptr": data, "v_ptr": data, "mask_ptr": "*i1", "cu_ptr": "*i32", "boot_ptr": data, "a_ptr": "*fp32", "g_ptr": "*fp32",
                         "seq": "i32", "r_stride": "i32", "v_stride": "i32", "mask_stride": "i32", "gamma": "fp32", "decay": "fp32"},
                        {"PACKED": packed, "MASKED": masked, "BOOT": True, **choice}, warps,
                        multiples_of_16=("seq", "r_stride", "v_stride", "mask_stride"), memory_bound=not packed))
    return found
