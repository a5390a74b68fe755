"""A rank of test_parity.py and of benchmarks/campaign_parity.py: trains one model in many layouts and writes down every loss and gradient norm.

A layout is a value and may span some of the ranks, so one spawn of four ranks serves all: two layouts of two ranks train side by side on
the ranks (0, 1) and (2, 3), layouts of one rank on each of the four.

    python tests/parity_ranks.py DIRECTORY      under RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; DIRECTORY/data is prepared text
"""
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from spawn import spawn

from megatron_ext.config.schema import (
    Config,
    DataConfig,
    KernelsConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PrecisionConfig,
    TrainConfig,
)

LLAMA = ModelConfig(num_layers=4, hidden_size=256, num_attention_heads=8, num_query_groups=4)
MULTI_HEAD = replace(LLAMA, num_query_groups=None, rotary_percent=0.5, rotary_interleaved=True)
TIED = replace(LLAMA, tied_embeddings=True)
DROPOUT = replace(LLAMA, hidden_dropout=0.1, attention_dropout=0.1)
GPT2 = ModelConfig(
    num_layers=4, hidden_size=256, num_attention_heads=8, max_sequence_length=64, position_embedding="learned", norm="layernorm",
    activation="gelu_tanh", bias=True, qkv_bias=True, tied_embeddings=True,
)
ONE, TP2, SP, PP2, DP2 = {}, {"tp": 2}, {"tp": 2, "sp": True}, {"pp": 2}, {}
INTERLEAVED, TP2PP2 = {"pp": 2, "vpp": 2}, {"tp": 2, "pp": 2}
PLAIN_DP = {"distributed_optimizer": False, "overlap_grad_reduce": False, "overlap_param_gather": False}
DOCUMENTS = {"reset_positions": True, "reset_attention": True}
CP2, ULYSSES = {"cp": 2}, {"cp": 2, "cp_method": "ulysses"}
FP8 = {"dtype": "fp32", "micro": 4}  # fp32 around the FP8 products, so that nothing else hides what a layout does to their scales
SEQUENCE, BATCH, STEPS, WARMUP, RANKS = 32, 8, 20, 10, 4


@dataclass(frozen=True)
class Job:
    """The first `steps` of a training run of `length` steps. `parallel`: of ParallelConfig; `ranks`: how many; `micro`: samples in a micro-batch."""

    name: str
    model: ModelConfig = LLAMA
    parallel: dict = field(default_factory=dict)
    ranks: int = 1
    micro: int = 2
    dtype: str = "fp32"
    data: dict = field(default_factory=dict)
    steps: int = 8
    length: int = STEPS
    kernels: dict = field(default_factory=dict)
    fp8: str | None = None


