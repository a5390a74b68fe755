"""Checkpoints over two ranks, spawned once for all checks: every layout into every other, resume, formats, agreement on failures.

This file is also the rank: `python test_checkpoint_ranks.py DIRECTORY` under RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT.
"""
import faulthandler
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from spawn import spawn

pytestmark = pytest.mark.both
LAYOUTS = {"tp2": {"tp": 2, "sp": True}, "pp2": {"pp": 2}, "pp2vpp2": {"pp": 2, "vpp": 2}, "dp2": {}, "one": {}}


# ---- a rank --------------------------------------------------------------------------------------------------------------------


class Rank:
    """Builds engines, runs steps on data that depends on the step alone, saves and loads."""

    def __init__(self, directory: Path):
        from megatron_ext.platform import connect, install

        self.directory = directory
        self.platform = install("cpu")
        connect(self.platform, 60)
        import torch.distributed as dist

        self.rank = dist.get_rank()
        self.facts: dict = {}

    def engine(self, name: str, *, form: str = "fully_reshardable", dtype: str = "fp32", hidden: int = 64):
        """`one` is an engine of each rank's own: torch waits for ever when ranks have made different numbers of groups."""
        from megatron_ext.config.schema import CheckpointConfig, Config, ModelConfig, ParallelConfig, PrecisionConfig
        from megatron_ext.parallel.layout import Layout
        from megatron_ext.train.engine import Engine

        ranks = (self.rank,) if name == "one" else (0, 1)
        model = ModelConfig(
            num_layers=4, hidden_size=hidden, num_attention_heads=4, num_query_groups=2, max_sequence_length=32, tied_embeddings=name != "dp2" and hidden == 32
        )  # fmt: skip
        config = Config(
            model=model, parallel=ParallelConfig(**LAYOUTS[name]), precision=PrecisionConfig(dtype=dtype), checkpoint=CheckpointConfig(format=form)
        )  # fmt: skip
        return Engine(config, Layout(**LAYOUTS[name], ranks=ranks), self.platform, vocab_size=100)

    def steps(self, engine, first: int, last: int) -> list[float]:
        import torch

        from megatron_ext.data.batches import Batch

        losses = []
        for step in range(first, last):
            tokens = torch.randint(0, 100, (8, 33), generator=torch.Generator().manual_seed(step))
            batches = []
            for part in tokens.chunk(engine.layout.dp)[engine.groups.dp.rank()].split(2):
                batch = Batch(
                    tokens=part[:, :-1].contiguous(), labels=part[:, 1:].contiguous(), loss_mask=torch.ones(2, 32), documents=None,
                    position_ids=torch.arange(32)[None].expand(2, -1),
                )  # fmt: skip
                batches.append(batch)
            losses.append(engine.step(batches, lr=1e-3, step=step).loss)
        return losses

    def state(self, engine, *, gathered: bool = False) -> dict:
        with engine.complete_weights():
            if not gathered:
                return engine.sharded_state(loading=False)
            model = engine.sharded_state(loading=False, weights_only=True)
            metadata = {"distrib_optim_sharding_type": engine.config.checkpoint.format, "dp_cp_group": engine.groups.dp_cp}
            return model | {"optimizer": engine.optimizer.sharded_state_dict(model, is_loading=False, metadata=metadata)}

    def save(self, engine, name: str, step: int = 1, *, gathered: bool = False) -> Path:
        from megatron_ext.checkpoint import Checkpoints

        form = engine.config.checkpoint.format
        alone = "" if engine.layout.ranks == (0, 1) or self.rank == 0 else "-rank1"
        store = Checkpoints(self.directory / f"{name}{alone}", keep=0, background=True, sharding=form, group=engine.groups.intra_dist_opt)
        layout = {"tp": engine.layout.tp, "pp": engine.layout.pp, "vpp": engine.layout.vpp, "dp": engine.layout.dp}
        store.save(step, self.state(engine, gathered=gathered), {"layout": layout})
        store.wait()
        store.close()
        return store.newest()

    def load(self, engine, path: Path, *, weights_only: bool = False, **settings) -> None:
        from megatron_ext.checkpoint import load

        sharded = engine.sharded_state(loading=True, weights_only=weights_only)
        engine.load_state(load(path, sharded, group=engine.groups.intra_dist_opt, **settings))

    def compare(self, fact: str, a: Path, b: Path) -> None:
        from megatron_ext.checkpoint.compare import compare

        if self.rank == 0:
            self.facts[fact] = compare(a, b)

    def every_layout_into_every_other(self) -> None:
        for name in LAYOUTS:
            engine = self.engine(name)
            losses = self.steps(engine, 0, 2)
            self.save(engine, name)
            self.facts[f"losses {name}"] = losses + self.steps(engine, 2, 4)
            end = self.save(engine, f"{name}-end", 2)
            self.barrier()
            path = self.directory / name / "step_00000001"
            for other in LAYOUTS:
                loaded = self.engine(other)
                self.load(loaded, path)
                again = self.save(loaded, f"{name}-{other}")
                self.compare(f"{name} into {other}", path, again)
                after = self.steps(loaded, 2, 4)
                self.facts[f"resume {name} {other}"] = after
                if other == name:
                    self.compare(f"end {name}", end, self.save(loaded, f"{name}-{other}", 2))
            self.barrier()

    def ungathered(self) -> None:
        for name in ("tp2", "pp2", "dp2"):
            for dtype in ("fp32", "bf16"):
                engine = self.engine(name, dtype=dtype, hidden=32)
                self.steps(engine, 0, 2)
                paths = [self.save(engine, f"own-{name}-{dtype}"), self.save(engine, f"gathered-{name}-{dtype}", gathered=True)]
                self.compare(f"ungathered {name} {dtype}", *paths)
                if name == "dp2" and dtype == "fp32" and self.rank == 0:
                    self.facts["written by each rank"] = [file.stat().st_size for file in sorted(paths[0].glob("*.bin"))]
                    self.stale(paths[0])

    def stale(self, path: Path) -> None:
        """Under overlap the weights are gathered only by the next forward pass: what was saved has to be the complete ones."""
        import torch

        from megatron_ext.checkpoint.read import Stored

        with Stored(path) as stored:
            keys = [key for key in stored.tensors if not key.startswith("optimizer")]
            self.facts["weights that differ from main weights"] = [
                key for key in keys if not torch.equal(stored.whole(key), stored.whole(f"optimizer.state.param.{key}"))
            ]

    def fast_format(self) -> None:
        for name in ("tp2", "pp2", "pp2vpp2", "dp2"):
            engine = self.engine(name, form="dp_reshardable")
            self.steps(engine, 0, 2)
            path = self.save(engine, f"fast-{name}")
            later = self.steps(engine, 2, 4)
            same = self.engine(name, form="dp_reshardable")
            self.load(same, path)
            self.compare(f"fast {name}", path, self.save(same, f"fast-{name}-again"))
            self.facts[f"fast {name} resumes"] = self.steps(same, 2, 4) == later
            other = "pp2" if name == "tp2" else "tp2"
            moved = self.engine(other, form="dp_reshardable")
            layout = {"tp": moved.layout.tp, "pp": moved.layout.pp, "vpp": moved.layout.vpp, "dp": moved.layout.dp}
            self.facts[f"fast {name} elsewhere"] = [
                self.refused(lambda m=moved, p=path, e=expect: self.load(m, p, expect=e)) for expect in ({"layout": layout}, None)
            ]
            self.load(moved, path, weights_only=True)
            weights = self.save(moved, f"fast-{name}-moved")
            if self.rank == 0:
                from megatron_ext.checkpoint.compare import compare

                lines = compare(path, weights, tensors_only=True)
                self.facts[f"fast {name} weights"] = [line for line in lines if "optimizer" not in line]

    def refused(self, work) -> str:
        from megatron_ext.errors import UserError

        try:
            work()
        except UserError as error:
            return str(error)
        return ""

    def agreement(self) -> None:
        """One rank's trouble is everybody's."""
        from megatron_ext.checkpoint import Checkpoints

        class Log(list):
            def write(self, kind, **fields):
                self.append([kind, fields.get("step"), fields.get("reason")])

        log, engine = Log(), self.engine("dp2", hidden=256)
        store = Checkpoints(self.directory / "agree", keep=2, background=True, sharding="fully_reshardable", events=log)
        kinds = []
        for step in range(1, 5):
            if self.rank == 1 and step == 2:
                os.kill(store.writer_pid, signal.SIGSTOP)  # else it may have answered before this rank is run again to kill it
            store.save(step, self.state(engine), {})
            if self.rank == 1 and step == 2:
                os.kill(store.writer_pid, signal.SIGKILL)
            polls = []
            while store.pending is not None:
                self.steps(engine, step, step + 1)
                began = time.perf_counter()
                store.poll()
                polls.append(time.perf_counter() - began)
            kinds.append((store.pending, len(polls)))
            self.facts[f"poll seconds {step}"] = sorted(polls)
        self.facts["agreed"] = log
        self.facts[f"polls of rank {self.rank}"] = kinds
        self.facts["kept"] = sorted(path.name for path in (self.directory / "agree").iterdir())
        store.wait()
        self.barrier()
        path = store.newest()
        victim = path / "shard_00001.bin"
        content = victim.read_bytes()
        self.barrier()
        if self.rank == 1:
            victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        self.barrier()
        self.facts[f"flipped byte on rank {self.rank}"] = self.refused(lambda: self.load(engine, path))
        if self.rank == 1:
            victim.write_bytes(content)
        self.barrier()
        small = self.engine("dp2", hidden=32)
        self.facts[f"wrong size on rank {self.rank}"] = self.refused(lambda: self.load(small, path))
        store.close()

    def barrier(self) -> None:
        import torch.distributed as dist

        dist.barrier()


