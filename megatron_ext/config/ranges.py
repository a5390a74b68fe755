"""What a single value may be: choices, and ranges of numbers. Rules that look at several keys are in `validate.py`."""
import difflib
import math
from collections.abc import Iterator

from megatron_ext.config import build
from megatron_ext.config.schema import Config
from megatron_ext.config.stages import LAYOUTS
from megatron_ext.curate import config as curate
from megatron_ext.errors import UserError

CHOICES: dict[str, tuple[str, ...]] = {
    "model.family": ("decoder", "encoder", "encoder_decoder"),
    "model.position_embedding": ("rope", "learned", "sinusoidal", "relative"),
    "model.block": ("serial", "parallel", "parallel_one_norm", "post_norm"),
    "model.norm": ("rmsnorm", "layernorm"),
    "model.activation": ("swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh", "relu"),
    "parallel.recompute": ("none", "selective", "full"),
    "parallel.cp_method": ("ring", "ulysses", "gather"),
    "precision.dtype": ("fp32", "bf16", "fp16"),
    "precision.fp8_format": ("hybrid", "e4m3"),
    "kernels.layers": ("auto", "fused", "te", "fp8", "plain"),
    # Of kernels/backend.py, which may not be imported here; tests/test_config_validate.py compares.
    **dict.fromkeys(("kernels.rms_norm", "kernels.layer_norm", "kernels.swiglu", "kernels.geglu", "kernels.bias_gelu", "kernels.rope",
                     "kernels.linear_cross_entropy"), ("auto", "triton", "torch")),
    "kernels.attention": ("auto", "flash-attn-3", "flash-attn-4", "flash-attn-2", "transformer-engine", "varlen", "flex", "torch"),
    "kernels.fp8_linear": ("auto", "scaled_mm", "emulation"),
    "data.corpus": ("stdlib", "stdlib-docs"),
    "optim.schedule": ("cosine", "linear", "wsd", "constant"),
    "optim.wsd_decay": ("sqrt", "linear"),
    "checkpoint.format": ("fully_reshardable", "dp_reshardable"),
    "launch.device": ("auto", "cpu", "cuda"),
    "cluster.launcher": ("srun", "torchrun"),
    "cluster.container": ("none", "pyxis", "apptainer"),
    "log.wandb": ("auto", "disabled", "offline", "online"),
    "evaluate.split": ("train", "validation", "test"),
    "scaling.law": ("auto", "chinchilla", "power"),
    "chat.format": ("auto", "prompt_response", "messages", "alpaca", "sharegpt", "preference", "ranking", "prompts"),
    "chat.overlong": ("skip", "truncate"),
    "collect.builder": ("auto", "qa", "articles", "faq", "sections", "passages", "few_shot", "tasks"),
    "collect.choose": ("order", "best"),
    "collect.merge": ("mean", "each"),
    "collect.format": ("ranking", "preference", "sft"),
    # Of the registries of rlhf/; tests/test_config_rlhf.py compares.
    "ppo.advantage": ("gae", "grpo", "rloo", "reinforce"),
    "ppo.policy_loss": ("clip", "reinforce", "gspo", "cispo"),
    "ppo.kl": ("k1", "k2", "k3"),
    "ppo.kl_in": ("reward", "loss"),
    **{f"curate.{key}": choices for key, choices in curate.CHOICES.items()},
}

