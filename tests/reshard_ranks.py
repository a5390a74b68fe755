"""A rank of test_reshard.py and test_offload.py, spawned once for both. Every engine is over all four ranks.

    python tests/reshard_ranks.py DIRECTORY      under RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; DIRECTORY/rankN.json is what rank N saw
"""
import gc
import json
import math
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from held import WORDS, Values, alive, equal, lacking, messages, refusal, same_bits, sizes_of, state_of
from spawn import spawn

RANKS, SEQUENCE, BATCH = 4, 16, 8
LAYOUTS = {"tp2pp2": {"tp": 2, "pp": 2}, "dp4": {}, "pp2": {"pp": 2}, "pp2vpp2": {"pp": 2, "vpp": 2}, "tp2": {"tp": 2, "sp": True}}
TIED, SCALAR_LORA = {"tied_embeddings": True}, {"head": "scalar", "lora": 4}
MOVES = {  # from, to, settings of `engine`, bytes of a message
    "replicas": ("tp2pp2", "dp4", {}, None),
    "tied to stages": ("dp4", "pp2", TIED, None),
    "tied to chunks": ("tp2", "pp2vpp2", TIED, 4096),
    "interleaved": ("pp2vpp2", "tp2", {}, None),
    "adapters": ("tp2", "pp2", {"dtype": "bf16", "fp8": "delayed", **SCALAR_LORA}, 1000),
}
STAYS = {  # layout, settings of `engine`
    "fp32": ("tp2", {}),
    "bf16": ("dp4", {"dtype": "bf16", "grad_reduce_in_fp32": False}),
    "fp8": ("pp2vpp2", {"dtype": "bf16", "fp8": "delayed"}),
    "no distributed optimizer": ("dp4", {"dtype": "fp16", "plain": True}),
    "adapters": ("pp2", SCALAR_LORA),
}


