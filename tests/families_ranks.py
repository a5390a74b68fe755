"""A rank of test_families.py: encoders, encoder-decoders and parallel blocks in layouts of two or four ranks, by parity_ranks.py's machinery.

    python tests/families_ranks.py DIRECTORY RANKS      under RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; DIRECTORY/data is prepared text
"""
import sys
from dataclasses import replace
from pathlib import Path

from parity_ranks import DOCUMENTS, INTERLEAVED, PP2, SP, TP2, TP2PP2, Job, Trainer, main

from megatron_ext.config.schema import ModelConfig

WIDTH = {"hidden_size": 64, "num_attention_heads": 4, "max_sequence_length": 64}
BERT = ModelConfig(
    family="encoder", num_layers=2, **WIDTH, position_embedding="learned", token_types=2, embedding_norm=True, block="post_norm", norm="layernorm",
    activation="gelu", bias=True, head_bias=True, tied_embeddings=True,
)
UNTIED = replace(BERT, num_layers=4, tied_embeddings=False, block="serial", token_types=0, embedding_norm=False, position_embedding="rope", qk_norm=True)
T5 = ModelConfig(
    family="encoder_decoder", num_layers=1, decoder_layers=3, **WIDTH, head_dim=24, ffn_hidden_size=160, position_embedding="relative",
    relative_buckets=16, relative_distance=20, attention_scale=1.0, logit_scale=0.125, activation="relu", tied_embeddings=True,
)
TRANSFORMER = ModelConfig(
    family="encoder_decoder", num_layers=1, **WIDTH, position_embedding="sinusoidal", embedding_scale=8.0, block="post_norm", norm="layernorm",
    activation="relu", bias=True, tied_embeddings=True,
)
GPTJ = ModelConfig(
    num_layers=2, **WIDTH, rotary_percent=0.25, rotary_interleaved=True, block="parallel_one_norm", norm="layernorm", activation="gelu_tanh", mlp_bias=True,
    head_bias=True,
)
PALM = ModelConfig(num_layers=2, **WIDTH, num_query_groups=1, head_dim=48, ffn_hidden_size=256, block="parallel_one_norm", tied_embeddings=True)
OPT = ModelConfig(
    num_layers=2, **WIDTH, position_embedding="learned", position_offset=2, embedding_size=32, block="post_norm", norm="layernorm", activation="relu",
    bias=True, tied_embeddings=True,
)
MODELS = {"bert": BERT, "untied": UNTIED, "documents": BERT, "t5": T5, "transformer": TRANSFORMER, "gptj": GPTJ, "palm": PALM, "opt": OPT}
FULL, SELECTIVE = {"recompute": "full"}, {"recompute": "selective"}


def job(name: str, parallel: dict | None = None, ranks: int = 1, *, steps: int = 6, **kwargs) -> Job:
    """The first steps of a run of ten, in micro-batches of four of the eight samples; on two data ranks one each."""
    family = name.split("/")[0]
    return Job(name, MODELS[family], parallel or {}, ranks, micro=4, data=DOCUMENTS if family == "documents" else {}, steps=steps, length=15, **kwargs)


def jobs_of(ranks: int) -> tuple[Job, ...]:
    """In the order in which they run: of one rank side by side, of two ranks, of four alone (parity_ranks.py)."""
    ones = (*(job(f"{name}/one") for name in MODELS), job("bert/plain", kernels={"layers": "plain"}), job("t5/full", FULL))
    if ranks == 4:
        return (*ones, *(job(name, parallel, 4) for name, parallel in {
            "bert/tp2pp2": TP2PP2, "t5/tp2pp2": TP2PP2 | {"sp": True}, "t5/pp4": {"pp": 4}, "gptj/tp2pp2": TP2PP2,
        }.items()))
    return (*ones, *(job(name, parallel, 2) for name, parallel in {
        "bert/tp2": TP2, "bert/tp2sp": SP, "bert/pp2": PP2, "bert/dp2": {}, "documents/tp2": TP2, "untied/tp2sp": SP, "untied/interleaved": INTERLEAVED,
        "t5/tp2": TP2, "t5/tp2sp": SP | SELECTIVE, "t5/pp2": PP2, "t5/interleaved": INTERLEAVED | FULL, "t5/dp2": {},
        "transformer/tp2sp": SP, "transformer/pp2": PP2, "gptj/tp2sp": SP, "gptj/pp2": PP2, "gptj/dp2": {}, "palm/tp2": TP2, "palm/pp2": PP2, "palm/dp2": {},
        "opt/tp2sp": SP, "opt/pp2": PP2,
    }.items()), job("palm/tp2sp", SP, 2, kernels={"layers": "plain"}))


def resumed(directory: Path, platform) -> dict:
    """Two steps in two pipeline stages with dropout, a checkpoint, and two more: by the same trainer, by another that goes on from there, and without
    dropout by one in another layout."""
    from megatron_ext import checkpoint

    found = {}
    for name in ("bert", "t5"):
        for dropout, layouts in ((0.1, {"pp2": PP2}), (0.0, {"pp2": PP2, "tp2sp": SP})):
            model = replace(MODELS[name], hidden_dropout=dropout, attention_dropout=dropout)
            first = Trainer(Job("", model, PP2, 2, micro=4, length=15), (0, 1), directory, platform)
            first.step(), first.step()
            store = checkpoint.Checkpoints(directory / f"{name}{dropout}", keep=0, background=False, sharding="fully_reshardable")
            with first.engine.complete_weights():
                store.save(2, first.engine.sharded_state(loading=False), {"vocab_size": first.samples.vocab_size})
            store.close()
            before = list(first.losses), list(first.norms)
            first.step(), first.step()
            found[f"{name}/{dropout}/first"] = first.facts
            for layout, parallel in layouts.items():
                again = Trainer(Job("", model, parallel, 2, micro=4, length=15), (0, 1), directory, platform)
                again.engine.load_state(checkpoint.load(store.newest(), again.engine.sharded_state(loading=True)))
                again.losses, again.norms = map(list, before)
                again.step(), again.step()
                found[f"{name}/{dropout}/{layout}"] = again.facts
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), jobs_of(int(sys.argv[2])), resumed if sys.argv[2] == "2" else None, count=int(sys.argv[2]))