# Interval notation, as in a textbook: [0,1) holds 0 and not 1.
RANGES: dict[str, str] = {
    **dict.fromkeys((
        "model.num_layers", "model.hidden_size", "model.num_attention_heads", "model.num_query_groups", "model.head_dim",
        "model.ffn_hidden_size", "model.decoder_layers", "model.max_sequence_length", "model.vocab_size", "model.vocab_multiple", "model.embedding_size",
        "model.rope_original_length", "parallel.tp", "parallel.pp",
        "parallel.cp", "parallel.recompute_layers", "precision.loss_scale_window", "precision.fp8_history", "data.sequence_length", "train.steps", "train.tokens",
        "train.global_batch_size", "train.micro_batch_size", "validation.samples", "stop.plateau_patience", "launch.ranks", "log.every",
        "generate.max_tokens", "generate.samples", "generate.batch_size", "evaluate.batch_size", "evaluate.limit", "chat.max_length", "rollout.prompts",
        "rollout.samples", "rollout.max_prompt", "rollout.batch_tokens", "ppo.epochs", "ppo.minibatches", "ppo.ptx_samples", "ppo.evaluate_prompts",
        "cluster.nodes", "cluster.min_nodes", "cluster.tasks_per_node", "cluster.cpus_per_task", "cluster.max_failures", "cluster.array_limit",
        "collect.min_chars", "collect.max_chars", "collect.passage_chars", "collect.concurrency", "collect.max_requests", "collect.max_tokens", "collect.votes",
        "collect.shared_votes", "collect.target", "collect.domain_target",
        *(f"{name}.{kind}" for name in LAYOUTS for kind in ("tp", "pp")),
    ), "[1,inf)"),
    **dict.fromkeys((
        "model.position_offset", "model.token_types", "precision.fp8_margin", "precision.fp8_edge_layers", "data.max_bad_lines", "data.workers",
        "optim.warmup_steps", "optim.decay_steps", "train.max_bad_steps", "validation.every",
        "checkpoint.every", "checkpoint.keep", "launch.threads", "log.gpu_every", "generate.top_k", "evaluate.samples", "evaluate.fewshot",
        "evaluate.bootstrap",
        "optim.weight_decay", "optim.clip", "optim.min_lr", "stop.plateau_delta", "generate.temperature",
        "chat.max_bad_records", "lora.rank", "ranking.margin", "ppo.entropy_coef", "ppo.kl_coef", "ppo.ptx_coef", "critic.min_lr",
        "critic.warmup_steps", "critic.pretrain", "stop.reward_per_kl", "cluster.gpus_per_node", "cluster.max_restarts", "recovery.max_rewinds",
        "collect.shots", "collect.retries", "collect.price_in", "collect.price_out",
    ), "[0,inf)"),
    **dict.fromkeys(("collect.timeout", "collect.max_cost", "collect.lease"), "(0,inf)"),
    **dict.fromkeys(("collect.shared", "collect.grounded"), "[0,1]"),
    "collect.max_answers": "[2,10)",  # as many as there are digit keys
    **dict.fromkeys(("train.seed", "data.seed", "generate.seed"), "[0,4294967296)"),
    **dict.fromkeys(("optim.lr", "optim.eps", "model.norm_eps", "model.rotary_base", "model.rope_low_freq_factor", "model.rope_high_freq_factor", "stop.wall_time", "launch.timeout",
                     "precision.initial_loss_scale", "lora.alpha", "rewards.timeout", "rewards.clip", "rollout.logprob_bound", "ppo.clip_high",
                     "ppo.value_clip", "ppo.value_coef", "ppo.kl_target", "ppo.kl_horizon", "ppo.beta", "critic.lr", "stop.kl_budget",
                     "stop.entropy_floor"), "(0,inf)"),
    **dict.fromkeys(("rewards.model_weight", "rewards.missing_eos"), "(-inf,inf)"),
    **dict.fromkeys(("hardware.memory", "hardware.bf16", "hardware.fp8", "hardware.bandwidth", "hardware.nvlink", "hardware.network", "hardware.power",
                     "plan.text_bytes", "plan.mttf", "plan.mttf_gpu"), "(0,inf)"),
    **dict.fromkeys(("hardware.domain", "plan.token_bytes", "plan.shown", "plan.pue", "plan.server"), "[1,inf)"),
    **dict.fromkeys(("plan.price", "plan.power_price"), "[0,inf)"),
    **dict.fromkeys(("plan.draw", "plan.availability"), "(0,1]"),
    "plan.margin": "[0,1)",
    "model.init_std": "[0,inf)",
    "model.relative_buckets": "[4,inf)",
    "model.relative_distance": "[2,inf)",
    **dict.fromkeys(("model.attention_scale", "model.embedding_scale", "model.logit_scale"), "(0,inf)"),
    "data.span_length": "[1,inf)",
    "scaling.noise": "(0,0.5)",
    "scaling.level": "(0,1)",
    "scaling.resamples": "[20,inf)",
    "model.rope_scaling_factor": "[1,inf)",
    **dict.fromkeys(("model.hidden_dropout", "model.attention_dropout", "optim.beta1", "optim.beta2", "chat.validation_share"), "[0,1)"),
    **dict.fromkeys(("ppo.clip", "ppo.ema", "stop.calibration_error", "data.masked_share"), "(0,1)"),
    **dict.fromkeys(("ppo.gamma", "ppo.lam"), "[0,1]"),
    "ppo.label_smoothing": "[0,0.5)",
    "stop.reward_accuracy": "(0.5,1]",  # a coin is right half the time
    **dict.fromkeys(("stop.length_drift", "stop.reward_disagreement", "health.straggler_factor", "recovery.spike_factor"), "(1,inf)"),
    "model.rotary_percent": "(0,1]",
    "generate.top_p": "(0,1]",
    **dict.fromkeys(("parallel.vpp", "stop.window", "recovery.window", "evaluate.max_length"), "[2,inf)"),
    "data.vocab_size": "[257,inf)",  # a byte-level tokenizer has its 256 bytes and the end of a document
    **dict.fromkeys(("launch.master_port", "collect.port"), "[0,65536)"),
    **dict.fromkeys(("health.hang_timeout", "health.straggler_window"), "[1,inf)"),
    "cluster.signal_lead": "[0,65536)",  # what Slurm takes
    **{f"curate.{key}": interval for key, interval in curate.RANGES.items()},
}


def value_of(config: Config, key: str) -> object:
    """The value at a dotted key."""
    found: object = config
    for part in key.split("."):
        found = getattr(found, part)
    return found


def check_values(config: Config) -> Iterator[UserError]:
    """One error for each value that is no choice, out of range, or not finite."""
    for key, choices in CHOICES.items():
        value = value_of(config, key)
        if value not in choices and not (value is None and _or_null(key)):
            close = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}? " if close else ""
            yield UserError(key, value, f"{hint}must be one of {', '.join(choices)}{_or_null(key)}")
    for key, interval in RANGES.items():
        value = value_of(config, key)
        if value is not None and not _inside(value, interval):
            yield UserError(key, value, f"must be {_words(interval)}{_or_null(key)}")
    for key, hint in build.key_types().items():
        value = value_of(config, key)
        if hint in (float, float | None) and value is not None and not math.isfinite(value) and key not in RANGES:
            yield UserError(key, value, "must be a finite number")


def _or_null(key: str) -> str:
    return " or null" if "null" in build.describe(build.key_types()[key]) else ""


def _ends(interval: str) -> tuple[float, float]:
    low, high = interval[1:-1].split(",")
    return float(low), float(high)


def _inside(value: float, interval: str) -> bool:
    low, high = _ends(interval)
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below  # nan is in no interval


def _words(interval: str) -> str:
    low, high = _ends(interval)
    if math.isinf(low):
        return "a finite number"
    lower = f"at least {low:g}" if interval[0] == "[" else f"greater than {low:g}"
    if math.isinf(high):
        return lower
    return f"{lower} and " + (f"at most {high:.10g}" if interval[-1] == "]" else f"below {high:.10g}")
