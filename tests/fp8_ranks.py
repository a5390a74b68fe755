"""The stack of FP8 layers of test_fp8_layers.py, and a rank of its two: trains it in layouts of one and of two ranks and writes down what
happened.

    python tests/fp8_ranks.py DIRECTORY      under RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT
"""
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from kernels.fp8_scaling import Fp8Recipe

HIDDEN, FFN, BLOCKS, SEQUENCE, BATCH, STEPS = 128, 512, 3, 16, 2, 4
RECIPES = {"current": Fp8Recipe(), "delayed": Fp8Recipe("delayed", history=3), "blockwise": Fp8Recipe("blockwise")}


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Block(torch.nn.Module):
    """x + row(gelu(column(x))), on [seq, batch, hidden]."""

    def __init__(self, config, tp, linears, index: int):
        super().__init__()
        column, row = linears
        self.up = column(HIDDEN, FFN, config=config, init_method=None, bias=True, skip_bias_add=False, gather_output=False, tp_group=tp)
        self.down = row(FFN, HIDDEN, config=config, init_method=None, bias=True, input_is_parallel=True, skip_bias_add=False, tp_group=tp)
        part = FFN // tp.size()
        own = slice(tp.rank() * part, (tp.rank() + 1) * part)
        with torch.no_grad():
            self.up.weight.copy_(draw(FFN, HIDDEN, seed=10 * index)[own] / HIDDEN**0.5)
            self.down.weight.copy_(draw(HIDDEN, FFN, seed=10 * index + 1)[:, own] / FFN**0.5)
            self.up.bias.zero_(), self.down.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(x)[0]))[0]


def stack(recipe, groups, *, sp: bool = False, dtype: torch.dtype = torch.float32, linears=None, **settings) -> torch.nn.Sequential:
    """BLOCKS blocks in the layout of `groups`, the same weights in every layout."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_ext.models.fp8 import fp8_linears

    config = TransformerConfig(
        num_layers=BLOCKS, hidden_size=HIDDEN, num_attention_heads=4, use_cpu_initialization=True, perform_initialization=False,
        tensor_model_parallel_size=groups.tp.size(), sequence_parallel=sp, params_dtype=dtype, bf16=dtype == torch.bfloat16, **settings)
    return torch.nn.Sequential(*(Block(config, groups.tp, linears or fp8_linears(recipe), index) for index in range(BLOCKS)))


def step(model: torch.nn.Sequential, groups, number: int, *, lr: float = 0.05, micro: int = 2,
         run=lambda model, x: model(x)) -> tuple[float, list]:
    """One step of SGD on `micro` micro-batches: the loss, and the gradient norm of each whole parameter."""
    from megatron_ext.models.fp8 import update_scales

    config, tp = model[0].up.config, groups.tp
    total = 0.0
    for index in range(micro):
        x, target = (draw(SEQUENCE, BATCH, HIDDEN, seed=1000 * number + index + more) for more in (0, 500))
        if config.sequence_parallel:
            x, target = (t.chunk(tp.size())[tp.rank()] for t in (x, target))
        y = run(model, x.to(config.params_dtype).requires_grad_())
        loss = (y.float() - target).square().sum() / (micro * SEQUENCE * BATCH * HIDDEN)
        loss.backward()
        total += float(loss.detach())
    sums = []
    with torch.no_grad():
        if config.sequence_parallel:
            whole = torch.tensor([total], dtype=torch.float64)
            dist.all_reduce(whole, group=tp)
            total = float(whole)
        for name, parameter in model.named_parameters():
            if config.sequence_parallel and name.endswith("down.bias"):
                dist.all_reduce(parameter.grad, group=tp)
            square = parameter.grad.double().square().sum()
            if tp.size() > 1 and not name.endswith("down.bias"):
                dist.all_reduce(square, group=tp)
            sums.append(float(square.sqrt()))
            parameter -= lr * parameter.grad
            parameter.grad = None
    update_scales([model], groups)
    return total, sums


def seen(module) -> torch.Tensor:
    """The amaxes of the steps that a layer remembers."""
    return module.fp8_history.view(torch.float32).clone()


def train(recipe, groups, *, sp: bool = False) -> dict:
    model = stack(recipe, groups, sp=sp)
    steps = [step(model, groups, number) for number in range(STEPS)]
    facts = {"losses": [s[0] for s in steps], "norms": [s[1] for s in steps]}
    if recipe.kind == "delayed":
        facts["histories"] = {name: seen(module) for name, module in model.named_modules() if hasattr(module, "fp8_history")}
    return facts


def once(recipe, groups, *, sp: bool = False) -> dict:
    """One block forward and backward on the same tensors in every layout: this rank's output and gradients."""
    block, tp = stack(recipe, groups, sp=sp)[0], groups.tp
    x, dy = draw(SEQUENCE, BATCH, HIDDEN, seed=77), draw(SEQUENCE, BATCH, HIDDEN, seed=78)
    if sp:
        x, dy = (t.chunk(tp.size())[tp.rank()] for t in (x, dy))
    x = x.clone().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = block(x)
    y.backward(dy)
    x_t = [t for t in kept if t.dtype == torch.uint8 and t.shape[0] == HIDDEN]
    return {"y": y.detach(), "dx": x.grad, "kept": sum(t.numel() for t in x_t), "up": block.up.weight.grad, "down": block.down.weight.grad}


