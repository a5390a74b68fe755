"""`train stage=NAME ...`: one stage."""
import importlib
import os

from megatron_ext.cli import cast, vocabulary
from megatron_ext.cli.notes import notes
from megatron_ext.cli.options import Options
from megatron_ext.config import sizes
from megatron_ext.config.schema import Config
from megatron_ext.config.stages import TEXT
from megatron_ext.parallel import launch
from megatron_ext.parallel.signals import UNFINISHED, listen

# stage -> "module:function"; the function takes the configuration, in every rank. The front door is the one place that may name rooms above.
STAGES = {
    "pretrain": "megatron_ext.train.pretrain:train", "adapt": "megatron_ext.train.pretrain:train", "sft": "rlhf.sft:train",
    "reward": "rlhf.reward:train", "ppo": "rlhf.ppo:train", "grpo": "rlhf.grpo:train", "rloo": "rlhf.rloo:train", "dpo": "rlhf.dpo:train",
}


def train(config: Config, options: Options) -> int:
    """Starts the ranks where nobody has, and trains in each."""
    if launch.launched_ranks(os.environ) is None:  # a rank has only as long as a collective may take
        vocab = vocabulary.words(config)
        cast.members(config, vocab or sizes.vocab_size(config))  # a reward model that cannot be used is told of now
        for note in notes(config, options.overrides):
            print(f"note: {note}", flush=True)
        if config.stage.name in TEXT or config.ppo.ptx_coef:
            from megatron_ext.data.build import ensure_prepared

            ensure_prepared(config.data)
        if vocab is not None and (note := vocabulary.padding_note(config, vocab)):
            print(note, flush=True)
    return launch.in_ranks(config, options.argv, lambda: _rank(config))


def _rank(config: Config) -> int:
    from megatron_ext import platform

    listen()
    platform.quiet()
    module, function = STAGES[config.stage.name].split(":")
    outcome = getattr(importlib.import_module(module), function)(config)
    return UNFINISHED if outcome.stop.unfinished else 0
