"""Commands of this room.

    python -m megatron_ext.curate.quality train input=PATH output=MODEL.npz [units=characters] [order=6] [least=1,1,2] [held_out=0.05]
    python -m megatron_ext.curate.quality score model=MODEL.npz input=PATH [output=SCORES.jsonl] [text_key=text]
    python -m megatron_ext.curate.quality index inputs=PATH,PATH output=INDEX.npz

train fits an n-gram language model to a corpus that someone trusts; score prints quantiles over a corpus and what the model's own limits
would drop, and writes perplexity and word order of each document;
index writes the n-grams of evaluation sets that training data must not hold.
"""
import sys

from megatron_ext.curate import words
from megatron_ext.curate.quality import decontaminate, train

if __name__ == "__main__":
    sys.exit(words.run({
        "train": (train.TrainSettings, train.train), "score": (train.ScoreSettings, train.score),
        "index": (decontaminate.IndexSettings, decontaminate.index),
    }, sys.argv[1:], __doc__))