def sharded(model: torch.nn.Sequential, groups) -> dict:
    """As megatron-core's TransformerBlock makes it: one name for all layers, the layer is the first axis."""
    state = {}
    for index, block in enumerate(model):
        for name in ("up", "down"):
            part = getattr(block, name).sharded_state_dict(f"layers.{name}.", ((0, index, BLOCKS),), {"dp_cp_group": groups.dp_cp})
            state |= {f"{index}.{key.removeprefix('layers.')}": value for key, value in part.items()}
    return {"model": state}


def moved(directory: Path, two, alone) -> dict:
    """Two steps on two ranks, saved; loaded by one rank and by two, and a third step each."""
    from megatron_ext.checkpoint import Checkpoints, load

    recipe = RECIPES["delayed"]
    model = stack(recipe, two)
    for number in range(2):
        step(model, two, number)
    store = Checkpoints(directory / "checkpoints", keep=0, background=False, sharding="fully_reshardable")
    store.save(2, sharded(model, two), {"layout": {"tp": 2}})
    store.wait(), store.close()
    again, single = stack(recipe, two), stack(recipe, alone)
    again.load_state_dict(load(store.newest(), sharded(again, two), group=two.tp)["model"])
    single.load_state_dict(load(store.newest(), sharded(single, alone), group=alone.tp)["model"])
    kept = [[block.up.fp8_history.clone() for block in m] for m in (model, again, single)]
    return {"histories": kept, "third": [step(m, g, 2)[0] for m, g in ((model, two), (again, two), (single, alone))]}


def main(directory: Path) -> None:
    from megatron_ext import platform
    from megatron_ext.parallel.groups import build_groups
    from megatron_ext.parallel.layout import Layout

    platform.quiet()
    device = platform.install("cpu")
    platform.connect(device, 120)
    rank, facts = dist.get_rank(), {}
    alone, two = build_groups(Layout(ranks=(rank,)), 120), build_groups(Layout(tp=2, ranks=(0, 1)), 120)
    for name, recipe in RECIPES.items():
        facts[name] = {"one": train(recipe, alone), "tp2": train(recipe, two), "sp": train(recipe, two, sp=True)}
        facts[name]["once"] = {"one": once(recipe, alone), "tp2": once(recipe, two), "sp": once(recipe, two, sp=True)}
    # Data parallel: two ranks that see different micro-batches must agree on what was seen.
    data = build_groups(Layout(ranks=(0, 1)), 120)
    model = stack(RECIPES["delayed"], data)
    step(model, data, rank, lr=0.0)
    single = stack(RECIPES["delayed"], alone)
    step(single, alone, rank, lr=0.0)
    facts["dp"] = {"together": seen(model[0].up), "alone": seen(single[0].up)}
    facts["moved"] = moved(directory, two, alone)
    torch.save(facts, directory / f"rank{rank}.pt")
    dist.barrier()
    platform.disconnect()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
