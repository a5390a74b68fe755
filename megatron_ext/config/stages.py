"""What the stages have in common and what not, as far as a configuration can tell. No torch.

    pretrain, adapt     plain text, sequences of data.sequence_length
    sft                 examples of `chat`, packed into such sequences
    reward, dpo         rankings of `chat`; micro-batches are packed by tokens (rollout.batch_tokens)
    ppo, grpo, rloo     prompts of `chat`; a step is an iteration: rollouts, scoring, and the optimizer steps on them
"""
from megatron_ext.config.schema import Config, PlacementConfig

TEXT = ("pretrain", "adapt")
RANKED = ("reward", "dpo")
ONLINE = ("ppo", "grpo", "rloo")
PACKED = RANKED + ONLINE
CHAT = ("sft", *PACKED)

# What each stage of ONLINE takes where `ppo.advantage` and `ppo.policy_loss` are null; rlhf/{ppo,grpo,rloo}.py say the same, a test compares.
ADVANTAGE = {"ppo": "gae", "grpo": "grpo", "rloo": "rloo"}
POLICY_LOSS = {"ppo": "clip", "grpo": "clip", "rloo": "reinforce"}

LAYOUTS = ("reference_layout", "reward_layout", "critic_layout", "rollout_layout")
CLIPPED = ("clip", "gspo", "cispo")


def advantage(config: Config) -> str | None:
    """The estimator of the advantage; None in a stage without one."""
    return config.ppo.advantage or ADVANTAGE[config.stage.name] if config.stage.name in ONLINE else None


def policy_loss(config: Config) -> str | None:
    """The policy's loss; None in a stage without one."""
    return config.ppo.policy_loss or POLICY_LOSS[config.stage.name] if config.stage.name in ONLINE else None


def has_critic(config: Config) -> bool:
    """Whether a value function is trained beside the policy."""
    return advantage(config) == "gae"


def models(config: Config) -> tuple[str, ...]:
    """Which models lie on the ranks: policy, reference (with LoRA it is the policy), reward, critic, rollout (the policy in `rollout_layout`)."""
    stage = config.stage.name
    if stage not in (*ONLINE, "dpo"):
        return ("policy",)
    found = ["policy"] if config.lora.rank else ["policy", "reference"]
    if stage in ONLINE:
        found += ["reward"] if config.rewards.models else []
        found += ["critic"] if has_critic(config) else []
        found += ["rollout"] if config.rollout_layout != PlacementConfig() else []
    return tuple(found)


def meaningless(config: Config) -> dict[str, str]:
    """Keys that the stage does not look at -> why. A key that ends in a dot stands for all of its group."""
    stage, found = config.stage.name, {}
    name = f"stage={stage}"
    if stage in PACKED:
        found["train.micro_batch_size"] = f"{name} packs micro-batches by rollout.batch_tokens"
    if stage in ONLINE:
        found["train.global_batch_size"] = f"in {name} rollout.prompts x rollout.samples are the episodes of an iteration, ppo.minibatches cuts them"
    if stage not in ONLINE:
        for group in ("rewards.", "critic.", "reward_layout.", "critic_layout.", "rollout_layout.", "generate."):
            found[group] = f"{name} generates and scores nothing"
        read = {"dpo": ("ppo.beta", "ppo.label_smoothing", "ppo.offload")}.get(stage, ())
        found |= dict.fromkeys((f"ppo.{key}" for key in vars(config.ppo) if f"ppo.{key}" not in read), f"{name} has no rollouts")
        found |= dict.fromkeys(("rollout.prompts", "rollout.samples", "rollout.max_prompt", "rollout.logprob_bound"), f"{name} has no rollouts")
        if stage not in RANKED:
            found["rollout.batch_tokens"] = f"{name} cuts its batch by train.micro_batch_size"
        if stage != "dpo":
            found["reference_layout."] = f"{name} has no reference"
    else:
        found |= dict.fromkeys(("ppo.beta", "ppo.label_smoothing"), f"belongs to stage=dpo, not to {name}")
        if not has_critic(config):
            keys = ("critic.", "critic_layout.", "ppo.value_clip", "ppo.value_coef", "ppo.lam")
            found |= dict.fromkeys(keys, f"{name} with ppo.advantage={advantage(config)} has no critic")
        if policy_loss(config) not in CLIPPED:
            found |= dict.fromkeys(("ppo.clip", "ppo.clip_high"), f"ppo.policy_loss={policy_loss(config)} has no ratio to clip")
        if not config.ppo.ptx_coef:
            found["ppo.ptx_samples"] = "ppo.ptx_coef is 0"
        if config.ppo.kl_target is None:
            found["ppo.kl_horizon"] = "ppo.kl_target is null: the coefficient is fixed"
        if not config.rewards.models:
            found |= dict.fromkeys(("rewards.model_weight", "reward_layout."), "there are no rewards.models")
        if not config.rewards.functions:
            found["rewards.timeout"] = "there are no rewards.functions"
    if config.model.family != "encoder_decoder" or stage not in TEXT:
        found["data.span_length"] = "no spans are cut out: that is what model.family=encoder_decoder learns from"
    if config.model.family == "decoder" or stage not in TEXT:
        found["data.masked_share"] = "no words are masked: that is what model.family=encoder and encoder_decoder learn from"
    if stage != "reward":
        found["ranking."] = "belongs to stage=reward"
    if stage in TEXT:
        found["chat."] = f"{name} reads plain text: data.path"
    elif stage != "sft":
        found["chat.packing"] = "belongs to stage=sft"
    return found


def why_meaningless(config: Config, key: str) -> str | None:
    """Why the stage does not look at `key`; None where it does."""
    found = meaningless(config)
    return found.get(key) or next((reason for group, reason in found.items() if group.endswith(".") and key.startswith(group)), None)
