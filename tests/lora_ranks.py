"""A rank of test_lora.py: trains adapters in many layouts on two ranks, saves, loads, generates, and writes down what it got.

    python tests/lora_ranks.py DIRECTORY      under RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT
"""
import json
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from megatron_ext.config.schema import (
    Config,
    GenerateConfig,
    KernelsConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PrecisionConfig,
)

WORDS, SEQUENCE, STEPS = 100, 32, 4
LLAMA = ModelConfig(num_layers=4, hidden_size=64, num_attention_heads=4, num_query_groups=2, max_sequence_length=64, init_std=0.1)
GPT2 = replace(LLAMA, num_layers=2, num_query_groups=None, position_embedding="learned", norm="layernorm", activation="gelu_tanh", bias=True, qkv_bias=True,
               tied_embeddings=True)
LORA = LoraConfig(rank=4, alpha=8.0)
SP = {"tp": 2, "sp": True}


@dataclass(frozen=True)
class Job:
    """A model in a layout. `parallel`: of ParallelConfig; `ranks`: 1 or 2."""

    model: ModelConfig = LLAMA
    parallel: dict = field(default_factory=dict)
    ranks: int = 2
    dtype: str = "fp32"
    fp8: str | None = None
    lora: LoraConfig = LORA
    kernels: dict = field(default_factory=dict)
    head: str = "vocabulary"


JOBS = {
    "one": Job(ranks=1), "gpt2/one": Job(GPT2, ranks=1), "bf16/one": Job(ranks=1, dtype="bf16"), "fp8/one": Job(ranks=1, fp8="current"),
    "some/one": Job(ranks=1, lora=replace(LORA, targets=("linear_proj", "linear_fc1"))),
    "tp2": Job(parallel={"tp": 2}), "tp2sp": Job(parallel=SP), "pp2": Job(parallel={"pp": 2}), "interleaved": Job(parallel={"pp": 2, "vpp": 2}),
    "dp2": Job(), "dp2-plain": Job(parallel={"distributed_optimizer": False, "overlap_grad_reduce": False, "overlap_param_gather": False}),
    "cp2": Job(parallel={"cp": 2}), "full/tp2sp": Job(parallel={**SP, "recompute": "full"}), "full/pp2": Job(parallel={"pp": 2, "recompute": "full"}),
    "selective/tp2": Job(parallel={"tp": 2, "recompute": "selective"}), "plain/tp2sp": Job(parallel=SP, kernels={"layers": "plain"}),
    "gpt2/tp2sp": Job(GPT2, SP), "gpt2/pp2": Job(GPT2, {"pp": 2}), "some/tp2sp": Job(parallel=SP, lora=replace(LORA, targets=("linear_proj", "linear_fc1"))),
    "bf16/tp2sp": Job(parallel=SP, dtype="bf16"), "fp8/tp2sp": Job(parallel=SP, fp8="current"),
}


def config_of(job: Job) -> Config:
    return Config(
        model=job.model, parallel=ParallelConfig(**job.parallel), lora=job.lora, precision=PrecisionConfig(dtype=job.dtype, fp8=job.fp8),
        optim=OptimConfig(lr=1e-2), kernels=KernelsConfig(**job.kernels),
    )


def build(job: Job, ranks: tuple[int, ...] = (0,), *, train: bool = True):
    """The job's engine on these ranks."""
    from megatron_ext.parallel.layout import Layout
    from megatron_ext.platform import install
    from megatron_ext.train.engine import Engine

    sizes = {key: job.parallel[key] for key in ("tp", "pp", "vpp", "cp", "sp") if key in job.parallel}
    return Engine(config_of(job), Layout(**sizes, ranks=ranks), install("cpu"), vocab_size=WORDS, train=train, head=job.head)


def batches(engine, step: int) -> list:
    """This data rank's micro-batches of two of a global batch of eight, the same whatever the layout."""
    import torch

    from megatron_ext.data.batches import Batch

    # Few words, so that there is something to learn.
    tokens = torch.randint(0, 12, (8, SEQUENCE + 1), generator=torch.Generator().manual_seed(step))
    return [
        Batch(tokens=part[:, :-1].contiguous(), labels=part[:, 1:].contiguous(), loss_mask=torch.ones(len(part), SEQUENCE), documents=None,
              position_ids=torch.arange(SEQUENCE)[None].expand(len(part), -1))
        for part in tokens.chunk(engine.layout.dp)[engine.groups.dp.rank()].split(2)
    ]


