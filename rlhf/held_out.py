"""The held-out prompts, answered with the same random numbers each time, so that what changes is the policy."""
from torch import Tensor

from megatron_ext.config.schema import Config
from rlhf import kl
from rlhf.cast import Cast
from rlhf.experience import gather
from rlhf.judge import Judgement
from rlhf.objectives import TokenScore
from rlhf.prompts import Prompts
from rlhf.rollout import HELD_OUT, Rollouts, keeps, roll_out
from rlhf.update import Trainer, kept_elsewhere


def answer_held_out(config: Config, cast: Cast, prompts: Prompts) -> tuple[Rollouts, Judgement, Tensor]:
    """(rollouts, judgement, KL k1 of each response to the reference, fp32 [n], nats). Collective."""
    temperature = config.generate.temperature
    with cast.generating() as engine:
        rollouts = roll_out(engine, prompts.held_out, config.generate, samples=1, first=HELD_OUT, tokenizer=prompts.tokenizer, eod=prompts.template.end)
    kept, everyone = keeps(config.generate), range(len(rollouts.completions))
    if kept is not None:  # which words were left is the policy's to say
        with cast.policy.awake() as engine:
            policy = Trainer(engine, config, rollouts.sequences, rollouts.offsets)
            policy.collect(policy.cut(0, everyone), TokenScore(temperature=temperature, keep=kept), {"words": rollouts.words})
    with cast.reference() as engine:
        trainer = Trainer(engine, config, rollouts.sequences, rollouts.offsets)
        same = None if kept is None else kept_elsewhere(kept, policy, trainer, [everyone])
        minibatch = trainer.cut(0, everyone)
        found = trainer.collect(minibatch, TokenScore(temperature=temperature, keep=same))
        reference = gather(engine, minibatch.plan, [one[0] for one in found], rollouts.offsets)
    return rollouts, cast.judge(rollouts), kl.sequence_kl(rollouts.generated - reference, rollouts.cu_seqlens)
