"""grpo: group relative policy optimisation (Shao et al. 2024, arXiv 2402.03300). No critic: a response is compared with the others to its prompt.

    A = (R - mean of the group) / std of the group,      policy loss: PPO's clip, the mean over each response, then over responses;
    the KL stands in the loss (k3 in the paper).

`ppo.whiten=false` leaves the std out (Dr. GRPO). Settings: conf/stage/grpo.yaml.
"""
from functools import partial

from megatron_ext.config.schema import Config
from megatron_ext.train.loop import Outcome, run
from rlhf.online import Algorithm, Online
from rlhf.prompts import prepare

GRPO = Algorithm(advantage="grpo", policy_loss="clip", over="sequences")


def train(config: Config) -> Outcome:
    """Runs the stage on this rank. Collective over all ranks of the job. Raises UserError, RunFailed."""
    return run(config, partial(Online, algorithm=GRPO), prepare)