# In the order in which they run; what is left of a row's ranks is idle, so jobs of two ranks come in pairs, of one rank in fours.
JOBS = (
    Job("one", steps=STEPS), Job("documents/one", data=DOCUMENTS), Job("gpt2/one", GPT2), Job("bf16/one", dtype="bf16", steps=13),
    Job("tied/one", TIED), Job("multi-head/one", MULTI_HEAD), Job("dropout/one", DROPOUT), Job("masked/one", data={"mask_eod_loss": True}),
    Job("micro1", micro=1), Job("micro4", micro=4), Job("full/one", parallel={"recompute": "full"}),
    Job("dropout/full", DROPOUT, parallel={"recompute": "full", "recompute_layers": 2}),
    Job("tp2", parallel=TP2, ranks=2, steps=STEPS), Job("tp2sp", parallel=SP, ranks=2, steps=STEPS),
    Job("pp2", parallel=PP2, ranks=2, steps=STEPS), Job("interleaved", parallel=INTERLEAVED, ranks=2, steps=STEPS),
    Job("dp2", parallel=DP2, ranks=2, steps=STEPS), Job("dp2-plain", parallel=PLAIN_DP, ranks=2),
    Job("tied/pp2", TIED, parallel=PP2, ranks=2), Job("tied/tp2", TIED, parallel=TP2, ranks=2),
    Job("tied/interleaved", TIED, parallel=INTERLEAVED, ranks=2), Job("masked/dp2", data={"mask_eod_loss": True}, ranks=2),
    Job("gpt2/tp2sp", GPT2, parallel=SP, ranks=2), Job("gpt2/pp2", GPT2, parallel=PP2, ranks=2),
    Job("multi-head/tp2", MULTI_HEAD, parallel=TP2, ranks=2), Job("multi-head/pp2", MULTI_HEAD, parallel=PP2, ranks=2),
    Job("full/interleaved", parallel={**INTERLEAVED, "recompute": "full"}, ranks=2),
    Job("selective/tp2sp", parallel={**SP, "recompute": "selective"}, ranks=2),
    Job("full/tp2sp", parallel={**SP, "recompute": "full", "recompute_layers": 4}, ranks=2),
    Job("documents/dp2", data=DOCUMENTS, ranks=2),
    Job("documents/tp2sp", data=DOCUMENTS, parallel=SP, ranks=2), Job("documents/pp2", data=DOCUMENTS, parallel=PP2, ranks=2),
    Job("bf16/tp2sp", parallel=SP, dtype="bf16", ranks=2, steps=13), Job("bf16/pp2", parallel=PP2, dtype="bf16", ranks=2, steps=13),
    Job("bf16/interleaved", parallel=INTERLEAVED, dtype="bf16", ranks=2, steps=13), Job("bf16/dp2", dtype="bf16", ranks=2, steps=13),
    Job("plain", kernels={"layers": "plain"}), Job("fp8/one", fp8="current", **FP8), Job("fp8-delayed/one", fp8="delayed", **FP8),
    Job("fp8-delayed/full", fp8="delayed", parallel={"recompute": "full"}, **FP8),
    Job("cp2", parallel=CP2, ranks=2), Job("ulysses", parallel=ULYSSES, ranks=2),
    Job("documents/cp2", data=DOCUMENTS, parallel=CP2, ranks=2), Job("gpt2/cp2", GPT2, parallel=CP2, ranks=2),
    Job("fp8/tp2sp", fp8="current", parallel=SP, ranks=2, **FP8), Job("fp8-delayed/pp2", fp8="delayed", parallel=PP2, ranks=2, **FP8),
    Job("cp2tp2sp", parallel={**CP2, **SP}, ranks=4), Job("tp2pp2", parallel=TP2PP2, ranks=4, steps=STEPS), Job("tp2dp2", parallel=TP2, ranks=4, steps=STEPS), Job("tied/tp2pp2", TIED, parallel=TP2PP2, ranks=4),
)


def whole_weights(engine) -> dict | None:
    """The whole tensors of the model by name and layer, put together from all ranks; on the layout's first rank, else None. Collective."""
    import torch
    import torch.distributed as dist

    from megatron_ext.models.initialise import sharded_tensors

    parts = []
    for chunk in engine.models:
        for tensor in sharded_tensors(chunk.sharded_state_dict(metadata={"dp_cp_group": engine.groups.dp_cp})):
            if not tensor.data.is_floating_point():
                continue  # FP8's history of scales is no weight
            lead = tensor.prepend_axis_num
            shape = tensor.global_shape[lead:]
            part = tensor.data.detach().reshape(tensor.data.shape[-len(shape):]).clone()
            parts.append((f"{tensor.key}/{tensor.global_offset[:lead]}", tuple(shape), tensor.global_offset[lead:], part))
    first = engine.layout.ranks[0]
    everything = [None] * len(engine.layout.ranks) if dist.get_rank() == first else None
    dist.gather_object(parts, everything, dst=first, group=engine.groups.intra_dist_opt)
    if everything is None:
        return None
    whole: dict[str, torch.Tensor] = {}
    for name, shape, offset, part in (entry for rank in everything for entry in rank):
        target = whole.setdefault(name, torch.full(shape, float("nan"), dtype=part.dtype))
        target[tuple(slice(o, o + n) for o, n in zip(offset, part.shape))] = part
    assert not any(tensor.isnan().any() for tensor in whole.values())
    return whole


def weights_hash(engine) -> str:
    """SHA-256 over `whole_weights`; "" where they are None."""
    whole, digest = whole_weights(engine), hashlib.sha256()
    if whole is None:
        return ""
    for name in sorted(whole):
        digest.update(name.encode() + whole[name].float().numpy().tobytes())
    return digest.hexdigest()


