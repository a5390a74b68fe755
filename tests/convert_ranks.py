"""A rank of test_convert_ranks.py: every family imported by two ranks into TP2 (with sequence parallel in training) and PP2, and what it then computes.

    python tests/convert_ranks.py DIRECTORY      under RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; DIRECTORY/NUMBER/hf is a model
"""
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import hugging_face as hf

LAYOUTS = {"tp2": ("parallel.tp=2",), "pp2": ("parallel.pp=2",)}
STEPS = 3


def logits_of(engine):
    """fp32 [3, LENGTH, WORDS] on the last stage's ranks, else None."""
    import torch
    import torch.distributed as dist

    class Logits:
        names = ()

        def needed(self, batch):
            return None

        def score(self, model, hidden, batch):
            return model.output_layer(model._projected(hidden), weight=model._shared_weight())[0].transpose(0, 1)

    found = engine.collect([batch(hf.rows())], Logits())
    if not found:
        return None
    parts = [torch.empty_like(found[0]) for _ in range(engine.groups.tp.size())]
    dist.all_gather(parts, found[0].contiguous(), group=engine.groups.tp)
    return torch.cat(parts, dim=-1)[..., : hf.WORDS]


def batch(tokens):
    import torch

    from megatron_ext.data.batches import Batch

    return Batch(tokens=tokens[:, :-1].contiguous(), labels=tokens[:, 1:].contiguous(), loss_mask=torch.ones(len(tokens), hf.LENGTH), documents=None,
                 position_ids=torch.arange(hf.LENGTH)[None].expand(len(tokens), -1))


def trained(engine) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of a few steps."""
    results = [engine.step([batch(hf.rows(4)[:2]), batch(hf.rows(4)[2:])], lr=1e-3, step=step) for step in range(STEPS)]
    return [result.loss for result in results], [result.grad_norm for result in results]


def saved(engine, source, directory: Path) -> Path:
    """A checkpoint as a run at this layout writes it that started from `source`, of weights that have not changed."""
    from megatron_ext.checkpoint import Checkpoints, checkpoint_hash

    store = Checkpoints(directory / "checkpoints", keep=0, background=False, sharding="fully_reshardable")
    parent = {"stage": "pretrain", "parent": checkpoint_hash(source.path), "parent_path": str(source.path)}
    store.save(0, engine.sharded_state(loading=False, weights_only=True), {**source.record, **parent, "config": asdict(engine.config)})
    store.wait()
    store.close()
    return store.newest()


def main(directory: Path) -> None:
    from megatron_ext.platform import connect, disconnect, install, quiet

    quiet()
    platform = install("cpu")
    connect(platform, 300)
    import torch
    import torch.distributed as dist

    from megatron_ext.config.compose import compose
    from megatron_ext.convert import exporter, importer

    torch.set_num_threads(1)
    rank, facts = dist.get_rank(), {}
    for folder in sorted(directory.iterdir(), key=lambda path: int(path.name)):
        began = time.monotonic()
        truth = torch.load(folder / "truth.pt", weights_only=True)
        whole = None
        for layout, words in LAYOUTS.items():
            output = folder / layout
            typed = (f"hf={folder / 'hf'}", f"output={output}", *words)
            importer.write(importer.plan(compose(typed), typed), output)
            if whole is None:
                alone, _ = hf.restored(output, platform, train=True, ranks=(rank,))
                whole = trained(alone)
            engine, found = hf.restored(output, platform, *words, ranks=(0, 1))
            logits = logits_of(engine)
            tokens = hf.grown(engine)
            copied = saved(engine, found, folder / f"{layout}-saved")
            fact = {"tokens": bool(torch.equal(tokens, truth["tokens"])), "off": None if logits is None else hf.off(logits, truth["logits"])}
            if rank == 0:
                exporter.write_directory(exporter.plan(copied), folder / f"{layout}-exported")
            training, _ = hf.restored(output, platform, *words, *(("parallel.sp=true",) if layout == "tp2" else ()), train=True, ranks=(0, 1))
            losses, norms = trained(training)
            fact["losses"] = max(abs(a - b) / abs(b) for a, b in zip(losses, whole[0]))
            fact["norms"] = max(abs(a - b) / abs(b) for a, b in zip(norms, whole[1]))
            facts[f"{folder.name}/{layout}"] = fact
        if rank == 0:
            print(f"{folder.name}: {time.monotonic() - began:.1f} s", flush=True)
    (directory.parent / f"rank{rank}.json").write_text(json.dumps(facts))
    dist.barrier()
    disconnect()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