class Rank:
    def __init__(self, directory: Path):
        from megatron_ext.platform import connect, install, quiet

        quiet()
        self.platform, self.directory, self.facts = install("cpu"), directory, {}
        connect(self.platform, 120)
        self.rank = dist.get_rank()
        gc.freeze()  # what the imports made: `alive` need not look through it

    def engine(self, layout: str, *, train: bool = True, seed: int = 1, head: str = "vocabulary", lora: int = 0, dtype: str = "fp32",
               fp8: str | None = None, grad_reduce_in_fp32: bool = True, plain: bool = False, **model):
        from megatron_ext.config import schema
        from megatron_ext.parallel.layout import Layout
        from megatron_ext.train.engine import Engine
        from megatron_ext.train.objective import LanguageModelling

        sizes = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "max_sequence_length": SEQUENCE}
        data = {"distributed_optimizer": False, "overlap_grad_reduce": False, "overlap_param_gather": False} if plain else {}
        config = schema.Config(
            model=schema.ModelConfig(**sizes, vocab_multiple=1, **model), parallel=schema.ParallelConfig(**LAYOUTS[layout], **data),
            lora=schema.LoraConfig(rank=lora), train=schema.TrainConfig(seed=seed),
            precision=schema.PrecisionConfig(
                dtype=dtype, fp8=fp8, fp8_history=8, grad_reduce_in_fp32=grad_reduce_in_fp32, initial_loss_scale=256.0
            ),
        )
        where = Layout(**LAYOUTS[layout], ranks=tuple(range(RANKS)))
        engine = Engine(config, where, self.platform, vocab_size=WORDS, train=train, head=head)
        engine.objective = Values() if head == "scalar" else LanguageModelling()
        return engine

    def batches(self, engine, number: int) -> list:
        from megatron_ext.data.batches import Batch

        tokens = torch.randint(0, WORDS, (BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(number))
        return [
            Batch(tokens=part[:, :-1].contiguous(), labels=part[:, 1:].contiguous(), loss_mask=torch.ones(len(part), SEQUENCE),
                  position_ids=torch.arange(SEQUENCE)[None].expand(len(part), -1), documents=None)
            for part in tokens.chunk(engine.layout.dp)[engine.groups.dp.rank()].split(2)
        ]

    def step(self, engine, number: int) -> tuple[float, float]:
        result = engine.step(self.batches(engine, number), lr=1e-2, step=number, objective=engine.objective)
        assert result.applied
        return result.loss, result.grad_norm

    # ------------------------------------------------------------ moves

    def moves(self) -> None:
        for name, (source, target, settings, chunk) in MOVES.items():
            self.facts[f"move {name}"] = self.move(source, target, settings, {} if chunk is None else {"chunk": chunk})

    def move(self, source: str, target: str, settings: dict, chunk: dict) -> dict:
        from megatron_ext.parallel.reshard import Reshard
        from megatron_ext.train.offload import Offload

        learner, player = self.engine(source, **settings), self.engine(target, train=False, seed=2, **settings)
        move = Reshard(learner, player, **chunk)
        self.step(learner, 0)
        move.run()
        self.step(learner, 1)
        rests = [Offload(learner), Offload(player)]
        for one in rests:  # views stay right where the memory has been elsewhere
            one.to_host()
        for one in rests:
            one.to_device()
        with torch.no_grad():  # whatever is not written is seen
            for weight in (weight for model in player.models for weight in model.parameters()):
                weight.fill_(math.nan)
        with messages() as sizes:
            moved = move.run()
        fresh = self.loaded(learner, target, settings)
        return {
            "moved": vars(moved), "messages": sizes, "needed": lacking(learner, player), "equal": equal(player, fresh),
            "losses": [engine.evaluate(self.batches(engine, 2), engine.objective)[0] for engine in (learner, player, fresh)],
        }

    def loaded(self, learner, target: str, settings: dict):
        """The truth: the learner's weights in the target's layout by way of a checkpoint."""
        from megatron_ext.checkpoint import Checkpoints, load

        with tempfile.TemporaryDirectory(dir=self.directory) as own, learner.complete_weights():
            folder, group = [own], learner.groups.intra_dist_opt
            dist.broadcast_object_list(folder, src=0)
            store = Checkpoints(Path(folder[0]), keep=0, background=False, sharding="fully_reshardable", group=group)
            store.save(1, learner.sharded_state(loading=False, weights_only=True), {})
            store.wait()
            store.close()
            fresh = self.engine(target, train=False, seed=3, **settings)
            fresh.load_state(load(store.newest(), fresh.sharded_state(loading=True, weights_only=True), group=group))
            dist.barrier()
        return fresh

    def odd_moves(self) -> None:
        """At home; into a model that trains; between models that are not one."""
        from types import SimpleNamespace

        from megatron_ext.parallel.layout import Layout
        from megatron_ext.parallel.reshard import Reshard

        learner, same = self.engine("tp2", dtype="bf16"), self.engine("tp2", seed=2, dtype="bf16")
        self.step(learner, 0)
        moved = Reshard(learner, same).run()
        # bf16 weights are the fp32 main weights rounded: with the old main weights a step with no rate would bring the old weights back.
        same.step(self.batches(same, 0), lr=0.0, step=0)
        with learner.complete_weights(), same.complete_weights():
            facts = {"moved": vars(moved), "equal": equal(learner, same)}
        others = {"tied": self.engine("tp2", train=False, dtype="bf16", **TIED), "fp32": self.engine("tp2", train=False),
                  "wide": self.engine("tp2", train=False, dtype="bf16", ffn_hidden_size=96),
                  "elsewhere": SimpleNamespace(layout=Layout(ranks=(0,)))}
        facts["refused"] = {name: refusal(lambda other=other: Reshard(learner, other), ValueError) for name, other in others.items()}
        facts["refused"]["chunk"] = refusal(lambda: Reshard(learner, same, chunk=8), ValueError)
        self.facts["odd moves"] = facts

    # ------------------------------------------------------------ off-loading

    def stays(self) -> None:
        for name, (layout, settings) in STAYS.items():
            self.facts[f"stay {name}"] = self.stay(layout, settings)

    def stay(self, layout: str, settings: dict) -> dict:
        from megatron_ext.train.offload import Offload, device_bytes

        twin = self.engine(layout, **settings)
        self.step(twin, 0)
        before = alive()
        engine = self.engine(layout, **settings)
        offload = Offload(engine, "policy")
        facts = {"weights": sizes_of(engine), "dp": engine.layout.dp, "new": device_bytes(engine)}
        self.step(engine, 0)
        facts["trained"], bits, wrapped = device_bytes(engine), state_of(engine), engine.chunks[0]
        offload.to_host()
        facts["away"], facts["host"] = device_bytes(engine), offload.host_bytes
        facts["alive"] = alive() - before - offload.host_bytes - sum(tensor.nbytes for tensor in bits)
        facts["refused"] = self.uses(engine, wrapped)
        offload.to_device()
        facts["back"], facts["same bits"] = device_bytes(engine), same_bits(bits, state_of(engine))
        trained = [weight for model in engine.models for weight in model.parameters() if weight.requires_grad]
        facts["gradients are zero"] = not any(bool(weight.main_grad.any()) for weight in trained)
        facts["steps"] = [[self.step(one, number) for number in (1, 2)] for one in (twin, engine)]
        facts["same end"] = same_bits(state_of(twin), state_of(engine))
        with offload.needed(), offload.needed() as inner:  # it is there: it stays
            assert inner is engine
        facts["stays"] = sum(device_bytes(engine).values())
        if not settings.get("plain"):
            engine.chunks[0].start_param_sync()  # as a module's hook does for the next: the weights that arrive are waited for
        offload.to_host()
        offload.to_host()
        with offload.needed():
            with offload.needed():
                pass
            facts["last step"] = [self.step(one, 3) for one in (twin, engine)]
        facts["leaves"] = sum(device_bytes(engine).values())
        return facts

    def uses(self, engine, wrapped) -> dict:
        """What each use of an engine that is away raises; all before a rank waits for another."""
        batch, lm = self.batches(engine, 0), engine.objective
        uses = {
            "step": lambda: engine.step(batch, lr=0.0, step=0, objective=lm), "evaluate": lambda: engine.evaluate(batch, lm),
            "collect": lambda: engine.collect(batch, lm), "models": lambda: engine.models, "load": lambda: engine.load_state({}),
            "state": lambda: engine.sharded_state(loading=False), "complete": lambda: engine.complete_weights().__enter__(),
            "number": lambda: len(engine.chunks), "forward": lambda: wrapped(batch[0].tokens, batch[0].position_ids),
        }
        return {name: refusal(use, RuntimeError) for name, use in uses.items()}


def main(directory: Path) -> None:
    rank = Rank(directory)
    rank.moves()
    rank.odd_moves()
    rank.stays()
    (directory / f"rank{rank.rank}.json").write_text(json.dumps(rank.facts))
    dist.barrier()
    dist.destroy_process_group()


# ---- in the process that starts the ranks ----------------------------------------------------------------------------------------


@cache
def run_ranks() -> list[dict]:
    """What each rank saw."""
    with tempfile.TemporaryDirectory() as directory:
        spawn([__file__, directory], RANKS, timeout=540)
        return [json.loads((Path(directory) / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
