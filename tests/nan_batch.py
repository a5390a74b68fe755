"""The command line, in a process where training on some samples gives a loss that is not a number.

    python tests/nan_batch.py FIRST[,FIRST...][@RANK] train ...      FIRST: where a step's samples begin; RANK: of a torchrun, where alone it is so
"""
import os
import sys


def main() -> int:
    firsts, _, rank = sys.argv[1].partition("@")
    bad = {int(word) for word in firsts.split(",")} if rank in ("", os.environ.get("RANK")) else set()
    from megatron_ext import platform

    platform.quiet()
    from megatron_ext.cli.main import main as command
    from megatron_ext.train.pretrain import Pretraining

    step = Pretraining.step

    def spoiled(self, position):
        if position.samples not in bad:
            return step(self, position)
        hook = self.engine.models[0].register_forward_hook(lambda module, given, out: tuple(part * float("nan") for part in out))
        try:
            return step(self, position)
        finally:
            hook.remove()

    Pretraining.step = spoiled
    return command(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
