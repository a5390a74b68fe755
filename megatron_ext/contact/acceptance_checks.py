"""The checks of acceptance.py. Each is collective over all ranks, ends everywhere, and then says what it found or raises `Wrong`.

The truth: of collectives, whole numbers whose sums are known; of kernels, the same model on megatron-core's own layers and torch's operations, and
the other ranks, which computed the same; of layouts, one rank; of a resume, the run that went on.
"""
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_ext import platform
from megatron_ext.config.schema import CheckpointConfig, Config, KernelsConfig, LaunchConfig, ModelConfig, ParallelConfig, PrecisionConfig
from megatron_ext.contact import links, network
from megatron_ext.contact.course import Check, Wrong
from megatron_ext.contact.findings import Limits, figure
from megatron_ext.contact.guard import Guard
from megatron_ext.contact.session import Session, node_name
from megatron_ext.platform import Platform

PARITY = 2e-6  # relative, of fp32 losses: what docs/parity.md promises
KERNELS = 1e-5  # fused kernels add in another order
BF16 = 2e-2
WORDS, LENGTH, STEPS = 500, 32, 3
MODEL = ModelConfig(num_layers=4, hidden_size=128, num_attention_heads=8, num_query_groups=8, max_sequence_length=LENGTH)
ON_GPU = replace(MODEL, hidden_size=512)  # heads of a size that GPU kernels are made for
KERNEL_TESTS = ("rms_norm", "layer_norm", "swiglu", "geglu", "bias_gelu", "rope", "attention", "linear_cross_entropy", "fp8", "adamw_triton")