def train(engine, steps: int = STEPS, first: int = 0) -> tuple[list[float], list[float]]:
    results = [engine.step(batches(engine, step), lr=1e-2, step=step) for step in range(first, first + steps)]
    assert all(result.applied for result in results)
    return [result.loss for result in results], [result.grad_norm for result in results]


def save(engine, directory: Path) -> Path:
    """A checkpoint by the ranks of the engine, with a record as a run writes it."""
    from megatron_ext.checkpoint import Checkpoints
    from megatron_ext.train.record import architecture

    store = Checkpoints(directory, keep=0, background=False, sharding="fully_reshardable", group=engine.groups.intra_dist_opt)
    with engine.complete_weights():
        store.save(1, engine.sharded_state(loading=False), {
            "config": asdict(engine.config), "vocab_size": WORDS, "model": architecture(engine.config.model, WORDS), "data": {"tokenizer": "none"},
        })
    store.wait()
    store.close()
    return store.newest()


def load(engine, path: Path, *, weights_only: bool = False, expect: dict | None = None, merge: bool = False) -> None:
    from megatron_ext.checkpoint import load as read

    state = engine.sharded_state(loading=True, weights_only=weights_only)
    engine.load_state(read(path, state, group=engine.groups.intra_dist_opt, expect=expect, merge_adapters=merge))


def completions(engine) -> list[dict]:
    from megatron_ext.generate import generate

    settings = GenerateConfig(max_tokens=8, temperature=0.9, batch_size=4, seed=3)
    prompts = [[1, 5, 3], [2, 7, 11, 4, 9], [6]]
    return [asdict(one) for both in (False, True) for one in generate(engine, prompts, settings, modules_only=both)]


def base_bytes(engine) -> bytes:
    """Of all frozen weights on this rank."""
    return b"".join(parameter.detach().float().numpy().tobytes() for model in engine.models for parameter in model.parameters() if not parameter.requires_grad)


def facts(name: str, job: Job, ranks: tuple[int, ...], directory: Path) -> dict:
    from parity_ranks import weights_hash

    from megatron_ext.models.lora import disabled

    engine = build(job, ranks)
    frozen = base_bytes(engine)
    found = {"initial": weights_hash(engine), "before": engine.evaluate(batches(engine, 99))[0]}
    found["losses"], found["norms"] = train(engine)
    found["frozen"] = frozen == base_bytes(engine)
    found["after"] = engine.evaluate(batches(engine, 99))[0]
    with disabled(engine.models):
        found["disabled"] = engine.evaluate(batches(engine, 99))[0]
    if name in ("tp2", "tp2sp", "pp2"):
        found["generated"] = completions(engine)
    if name in ("one", "tp2sp", "interleaved"):
        save(engine, directory / name)
    return found


def main(directory: Path) -> None:
    from megatron_ext.platform import connect, disconnect, install, quiet

    quiet()
    connect(install("cpu"), 120)
    import torch.distributed as dist

    from megatron_ext.checkpoint.compare import compare

    rank, found, alone = dist.get_rank(), {}, 0
    for name, job in JOBS.items():
        ranks = (0, 1) if job.ranks == 2 else (alone % 2,)
        alone += job.ranks == 1
        if rank in ranks:
            found[name] = facts(name, job, ranks, directory)
    dist.barrier()
    checkpoint = directory / "tp2sp" / "step_00000001"
    if rank == 0:  # what two ranks have trained, on one
        engine = build(JOBS["one"])
        load(engine, checkpoint)
        found["loaded"] = {"again": compare(checkpoint, save(engine, directory / "again")), "generated": completions(engine),
                           "after": engine.evaluate(batches(engine, 99))[0]}
    if rank == 1:
        engine = build(replace(JOBS["one"], lora=LoraConfig()), (1,))
        load(engine, checkpoint, weights_only=True, merge=True)
        found["merged/one"] = {"after": engine.evaluate(batches(engine, 99))[0]}
    engine = build(replace(JOBS["pp2"], lora=replace(LORA, rank=2)), (0, 1))
    load(engine, checkpoint, weights_only=True, merge=True)
    found["merged/pp2"] = {"after": engine.evaluate(batches(engine, 99))[0]}
    engine = build(JOBS["tp2sp"], (0, 1))
    load(engine, directory / "interleaved" / "step_00000001")
    found["resumed/tp2sp"] = {"losses": train(engine, 2, STEPS)[0]}
    engine = build(JOBS["interleaved"], (0, 1))
    load(engine, directory / "interleaved" / "step_00000001")
    found["resumed/interleaved"] = {"losses": train(engine, 2, STEPS)[0]}
    (directory / f"rank{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    disconnect()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
