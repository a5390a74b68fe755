"""The command line, in a process that ends by SIGKILL in the middle of an iteration.

    python tests/rlhf_killed.py PHASE:ITERATION train stage=ppo ...      PHASE: rollout | scoring | policy | critic
"""
import os
import signal
import sys


def main() -> int:
    phase, _, iteration = sys.argv[1].partition(":")
    from megatron_ext import platform

    platform.quiet()
    from megatron_ext.cli.main import main as command
    from rlhf import cast, judge, online, update

    reached = {"iteration": 0}
    step = online.Online.step

    def counted(self, position):
        reached["iteration"] = position.steps + 1
        return step(self, position)

    online.Online.step = counted

    def killing(function, after: int = 0):
        calls = {"here": 0}

        def called(*arguments, **settings):
            if reached["iteration"] == int(iteration):
                calls["here"] += 1
                if calls["here"] > after:
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **settings)

        return called

    if phase == "rollout":
        from megatron_ext.generate import stage

        stage.Stage.decode = killing(stage.Stage.decode, after=3)
    elif phase == "scoring":
        judge.Judge.__call__ = killing(judge.Judge.__call__)
    elif phase == "policy":
        update.Trainer.step = killing(update.Trainer.step, after=1)
    else:
        assert phase == "critic", phase
        cast.Cast.average = killing(cast.Cast.average)
    return command(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