class Checks:
    """What the checks share on this rank."""

    def __init__(self, options, here: Platform, session: Session):
        self.options, self.platform, self.session = options, here, session
        self.device = here.device
        self.nodes: list[str] = []

    def listed(self, connect: Callable[[], None]) -> list[Check]:
        """Those that were asked for, in order. `connect` joins the ranks."""
        network_settings = "NCCL_SOCKET_IFNAME, NCCL_IB_HCA; NCCL_DEBUG=INFO says what NCCL chose" if self.platform.is_cuda else "GLOO_SOCKET_IFNAME"
        every = [
            Check("environment", self.environment, "the same environment on all nodes; make setup, and python -m megatron_ext doctor"),
            Check("devices", lambda: self.devices(connect), f"one task a GPU (--gpus-per-node, --ntasks-per-node), and a network between nodes ({network_settings})",
                  fatal=True),
            Check("collectives", self.collectives, f"run slurm/node_check to find the node; look at the network settings ({network_settings})", fatal=True),
            Check("bandwidth", self.bandwidth, f"run slurm/node_check to find the node; look at the network settings ({network_settings})"),
            Check("kernels", self.kernels, "python -m megatron_ext doctor says what serves each op; kernels.layers=plain leaves our kernels out; --kernel-tests "
                                           "finds the op"),
            Check("parity", self.parity, "wrong collectives or a GPU that computes wrong: run slurm/node_check"),
            Check("checkpoint", self.checkpoint, "look at the file system: do all nodes see --dir, and does it keep what it is given?"),
        ]
        return [check for check in every if check.name in self.options.checks or check.name == "devices"]

    # ---- what is there

    def environment(self) -> str:
        from megatron_ext import doctor

        found = doctor.examine()
        if found["problems"]:
            raise Wrong(f"on {node_name()}: {'; '.join(found['problems'])}")
        packages = found["packages"]
        return f"torch {packages['torch']}, megatron-core {packages['megatron-core']}, Python {found['python']}"

    def devices(self, connect: Callable[[], None]) -> str:
        from megatron_ext.contact import gpus

        connect()
        dist.barrier()
        uuid = str(getattr(torch.cuda.get_device_properties(self.device), "uuid", "")) if self.platform.is_cuda else ""
        mine = {"node": node_name(), "uuid": uuid, "device": self.device.type, "torch": torch.__version__, "count": len(gpus.read_gpus())}
        everybody: list = [None] * self.session.ranks
        dist.all_gather_object(everybody, mine)
        self.nodes = [each["node"] for each in everybody]
        if len({each["device"] for each in everybody}) > 1:
            raise Wrong(f"GPUs on some ranks and none on {', '.join(sorted({each['node'] for each in everybody if each['device'] != 'cuda'}))}")
        if len({each["torch"] for each in everybody}) > 1:
            raise Wrong(f"different torch: {', '.join(sorted({each['node'] + ' ' + each['torch'] for each in everybody}))}")
        used = [(each["node"], each["uuid"]) for each in everybody if each["uuid"]]
        if len(set(used)) < len(used):
            raise Wrong(f"several ranks on one GPU of {next(node for node, uuid in used if used.count((node, uuid)) > 1)}")
        if self.options.gpus is not None and (short := {each["node"] for each in everybody if each["count"] < self.options.gpus}):
            raise Wrong(f"fewer than {self.options.gpus} GPUs on {', '.join(sorted(short))}")
        kind = f"{torch.cuda.get_device_name(self.device)}, NCCL" if self.platform.is_cuda else "CPU, gloo"
        return f"{len(self.nodes)} rank(s) on {len(set(self.nodes))} node(s), {kind}"

    # ---- between ranks

    def collectives(self) -> str:
        from megatron_ext.platform.process_groups import new_group

        me, n = dist.get_rank(), len(self.nodes)
        inside = [rank for rank in range(n) if self.nodes[rank] == self.nodes[me]]
        place = inside.index(me)
        across = [ranks[place] for node in dict.fromkeys(self.nodes) if len(ranks := [r for r in range(n) if self.nodes[r] == node]) > place]
        groups = [("all ranks", list(range(n)))] + [(name, ranks) for name, ranks in (("the node", inside), ("across nodes", across)) if 1 < len(ranks) < n]
        wrong = []
        for name, ranks in groups:
            group = new_group(ranks, "acceptance")
            wrong += [f"{op} over {name}" for op in network.wrong_collectives(group, ranks, self.device)]
        self._all_right("; ".join(wrong))
        return "all-reduce, all-gather, reduce-scatter, broadcast, all-to-all and a ring, each exact, over all ranks, inside nodes and across them"

    def bandwidth(self) -> str:
        found: dict = {}
        guard = Guard(lambda waiting: None)  # the check as a whole has one
        try:
            network.measure(self.nodes, self.device, guard, found, size=(64 if self.platform.is_cuda else 1) << 20, limit=self.options.limit)
        finally:
            guard.close()
        everybody: list = [None] * len(self.nodes)
        dist.all_gather_object(everybody, found)
        notes: list[str] = []
        problems = list(links.judge(self.nodes, everybody, Limits(pair_floor=self.options.pair_floor), notes))
        if problems:
            raise Wrong("; ".join(f"{p.node or 'network'}: {p.what}" for p in problems[:3]) + (f" and {len(problems) - 3} more" if len(problems) > 3 else ""))
        if found.get("all_reduce_gb_s") is None:
            return "one rank: nothing to measure"
        parts = [f"all-reduce {figure(min(each['all_reduce_gb_s'] for each in everybody))} GB/s"]
        for kind in ("inside", "across"):
            speeds = [pair.gb_s for pair in links.pairs_of(everybody) if pair.kind == kind]
            parts += [f"pairs {kind} nodes {figure(min(speeds))} to {figure(max(speeds))} GB/s"] if speeds else []
        return ", ".join([*parts, *notes])

    # ---- the model

    def kernels(self) -> str:
        alone = (dist.get_rank(),)
        losses = {}
        for name, layers, dtype in (("plain", "plain", "fp32"), ("fused", "auto", "fp32"), ("bf16", "auto", "bf16")):
            losses[name] = self._train(self._engine({}, alone, layers=layers, dtype=dtype), 0, 2, batch=8)
        wrong = ""
        if not (off := _off(losses["plain"], losses["fused"])) <= KERNELS:  # nan too
            wrong = f"losses of the layers that training takes are {off:.1e} off those of torch's operations in fp32 (at most {KERNELS:g})"
        elif not (off16 := _off(losses["plain"], losses["bf16"])) <= BF16:
            wrong = f"losses in bf16 are {off16:.1e} off those in fp32 (at most {BF16:g})"
        everybody: list = [None] * len(self.nodes)
        dist.all_gather_object(everybody, losses)
        usual = max(everybody, key=everybody.count)
        if not wrong and losses != usual:
            wrong = f"its losses differ from those of {everybody.count(usual)} other ranks, which computed the same: {losses['fused']} / {usual['fused']}"
        self._all_right(wrong)
        tested = self._kernel_tests() if self.options.kernel_tests else ""
        return f"the layers of training agree with torch's operations to {off:.1e}, and with each other on all ranks to the bit{tested}"

    def _kernel_tests(self) -> str:
        """On the first rank of each node; the others wait."""
        wrong, first = "", self.nodes.index(self.nodes[dist.get_rank()]) == dist.get_rank()
        if first:
            tests = Path(__file__).resolve().parents[2] / "tests"
            files = [str(tests / f"test_{name}.py") for name in KERNEL_TESTS]
            hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID")
            environment = {name: value for name, value in os.environ.items() if name not in hidden}
            try:
                done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", *files], env=environment, capture_output=True, text=True, check=False,
                                      timeout=0.9 * self.options.limit)
                last = (done.stdout.strip().splitlines() or ["pytest said nothing"])[-1]
                wrong = "" if done.returncode == 0 else f"tests of the kernels: {last}"
            except subprocess.TimeoutExpired:
                wrong = "tests of the kernels take longer than --limit"
        self._all_right(wrong)
        return ", and their tests pass"

    def parity(self) -> str:
        n, me = len(self.nodes), dist.get_rank()
        layouts, batch = _layouts(n, self.nodes.count(self.nodes[0])), _batch(n)
        one = self._train(self._engine({}, (0,)), 0, STEPS, batch=batch) if me == 0 else []
        told = [one]
        dist.broadcast_object_list(told, src=0)
        worst, wrong = 0.0, []
        for layout in layouts:
            off = _off(told[0], self._train(self._engine(layout, tuple(range(n))), 0, STEPS, batch=batch))
            worst = max(worst, off)
            wrong += [f"{_name(layout, n)} has losses {off:.1e} off one rank's (at most {PARITY:g})"] if not off <= PARITY else []
        self._all_right("; ".join(wrong))
        if not layouts:
            return "one rank: nothing to compare"
        return f"{', '.join(_name(layout, n) for layout in layouts)} have one rank's losses over {STEPS} steps, to {worst:.1e}"

    def checkpoint(self) -> str:
        from megatron_ext import checkpoint

        n, me = len(self.nodes), dist.get_rank()
        layouts = _layouts(n, self.nodes.count(self.nodes[0]))
        layout, ranks, batch = (layouts[0] if layouts else {}), tuple(range(n)), _batch(n)
        folder = self.options.dir / "checkpoints"
        if me == 0:
            shutil.rmtree(folder, ignore_errors=True)
        dist.barrier()
        before = self._engine(layout, ranks)
        self._train(before, 0, 2, batch=batch)
        first = self._save(before, folder / "half", 2)
        went_on = self._train(before, 2, 4, batch=batch)
        end = self._save(before, folder / "end", 4)
        after = self._engine(layout, ranks, seed=4321)  # other weights: what it goes on from has to come from the files
        after.load_state(checkpoint.load(first, after.sharded_state(loading=True)))
        resumed = self._train(after, 2, 4, batch=batch)
        again = self._save(after, folder / "again", 4)
        wrong = [] if resumed == went_on else [f"losses after the resume are {resumed}, without it {went_on}"]
        dist.barrier()
        if me == 0:
            from megatron_ext.checkpoint.compare import compare

            differing = compare(end, again)
            wrong += [f"{len(differing)} tensors differ after the resume, such as {differing[0]}"] if differing else []
        size = sum(file.stat().st_size for file in first.iterdir())
        self._all_right("; ".join(wrong))
        if me == 0:
            shutil.rmtree(folder, ignore_errors=True)
        return f"{size / 1e6:.1f} MB written by {n} rank(s) ({_name(layout, n)}), read back and resumed to the bit"

    # ---- tools

    def _all_right(self, wrong: str) -> None:
        """Raises `Wrong` on the ranks that have something to say; the others go on to the end of the check."""
        if wrong:
            raise Wrong(wrong)

    def _engine(self, layout: dict, ranks: tuple[int, ...], *, layers: str = "auto", dtype: str = "fp32", seed: int | None = None):
        platform.install(self.options.device)
        from megatron_ext.parallel.layout import Layout
        from megatron_ext.train.engine import Engine

        config = Config(model=ON_GPU if self.platform.is_cuda else MODEL, parallel=ParallelConfig(**layout), precision=PrecisionConfig(dtype=dtype), kernels=KernelsConfig(layers=layers),
                        launch=LaunchConfig(timeout=self.options.limit), checkpoint=CheckpointConfig())
        if seed is not None:
            config = replace(config, train=replace(config.train, seed=seed))
        return Engine(config, Layout(**layout, ranks=ranks), self.platform, vocab_size=WORDS)

    def _train(self, engine, first: int, last: int, *, batch: int) -> list[float]:
        """Losses of steps [first, last); what step k is trained on depends on k alone."""
        from megatron_ext.data.batches import Batch

        losses, dp = [], engine.groups.dp
        for step in range(first, last):
            tokens = torch.randint(0, WORDS, (batch, LENGTH + 1), generator=torch.Generator().manual_seed(step))
            mine = tokens.chunk(dp.size())[dp.rank()]
            batches = [
                Batch(tokens=part[:, :-1].contiguous(), labels=part[:, 1:].contiguous(), loss_mask=torch.ones(len(part), LENGTH), documents=None,
                      position_ids=torch.arange(LENGTH)[None].expand(len(part), -1))
                for part in mine.split(next(size for size in (4, 2, 1) if len(mine) % size == 0))
            ]
            losses.append(engine.step(batches, lr=1e-3, step=step).loss)
        return losses

    def _save(self, engine, folder: Path, step: int) -> Path:
        from megatron_ext.checkpoint import Checkpoints

        store = Checkpoints(folder, keep=0, background=False, sharding=engine.config.checkpoint.format, timeout=self.options.limit)
        try:
            with engine.complete_weights():
                store.save(step, engine.sharded_state(loading=False), {})
            store.wait()
            dist.barrier()
            return store.newest()
        finally:
            store.close()


