"""Rules of the stages after pretraining: where they start from, what is generated and scored, and what would be learnt from it. No torch.

They belong to the rules of `validate.py`, which says what a rule is. What a configuration alone cannot tell (the sizes of a reward model,
reward functions) is checked in `cli/cast.py`. Stop criteria and placement have their rules in `stopping.py` and `placement.py`.
"""
import math
from collections.abc import Iterator
from pathlib import Path

from megatron_ext.config.layouts import Rule, divisors
from megatron_ext.config.placement import misplaced
from megatron_ext.config.schema import Config, PlacementConfig
from megatron_ext.config.stages import (
    CHAT,
    ONLINE,
    PACKED,
    TEXT,
    advantage,
    has_critic,
    models,
    policy_loss,
)
from megatron_ext.errors import UserError

# Of rlhf/rewards and models/lora.py, which may not be imported here; tests/test_config_rlhf.py compares.
REWARD_FUNCTIONS = ("length", "format", "exact_match", "overlap", "repetition", "code")
LORA_TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
FORMATS = {"sft": ("prompt_response", "messages", "alpaca", "sharegpt"), "reward": ("preference", "ranking"), "dpo": ("preference", "ranking")}


# ---- where a stage starts, what it reads -------------------------------------------------------------------------------------------

def start_is_named(config: Config) -> Iterator[UserError]:
    stage, load = config.stage.name, config.checkpoint.load
    if stage == "pretrain" or stage not in (*TEXT, *CHAT) or config.checkpoint.start is not None:
        return
    resumes = load is not None and (load != "auto" or any(Path(config.run.dir, "checkpoints").glob("step_*/manifest.json")))
    if not resumes:
        yield UserError("checkpoint.start", "null", f"stage={stage} goes on from an earlier stage: name the run it starts from, such as "
                                                    "checkpoint.start=outputs/run")


def text_stages_read_text(config: Config) -> Iterator[UserError]:
    stage, chat = config.stage.name, config.chat
    if stage in TEXT and chat.path is not None:
        yield UserError("chat.path", chat.path, f"holds conversations, and stage={stage} reads plain text: prepare it and name data.path, or take stage=sft")
    if stage not in CHAT:
        return
    for key, path in (("chat.path", chat.path), ("chat.validation", chat.validation)):
        if path is not None and not Path(path).exists():
            yield UserError(key, path, "is not there; name a .jsonl, .ndjson, .json or .csv file (each also .gz), or a directory of them")
    allowed = ("auto", *FORMATS.get(stage, (chat.format,)))
    if chat.format not in allowed:
        yield UserError("chat.format", chat.format, f"is nothing that stage={stage} can learn from; it reads {', '.join(allowed)}")
    limit, name = (config.data.sequence_length, "data.sequence_length") if stage == "sft" else (config.model.max_sequence_length,
                                                                                              "model.max_sequence_length")
    if chat.max_length is not None and chat.max_length > limit:
        yield UserError("chat.max_length", chat.max_length, f"must be at most {name}={limit}")


def token_budget_is_of_text(config: Config) -> Iterator[UserError]:
    if config.stage.name in PACKED and config.train.tokens is not None:
        unit = "iterations" if config.stage.name in ONLINE else "optimizer steps"
        yield UserError("train.tokens", config.train.tokens, f"is a budget of sequences of one length; stage={config.stage.name} is as long as its "
                                                             f"train.steps ({unit})")


# ---- models ------------------------------------------------------------------------------------------------------------------------

def packed_layouts(config: Config) -> Iterator[UserError]:
    """What packed micro-batches of changing length, and generation, cannot run in."""
    stage, parallel = config.stage.name, config.parallel
    if stage not in PACKED:
        return
    if parallel.vpp is not None:
        yield UserError("parallel.vpp", parallel.vpp, f"needs micro-batches in multiples of parallel.pp, and stage={stage} packs as many as its tokens "
                                                      "need; leave it out: a checkpoint loads into any layout")
    if parallel.cp > 1:
        yield UserError("parallel.cp", parallel.cp, f"splits sequences of one length, and stage={stage} packs sequences of any; leave it out: a "
                                                    "checkpoint loads into any layout")
    if config.precision.fp8 is not None and config.kernels.layers in ("auto", "te"):  # auto is te where it is installed, which is not known here
        yield UserError("kernels.layers", config.kernels.layers, f"can be Transformer Engine, whose FP8 products need tokens in multiples of 16, and "
                                                                 f"stage={stage} packs any number of them; kernels.layers=fp8 pads")


