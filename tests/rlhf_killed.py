"""The command line, in a process that is sent a signal in the middle of an iteration, SIGKILL unless another is named.

    python tests/rlhf_killed.py PHASE:ITERATION[:SIGNAL] train stage=ppo ...      PHASE: rollout | scoring | policy | critic
"""
import os
import signal
import sys


def main() -> int:
    phase, iteration, *named = sys.argv[1].split(":")
    number = signal.Signals[named[0]] if named else signal.SIGKILL
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
                if calls["here"] == after + 1:
                    os.kill(os.getpid(), number)
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
