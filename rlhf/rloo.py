"""rloo: REINFORCE with a leave-one-out baseline (Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740). No critic, and no clip.

    A_i = R_i - mean of R_j, j != i, over the responses to the same prompt,      R = score - kl_coef KL of the response

Settings: conf/stage/rloo.yaml.
"""
from functools import partial

from megatron_ext.config.schema import Config
from megatron_ext.train.loop import Outcome, run
from rlhf.online import Algorithm, Online
from rlhf.prompts import prepare

RLOO = Algorithm(advantage="rloo", policy_loss="reinforce")


def train(config: Config) -> Outcome:
    """Runs the stage on this rank. Collective over all ranks of the job. Raises UserError, RunFailed."""
    return run(config, partial(Online, algorithm=RLOO), prepare)
