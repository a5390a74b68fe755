"""A rank of test_generate_ranks.py: generates and evaluates in many layouts, and writes down what it got.

A layout is a value and may span some of the ranks: with four ranks, two layouts of two ranks work side by side.

    python tests/generate_ranks.py DIRECTORY      under RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT
"""
import json
import sys
from dataclasses import asdict
from pathlib import Path

import decoders

from megatron_ext.config.schema import GenerateConfig

# name -> (sizes, ranks), in the order in which they run.
LAYOUTS = {
    "one": ({}, (0,)),
    "dp2": ({}, (2, 3)),
    "tp2": ({"tp": 2}, (0, 1)),
    "pp2": ({"pp": 2}, (2, 3)),
    "tp2sp": ({"tp": 2, "sp": True}, (0, 1)),
    "pp4": ({"pp": 4}, (0, 1, 2, 3)),
    "tp2pp2": ({"tp": 2, "pp": 2}, (0, 1, 2, 3)),
    "tp2dp2": ({"tp": 2}, (0, 1, 2, 3)),
}
JOBS = [f"llama/{name}" for name in LAYOUTS] + [f"gpt2/{name}" for name in ("one", "tp2", "pp2", "tp2pp2")]
INTERLEAVED = {"pp": 2, "vpp": 2}
COUNT = 12
SETTINGS = {
    "greedy": GenerateConfig(max_tokens=COUNT, temperature=0.0, batch_size=4),
    "sampled": GenerateConfig(max_tokens=COUNT, temperature=0.9, top_k=30, top_p=0.95, batch_size=4, samples=2, seed=11),
    "ended": GenerateConfig(max_tokens=COUNT, top_k=12, batch_size=8, samples=2, seed=4),  # with an end-of-document token
}
EOD = 79
SEQUENCES = 13  # divides by nothing
LONGEST = 16  # tokens that the model sees at once: some requests are longer


class Fixed:
    """Samples of random tokens."""

    sequence_length, eod = 16, 7

    def __init__(self):
        import torch

        from megatron_ext.data.samples import Masking

        self.masking = Masking(mask_eod_loss=True)  # rows count different numbers of tokens
        self.rows = torch.randint(0, decoders.WORDS // 4, (SEQUENCES, 17), generator=torch.Generator().manual_seed(2))

    def __getitem__(self, k):
        import numpy as np

        from megatron_ext.data.samples import Sample

        return Sample(self.rows[k].numpy(), np.zeros(17, dtype=np.int32))


def requests() -> list:
    """Continuations: of one word behind the same context, of several, of more than fits with its context, and the most probable ones."""
    from megatron_ext.evaluate.likelihood import Continuation

    rows = decoders.prompts((5, 5, 9, 3, 12, 7, 25, 17, 2))
    same = [Continuation(rows[0], [word]) for word in (3, 50, 119)]
    return [*same, *(Continuation(row[: -len(row) // 3], row[-len(row) // 3 :]) for row in rows[1:]), Continuation(rows[6][:1], rows[7][:LONGEST])]


def facts(engine) -> dict:
    from megatron_ext.evaluate.likelihood import likelihoods
    from megatron_ext.evaluate.split import evaluate_split
    from megatron_ext.generate import generate

    found: dict = {}
    for name, settings in SETTINGS.items():
        eod = EOD if name == "ended" else None
        found[name] = [asdict(one) for one in generate(engine, decoders.prompts(), settings, eod=eod)]
    if engine.layout.sp:  # one more way through the layers, where it is most different
        found["modules"] = [asdict(one) for one in generate(engine, decoders.prompts(), SETTINGS["sampled"], modules_only=True)]
    found["few"] = [asdict(one) for one in generate(engine, decoders.prompts([5]), SETTINGS["greedy"])]
    found["evaluation"] = asdict(evaluate_split(engine, Fixed(), count=SEQUENCES, micro_batch=2))
    found["likelihoods"] = [asdict(one) for one in likelihoods(engine, requests(), batch_size=2, max_length=LONGEST)]
    if engine.layout.sp:
        assert engine.models[0].config.sequence_parallel, "sequence parallelism must be on again"
    return found


def trained(layout) -> dict:
    """After a step, whose new weights the distributed optimizer gathers only when the next forward pass asks for them."""

    import torch

    from megatron_ext.data.batches import Batch
    from megatron_ext.generate import generate

    engine = decoders.build(layout=layout, train=True)
    rows = torch.randint(0, decoders.WORDS, (4, 17), generator=torch.Generator().manual_seed(3)).chunk(layout.dp)[engine.groups.dp.rank()]
    batch = Batch(tokens=rows[:, :-1], labels=rows[:, 1:], loss_mask=torch.ones(len(rows), 16), documents=None,
                  position_ids=torch.arange(16)[None].expand(len(rows), -1))
    engine.step([batch], lr=3e-2, step=0)
    return {"greedy": [asdict(one) for one in generate(engine, decoders.prompts(), SETTINGS["greedy"])]}


def main(directory: Path) -> None:
    from megatron_ext.parallel.layout import Layout
    from megatron_ext.platform import connect, disconnect, install, quiet

    quiet()
    connect(install("cpu"), 120)
    import torch.distributed as dist

    from megatron_ext.evaluate.split import evaluate_split

    rank, found = dist.get_rank(), {}
    for job in JOBS:
        model, name = job.split("/")
        sizes, ranks = LAYOUTS[name]
        if rank in ranks:
            found[job] = facts(decoders.build(decoders.VARIANTS[model], Layout(**sizes, ranks=ranks)))
    if rank in (0, 1):
        engine = decoders.build(layout=Layout(**INTERLEAVED, ranks=(0, 1)))
        found["llama/interleaved"] = {"evaluation": asdict(evaluate_split(engine, Fixed(), count=SEQUENCES, micro_batch=2))}
    if rank == 2:
        found["trained/one"] = trained(Layout(ranks=(2,)))
    if rank in (0, 1):
        found["trained/dp2"] = trained(Layout(ranks=(0, 1)))
    (directory / f"rank{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    disconnect()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