def no_dropout(config: Config) -> Iterator[UserError]:
    if config.stage.name not in (*ONLINE, "dpo"):
        return
    for name in ("hidden_dropout", "attention_dropout"):
        if rate := getattr(config.model, name):
            yield UserError(f"model.{name}", rate, f"must be 0 in stage={config.stage.name}: the same tokens would have another probability each time "
                                                   "they are asked for, and the first ratio would not be 1")


def placements_fit(config: Config) -> Iterator[UserError]:
    if config.lora.rank and config.reference_layout != PlacementConfig() and config.stage.name in (*ONLINE, "dpo"):
        yield UserError("reference_layout", "...", "must be left out with lora.rank: the reference is the policy without its adapters, where it stands")
        return
    for role in models(config):
        if role != "policy" and getattr(config, f"{role}_layout") != PlacementConfig():
            yield from misplaced(config, role)


def adapters_fit(config: Config) -> Iterator[UserError]:
    lora, targets = config.lora, "[" + ",".join(config.lora.targets) + "]"
    if not lora.rank:
        return
    unknown = [name for name in lora.targets if name not in LORA_TARGETS]
    if unknown or not lora.targets:
        yield UserError("lora.targets", targets, f"must name some of {', '.join(LORA_TARGETS)}" + (f", not {unknown[0]}" if unknown else ""))
    if config.kernels.layers == "te":
        yield UserError("kernels.layers", "te", "has no adapters yet: with lora.rank take fused, fp8 or plain")
    if config.stage.name == "pretrain":
        yield UserError("lora.rank", lora.rank, "adapts weights that have been trained; stage=pretrain begins with random ones")


# ---- rewards and rollouts ----------------------------------------------------------------------------------------------------------

def rewards_are_named(config: Config) -> Iterator[UserError]:
    stage, rewards = config.stage.name, config.rewards
    if stage not in ONLINE:
        return
    counted = bool(rewards.models and rewards.model_weight) or any(rewards.weights or rewards.functions)
    if not counted:
        what = "are weighted with 0" if rewards.models or rewards.functions else "are empty"
        yield UserError("rewards.models", "[" + ",".join(rewards.models) + "]", f"and rewards.functions {what}: there is nothing to get better at; name "
                        "a checkpoint of the reward stage, or functions such as rewards.functions=[exact_match]")
    for path in rewards.models:
        if not Path(path).is_dir():
            yield UserError("rewards.models", path, "is not there; name a checkpoint or run directory of the reward stage")
    shown = "[" + ",".join(f"{weight:g}" for weight in rewards.weights) + "]"
    if rewards.weights and len(rewards.weights) != len(rewards.functions):
        yield UserError("rewards.weights", shown, f"must have one weight for each of the {len(rewards.functions)} rewards.functions")
    elif not all(map(math.isfinite, rewards.weights)):
        yield UserError("rewards.weights", shown, "weights must be finite numbers")


def critic_has_a_start(config: Config) -> Iterator[UserError]:
    critic, steps = config.critic, config.train.steps
    if not has_critic(config):
        return
    if critic.load is None and not config.rewards.models:
        yield UserError("critic.load", "null", "ppo.advantage=gae needs a value function, which starts from a reward model: name one here or in "
                                               "rewards.models, or take ppo.advantage=reinforce, rloo or grpo, which have none")
    elif critic.load is not None and not Path(critic.load).is_dir():
        yield UserError("critic.load", critic.load, "is not there; name a checkpoint or run directory of the reward stage")
    if critic.min_lr > critic.lr:
        yield UserError("critic.min_lr", critic.min_lr, f"must be at most critic.lr={critic.lr:g}")
    if critic.warmup_steps >= steps:
        yield UserError("critic.warmup_steps", critic.warmup_steps, f"must be below the {steps} iterations of the run")
    if critic.pretrain >= steps:
        yield UserError("critic.pretrain", critic.pretrain, f"must be below the {steps} iterations of the run: the policy would never learn")


def episodes_divide(config: Config) -> Iterator[UserError]:
    if config.stage.name not in ONLINE:
        return
    rollout, minibatches = config.rollout, config.ppo.minibatches
    episodes = rollout.prompts * rollout.samples
    if episodes % minibatches:
        yield UserError("ppo.minibatches", minibatches, f"must divide the episodes of an iteration, rollout.prompts x samples = {rollout.prompts} x "
                                                        f"{rollout.samples} = {episodes}: {divisors(episodes)}")
    if advantage(config) in ("grpo", "rloo") and rollout.samples < 2:
        yield UserError("rollout.samples", rollout.samples, f"must be at least 2: ppo.advantage={advantage(config)} compares the responses to a prompt "
                                                            "with one another")