class Trainer:
    """A job on the ranks given, one step at a time."""

    def __init__(self, job: Job, ranks: tuple[int, ...], directory: Path, platform):
        from megatron_ext.data.objective import pretraining_samples
        from megatron_ext.parallel.layout import Layout
        from megatron_ext.train.engine import Engine

        sizes = {key: job.parallel[key] for key in ("tp", "pp", "vpp", "cp", "sp") if key in job.parallel}
        self.config = Config(
            model=job.model, parallel=ParallelConfig(**job.parallel), precision=PrecisionConfig(dtype=job.dtype, fp8=job.fp8),
            kernels=KernelsConfig(**job.kernels),
            data=DataConfig(path=str(directory / "data"), sequence_length=SEQUENCE, **job.data),
            optim=OptimConfig(lr=2e-3, min_lr=2e-4, warmup_steps=WARMUP),  # the rates of `make run` (conf/run.yaml)
            train=TrainConfig(steps=job.length, global_batch_size=BATCH, micro_batch_size=job.micro),
        )
        self.steps = job.steps
        self.samples = pretraining_samples(self.config, ("train",))["train"]
        self.engine = Engine(self.config, Layout(**sizes, ranks=ranks), platform, vocab_size=self.samples.vocab_size)
        self.initial = weights_hash(self.engine)
        self.losses: list[float] = []
        self.norms: list[float] = []

    def step(self) -> None:
        from megatron_ext.data.batches import micro_batches
        from megatron_ext.train.schedule import lr_at

        step, dp = len(self.losses), self.engine.groups.dp
        train = self.config.train
        batches = micro_batches(self.samples, step * BATCH, global_batch=BATCH, micro_batch=train.micro_batch_size, dp_rank=dp.rank(), dp_size=dp.size())
        result = self.engine.step(batches, lr=lr_at(step, self.config.optim, train.steps), step=step)
        assert result.applied
        self.losses.append(result.loss)
        self.norms.append(result.grad_norm)

    def run(self) -> "Trainer":
        for _ in range(self.steps):
            self.step()
        return self

    @property
    def facts(self) -> dict:
        return {"losses": self.losses, "norms": self.norms, "initial": self.initial, "final": weights_hash(self.engine)}


def together(directory: Path, platform) -> dict:
    """Two models of different layouts on the same two ranks, stepped in turns and evaluated between: what RLHF needs."""
    jobs = {"together/tp2sp": Job("", parallel=SP, ranks=2), "together/pp2": Job("", GPT2, parallel=PP2, ranks=2)}
    trainers = {name: Trainer(job, (0, 1), directory, platform) for name, job in jobs.items()}
    for _ in range(8):
        for trainer in trainers.values():
            trainer.step()
    return {name: trainer.facts for name, trainer in trainers.items()}


def main(directory: Path, jobs: Sequence[Job] = JOBS, also: Callable[[Path, object], dict] | None = together, *,
         count: int = RANKS) -> None:
    """Runs the jobs in their order, each on the next of the `count` ranks that it fits on; `also` runs on the ranks 0 and 1 at the end."""
    from megatron_ext.platform import connect, disconnect, install, quiet

    quiet()
    platform = install("cpu")
    connect(platform, 600)
    import torch.distributed as dist

    rank, facts, place = dist.get_rank(), {}, 0
    for job in jobs:
        place = -(-place // job.ranks) * job.ranks % count
        ranks = tuple(range(place, place + job.ranks))
        if rank in ranks:
            began = time.monotonic()
            facts[job.name] = Trainer(job, ranks, directory, platform).run().facts
            if rank == ranks[0]:
                print(f"{job.name}: {job.steps} steps in {time.monotonic() - began:.0f} s", flush=True)
        place += job.ranks
    if also and rank in (0, 1):
        facts |= also(directory, platform)
    (directory / f"rank{rank}.json").write_text(json.dumps(facts))
    dist.barrier()
    disconnect()


# ---- in the process that starts the ranks: no torch ------------------------------------------------------------------------------


def run_ranks(directory: Path, *, script: Path = Path(__file__), arguments: Sequence[str] = (), timeout: float = 540,
              count: int = RANKS) -> dict[str, dict]:
    """`count` ranks of `script DIRECTORY ARGUMENTS`, whose main is the one above.

    Returns the facts of every job: {"losses", "norms", "initial", "final"}. AssertionError where a rank fails or the ranks of a job disagree.
    """
    spawn([str(script), str(directory), *arguments], count, timeout=timeout, show=True)
    found: dict[str, dict] = {}
    for rank in range(count):
        for name, facts in json.loads((directory / f"rank{rank}.json").read_text()).items():
            known = found.setdefault(name, facts)
            assert (known["losses"], known["norms"]) == (facts["losses"], facts["norms"]), f"{name}: its ranks disagree"
            known.update({key: known[key] or facts[key] for key in ("initial", "final")})
    return found


def difference(runs: dict, name: str, reference: str, key: str = "losses", steps: int = STEPS) -> float:
    """The largest relative difference over those of the first `steps` steps that both have."""
    pairs = list(zip(runs[name][key], runs[reference][key]))[:steps]
    return max(abs(a - b) / abs(b) for a, b in pairs)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
