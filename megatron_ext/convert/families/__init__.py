"""The families, by the `model_type` of their `config.json`."""
from dataclasses import replace

from megatron_ext.config import sizes
from megatron_ext.config.schema import ModelConfig
from megatron_ext.convert.families.gpt2 import GPT2
from megatron_ext.convert.families.gpt_neox import GPT_NEOX
from megatron_ext.convert.families.gptj import GPTJ
from megatron_ext.convert.families.llama import LLAMA
from megatron_ext.convert.families.mistral import MISTRAL
from megatron_ext.convert.families.opt import OPT
from megatron_ext.convert.families.qwen import QWEN2, QWEN3
from megatron_ext.convert.family import Family
from megatron_ext.convert.settings import Settings
from megatron_ext.errors import UserError
from megatron_ext.train.record import architecture

FAMILIES: dict[str, Family] = {family.name: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GPT2, GPT_NEOX, GPTJ, OPT)}


def family_of(settings: Settings) -> Family:
    """The family of a directory. Raises UserError for one that is not known."""
    name = settings.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise settings.wrong("model_type", name, f"is not known; known are {', '.join(FAMILIES)}")
    return FAMILIES[name]


def can_say(family: Family, model: ModelConfig, vocab: int) -> bool:
    """Whether a family's `config.json` says all that matters of a model: written and read back it is the same one."""
    try:
        again = family.reads(Settings(family.writes(model, vocab)))
        list(family.placed(model, vocab, family.prefix))
    except (ValueError, UserError):
        return False
    return architecture(_normal(replace(again, max_sequence_length=model.max_sequence_length)), vocab) == architecture(_normal(model), vocab)


def _normal(model: ModelConfig) -> ModelConfig:
    """The same model with its keys said in one way: `bias` covers the three others, and what positions do not read is as it is by itself."""
    usual = ModelConfig()
    three = sizes.biases(model)
    apart = (False, False, False) if all(three) else three
    found = replace(model, bias=all(three), qkv_bias=apart[0], proj_bias=apart[1], mlp_bias=apart[2])
    unread = ("rotary_percent", "rotary_base", "rotary_interleaved") if model.position_embedding == "learned" else ()
    if model.rope_scaling_factor is None:
        unread += ("rope_low_freq_factor", "rope_high_freq_factor", "rope_original_length")
    return replace(found, **{key: getattr(usual, key) for key in unread})