def _layouts(ranks: int, of_a_node: int) -> list[dict]:
    """Layouts over all ranks, of the model above: tensor parallelism inside a node with sequence parallelism, pipelines, both, and data parallelism."""
    if ranks == 1:
        return []
    tp = max(size for size in (1, 2, 4, 8) if size <= of_a_node and ranks % size == 0)
    found = [{"tp": tp, "sp": True}] if tp > 1 else []
    found += [{"pp": 2}] if ranks % 2 == 0 else []
    found += [{"tp": 2, "pp": 2}] if tp > 1 and ranks % 4 == 0 else []
    return [*found, {}]


def _batch(ranks: int) -> int:
    """Samples of a step: at least 8, and every number of data ranks divides it."""
    return ranks * math.ceil(8 / ranks)


def _dp(layout: dict, ranks: int) -> int:
    return ranks // (layout.get("tp", 1) * layout.get("pp", 1))


def _name(layout: dict, ranks: int) -> str:
    sizes = [f"{kind}{layout[kind]}" for kind in ("tp", "pp") if layout.get(kind, 1) > 1] + [f"dp{_dp(layout, ranks)}" if _dp(layout, ranks) > 1 else ""]
    return " x ".join(size for size in sizes if size).upper() or "one rank"


def _off(right: list[float], found: list[float]) -> float:
    """Largest relative difference; nan where a loss is."""
    return max(abs(b - a) / abs(a) if math.isfinite(a) and math.isfinite(b) else math.nan for a, b in zip(right, found, strict=True))