def main(directory: Path) -> None:
    faulthandler.dump_traceback_later(500, exit=True)  # five times what it takes on two busy cores
    rank = Rank(directory)
    for part in (rank.every_layout_into_every_other, rank.ungathered, rank.fast_format, rank.agreement):
        began = time.monotonic()
        part()
        rank.facts[f"seconds of {part.__name__}"] = time.monotonic() - began
    (directory / f"facts{rank.rank}.json").write_text(json.dumps(rank.facts))
    from megatron_ext.platform import disconnect

    disconnect()


# ---- the tests -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> dict:
    directory = tmp_path_factory.mktemp("ranks")
    spawn([__file__, str(directory)], 2, timeout=540)
    return json.loads((directory / "facts1.json").read_text()) | json.loads((directory / "facts0.json").read_text())


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_into_every_other(facts, name):
    """Loaded in another layout and saved again, every weight, moment and hyper-parameter is the same, bit for bit."""
    for other in LAYOUTS:
        assert facts[f"{name} into {other}"] == [], other


@pytest.mark.parametrize("name", LAYOUTS)
def test_resume(facts, name):
    assert facts[f"resume {name} {name}"] == facts[f"losses {name}"][2:]
    assert facts[f"end {name}"] == []
    for other in LAYOUTS:
        assert facts[f"resume {name} {other}"] == pytest.approx(facts[f"losses {name}"][2:], rel=2e-6), other