def rollouts_are_drawn(config: Config) -> Iterator[UserError]:
    stage, settings, limit = config.stage.name, config.generate, config.model.max_sequence_length
    if stage not in ONLINE:
        return
    for key, value, greedy in (("temperature", settings.temperature, settings.temperature == 0), ("top_k", settings.top_k, settings.top_k == 1)):
        if greedy:
            yield UserError(f"generate.{key}", value, f"takes the most probable word always: there is nothing to compare, and stage={stage} would learn "
                                                      "nothing; rollouts are drawn at generate.temperature=1")
    if settings.samples != 1:
        yield UserError("generate.samples", settings.samples, f"must be left out: the responses to a prompt are rollout.samples in stage={stage}")
    if settings.max_tokens >= limit:
        yield UserError("generate.max_tokens", settings.max_tokens, f"leaves no room for a prompt in model.max_sequence_length={limit}")
    elif config.rollout.max_prompt is not None and config.rollout.max_prompt + settings.max_tokens > limit:
        yield UserError("rollout.max_prompt", config.rollout.max_prompt, f"and generate.max_tokens={settings.max_tokens} are more than "
                                                                         f"model.max_sequence_length={limit}: at most {limit - settings.max_tokens}")


def kl_has_a_gradient(config: Config) -> Iterator[UserError]:
    ppo = config.ppo
    if config.stage.name not in ONLINE:
        return
    if ppo.kl_in == "loss" and ppo.kl == "k1" and ppo.kl_coef:
        yield UserError("ppo.kl", "k1", "has a gradient of zero on average where it stands in the loss, E[grad log p] = 0: it would hold the policy to "
                                        "nothing. Take k2, whose gradient there is that of the KL (k3, of the reverse KL: GRPO's), or ppo.kl_in=reward")
    if ppo.kl_target is not None and not ppo.kl_coef:
        yield UserError("ppo.kl_target", ppo.kl_target, "is reached by multiplying ppo.kl_coef, and 0 stays 0; give it a start, such as 0.02")


def ptx_has_text(config: Config) -> Iterator[UserError]:
    data = config.data
    if config.stage.name in ONLINE and config.ppo.ptx_coef and config.chat.path is not None and not (data.path or data.paths):
        yield UserError("ppo.ptx_coef", config.ppo.ptx_coef, "mixes the loss on pretraining text in: name the text, data.path or data.paths")


RLHF: tuple[Rule, ...] = (
    start_is_named, text_stages_read_text, token_budget_is_of_text, packed_layouts, no_dropout, placements_fit, adapters_fit, rewards_are_named,
    critic_has_a_start, episodes_divide, rollouts_are_drawn, kl_has_a_gradient, ptx_has_text,
)


# ---- what works, and is seldom meant ------------------------------------------------------------------------------------------------

def doubts(config: Config) -> list[str]:
    """Sentences about settings that work and may surprise; `check` and `train` print them."""
    ppo, found = config.ppo, []
    if config.stage.name not in ONLINE:
        return found
    loss = policy_loss(config)
    if ppo.kl_in == "reward" and ppo.kl in ("k2", "k3") and ppo.kl_coef:
        found.append(f"ppo.kl={ppo.kl} in the reward does not give the gradient of the KL (a term is left out that is not zero); k1 does")
    if loss == "reinforce" and ppo.epochs * ppo.minibatches > 1:
        found.append(f"ppo.policy_loss=reinforce has no ratio: of the {ppo.epochs * ppo.minibatches} optimizer steps of an iteration only the first is on "
                     "the policy that wrote the responses")
    if loss == "gspo" and ppo.clip >= 0.01:
        found.append(f"ppo.clip={ppo.clip:g} never holds a ratio of ppo.policy_loss=gspo, which is a mean over a response; its authors take 3e-4")
    longest = config.generate.max_tokens + (config.rollout.max_prompt or 0)
    if longest > config.data.sequence_length:
        found.append(f"rollouts of up to {longest} tokens are longer than the data.sequence_length={config.data.sequence_length} that the model learnt from")
    if config.precision.fp8 is not None:
        found.append("FP8 scales come from whole micro-batches: generation and training differ by more than rounding (rollout.logprob_bound, docs/rlhf.md)")
    return found

