"""ppo: proximal policy optimisation from human feedback (Schulman et al. 2017, arXiv 1707.06347; Ouyang et al. 2022, arXiv 2203.02155).

    A = GAE(score at the last token - kl_coef KL of each token, values of a critic that starts from the reward model), whitened
    policy   minimise  E[max(-A r, -A clip(r, 1 - c, 1 + c))] - entropy_coef H (+ ptx_coef x loss on pretraining text)
    critic   minimise  E[max((V - R)^2, (V_clipped - R)^2)] / 2

The iteration is that of online.py; settings are `ppo.*`, `critic.*`, `rollout.*`, `rewards.*`, and conf/stage/ppo.yaml has InstructGPT's.
"""
from functools import partial

from megatron_ext.config.schema import Config
from megatron_ext.train.loop import Outcome, run
from rlhf.online import Algorithm, Online
from rlhf.prompts import prepare

PPO = Algorithm(advantage="gae", policy_loss="clip")


def train(config: Config) -> Outcome:
    """Runs the stage on this rank. Collective over all ranks of the job. Raises UserError, RunFailed."""
    return run(config, partial(Online, algorithm=PPO), prepare)