def test_ungathered_state_is_what_megatron_core_gathers(facts):
    """Fails when upstream changes the gathered form or the private names that `checkpoint/optimizer.py` reads."""
    for name in ("tp2", "pp2", "dp2"):
        for dtype in ("fp32", "bf16"):
            assert facts[f"ungathered {name} {dtype}"] == []
    first, second = facts["written by each rank"]
    assert abs(first - second) < 0.1 * (first + second)
    assert facts["weights that differ from main weights"] == []


@pytest.mark.parametrize("name", ["tp2", "pp2", "pp2vpp2", "dp2"])
def test_fast_format(facts, name):
    assert facts[f"fast {name}"] == [] and facts[f"fast {name} resumes"] and facts[f"fast {name} weights"] == []
    for message in facts[f"fast {name} elsewhere"]:
        assert "dp_reshardable" in message and "checkpoint.format=fully_reshardable" in message and "checkpoint.weights_only=true" in message


def test_agreement(facts):
    assert [[kind, step] for kind, step, _ in facts["agreed"]] == [["save", 1], ["save_failed", 2], ["save", 3], ["save", 4]]
    assert "rank 1: the writer process died (signal 9)" in facts["agreed"][1][2]
    assert facts["polls of rank 0"] == facts["polls of rank 1"]
    assert facts["kept"] == ["step_00000003", "step_00000004"]
    assert facts["flipped byte on rank 0"] == facts["flipped byte on rank 1"]
    assert "shard_00001.bin is damaged" in facts["flipped byte on rank 0"] and "step_00000003" in facts["flipped byte on rank 0"]
    assert facts["wrong size on rank 0"] == facts["wrong size on rank 1"]
    assert "has shape" in facts["wrong size on rank 0"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
