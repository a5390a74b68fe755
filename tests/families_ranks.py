"""A rank of test_families.py: encoders, encoder-decoders and parallel blocks in layouts of two or four ranks, by parity_ranks.py's machinery.

    python tests/families_ranks.py DIRECTORY RANKS      under RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; DIRECTORY/data is prepared text
"""
import sys
from dataclasses import replace
from pathlib import Path

from parity_ranks import DOCUMENTS, INTERLEAVED, PP2, SP, TP2, TP2PP2, Job, main

from megatron_ext.config.schema import ModelConfig

WIDTH = {"hidden_size": 128, "num_attention_heads": 4, "max_sequence_length": 64}
BERT = ModelConfig(
    family="encoder", num_layers=4, **WIDTH, position_embedding="learned", token_types=2, embedding_norm=True, block="post_norm", norm="layernorm",
    activation="gelu", bias=True, head_bias=True, tied_embeddings=True,
)
UNTIED = replace(BERT, tied_embeddings=False, block="serial", token_types=0, embedding_norm=False, position_embedding="rope", qk_norm=True)
T5 = ModelConfig(
    family="encoder_decoder", num_layers=3, decoder_layers=5, **WIDTH, head_dim=24, ffn_hidden_size=320, position_embedding="relative",
    relative_buckets=16, relative_distance=20, attention_scale=1.0, logit_scale=128**-0.5, activation="relu", tied_embeddings=True,
)
TRANSFORMER = ModelConfig(
    family="encoder_decoder", num_layers=2, **WIDTH, position_embedding="sinusoidal", embedding_scale=128**0.5, block="post_norm", norm="layernorm",
    activation="relu", bias=True, tied_embeddings=True,
)
FULL, SELECTIVE = {"recompute": "full"}, {"recompute": "selective"}
RATES = {"steps": 10, "length": 20}


GPTJ = ModelConfig(
    num_layers=4, **WIDTH, rotary_percent=0.25, rotary_interleaved=True, block="parallel_one_norm", norm="layernorm", activation="gelu_tanh", mlp_bias=True,
    head_bias=True,
)
PALM = ModelConfig(num_layers=4, **WIDTH, num_query_groups=1, head_dim=48, ffn_hidden_size=512, block="parallel_one_norm", tied_embeddings=True)
OPT = ModelConfig(
    num_layers=4, **WIDTH, position_embedding="learned", position_offset=2, embedding_size=64, block="post_norm", norm="layernorm", activation="relu",
    bias=True, tied_embeddings=True,
)


def jobs_of(ranks: int) -> tuple[Job, ...]:
    """In the order in which they run: of one rank side by side, of two ranks, of four alone (parity_ranks.py)."""
    ones = (Job("bert/one", BERT, **RATES), Job("untied/one", UNTIED, **RATES), Job("t5/one", T5, **RATES), Job("transformer/one", TRANSFORMER, **RATES),
            Job("gptj/one", GPTJ, **RATES), Job("palm/one", PALM, **RATES), Job("opt/one", OPT, **RATES), Job("documents/one", BERT, data=DOCUMENTS, **RATES))
    more = (
        Job("bert/plain", BERT, kernels={"layers": "plain"}, **RATES),
        Job("t5/full", T5, parallel=FULL, **RATES), Job("transformer/micro4", TRANSFORMER, micro=4, **RATES),
    )
    twos = (
        Job("bert/tp2", BERT, parallel=TP2, ranks=2, **RATES), Job("bert/tp2sp", BERT, parallel=SP, ranks=2, **RATES),
        Job("bert/pp2", BERT, parallel=PP2, ranks=2, **RATES), Job("bert/dp2", BERT, ranks=2, **RATES),
        Job("untied/tp2sp", UNTIED, parallel=SP, ranks=2, **RATES), Job("untied/interleaved", UNTIED, parallel=INTERLEAVED, ranks=2, **RATES),
        Job("documents/tp2", BERT, parallel=TP2, data=DOCUMENTS, ranks=2, **RATES),
        Job("t5/dp2", T5, ranks=2, **RATES),
        Job("t5/tp2", T5, parallel=TP2, ranks=2, **RATES), Job("t5/tp2sp", T5, parallel=SP | SELECTIVE, ranks=2, **RATES),
        Job("t5/pp2", T5, parallel=PP2, ranks=2, **RATES), Job("t5/interleaved", T5, parallel=INTERLEAVED | FULL, ranks=2, **RATES),
        Job("gptj/tp2sp", GPTJ, parallel=SP, ranks=2, **RATES), Job("gptj/pp2", GPTJ, parallel=PP2, ranks=2, **RATES),
        Job("palm/pp2", PALM, parallel=PP2, ranks=2, **RATES), Job("palm/dp2", PALM, ranks=2, **RATES),
        Job("palm/tp2", PALM, parallel=TP2, ranks=2, **RATES), Job("palm/tp2sp", PALM, parallel=SP, kernels={"layers": "plain"}, ranks=2, **RATES),
        Job("opt/tp2sp", OPT, parallel=SP, ranks=2, **RATES), Job("opt/pp2", OPT, parallel=PP2, ranks=2, **RATES),
        Job("transformer/tp2sp", TRANSFORMER, parallel=SP, ranks=2, **RATES), Job("transformer/pp2", TRANSFORMER, parallel=PP2, ranks=2, **RATES),
    )
    fours = (
        Job("bert/tp2pp2", BERT, parallel=TP2PP2, ranks=4, **RATES), Job("t5/tp2pp2", T5, parallel=TP2PP2 | {"sp": True}, ranks=4, **RATES),
        Job("gptj/tp2pp2", GPTJ, parallel=TP2PP2, ranks=4, **RATES), Job("t5/pp4", T5, parallel={"pp": 4}, ranks=4, **RATES),
    )
    return ones + more + twos if ranks == 2 else ones + fours


if __name__ == "__main__":
    main(Path(sys.argv[1]), jobs_of(int(sys.argv[2])), None, count=int(sys.argv[2]))
