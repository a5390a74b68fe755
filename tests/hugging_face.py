"""Tiny models of transformers in odd sizes, with weights far from their initial ones: no gain is 1 and no bias 0, so that one that is lost must show."""
import math
from dataclasses import dataclass, field
from pathlib import Path

WORDS = 125  # divides over no two ranks
SIZES = {"hidden_size": 60, "num_hidden_layers": 4, "vocab_size": WORDS, "max_position_embeddings": 96, "bos_token_id": None, "eos_token_id": None,
         "pad_token_id": None}
GROUPED = {**SIZES, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 88, "rms_norm_eps": 1e-5}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0, "original_max_position_embeddings": 24}
PARTIAL = {"rope_type": "default", "rope_theta": 700.0, "partial_rotary_factor": 0.4}
OPENAI = {"n_embd": 60, "n_layer": 4, "n_head": 6, "vocab_size": WORDS, "n_positions": 96, "bos_token_id": None, "eos_token_id": None, "resid_pdrop": 0.0,
          "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@dataclass(frozen=True)
class Case:
    """A model: transformers' classes (without Config and ForCausalLM), and its settings."""

    kind: str
    settings: dict = field(default_factory=dict)


CASES = {
    "llama": Case("Llama", GROUPED),
    "llama, scaled, biased, tied": Case("Llama", {**GROUPED, "rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True, "head_dim": 14,
                                                   "tie_word_embeddings": True}),
    "mistral": Case("Mistral", {**GROUPED, "sliding_window": None, "head_dim": 8}),
    "qwen2": Case("Qwen2", {**GROUPED, "tie_word_embeddings": True}),
    "qwen3": Case("Qwen3", {**GROUPED, "head_dim": 12}),
    "gpt2": Case("GPT2", {**OPENAI, "n_inner": 100}),
    "gpt_neox": Case("GPTNeoX", {**SIZES, "num_attention_heads": 6, "intermediate_size": 88, "rope_parameters": PARTIAL, "attention_dropout": 0.0}),
    "gpt_neox, one after the other": Case("GPTNeoX", {**SIZES, "num_attention_heads": 6, "intermediate_size": 88, "use_parallel_residual": False,
                                                      "attention_bias": False, "hidden_act": "gelu_new"}),
    "gptj": Case("GPTJ", {**OPENAI, "rotary_dim": 6}),
    "opt": Case("OPT", {**SIZES, "num_attention_heads": 6, "ffn_dim": 88, "dropout": 0.0}),
    "opt, as its 350M": Case("OPT", {**SIZES, "num_attention_heads": 6, "ffn_dim": 88, "dropout": 0.0, "do_layer_norm_before": False,
                                      "word_embed_proj_dim": 36}),
}


def build(case: Case, seed: int = 5):
    """The model, in fp32 and in evaluation."""
    import torch
    import transformers

    config = getattr(transformers, f"{case.kind}Config")(**case.settings)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{case.kind}{'LMHead' if case.kind == 'GPT2' else 'ForCausalLM'}{'Model' if case.kind == 'GPT2' else ''}")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * (1.5 / math.sqrt(parameter.shape[-1])))
            else:
                parameter.add_(0.3 * noise)
    return model


def save(case: Case, directory: Path, **options):
    """Writes a model as transformers does, and returns it."""
    model = build(case)
    model.save_pretrained(directory, **options)
    return model


def tensors(directory: Path) -> dict:
    """All tensors of a directory by name, read by the safetensors library."""
    from safetensors import safe_open

    found = {}
    for file in sorted(Path(directory).glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 no mapping
    return found


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two directories hold the same tensors, bit by bit and of the same dtypes."""
    import torch

    theirs, ours = tensors(one), tensors(other)
    return theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) and theirs[key].dtype == ours[key].dtype for key in theirs)


def read(kind: type, directory: Path):
    """The model of a directory. Not by from_pretrained, whose way over the meta device our stand-in for CUDA confuses."""
    config = kind.config_class.from_pretrained(directory)
    config._attn_implementation = "eager"
    model = kind(config).eval()
    # transformers 5 calls GPT-NeoX's head lm_head, and keeps the old name in files.
    found = {name.replace("embed_out.", "lm_head.") if hasattr(model, "lm_head") else name: tensor for name, tensor in tensors(directory).items()}
    model.load_state_dict(found, strict=not config.tie_word_embeddings)
    model.tie_weights()
    return model


LENGTH, PROMPT, GROWN = 40, 7, 64  # tokens: of a row whose logits are compared, of a prompt, of a completion


def rows(count: int = 3):
    """int64 [count, LENGTH + 1]."""
    import torch

    return torch.randint(0, WORDS, (count, LENGTH + 1), generator=torch.Generator().manual_seed(1))


def decoded(decoder):
    """fp32 [3, LENGTH, WORDS]: the logits of `truth` by a decoder of ours, whole in this process."""
    import torch

    tokens = rows()[:, :-1]
    with torch.no_grad():
        return decoder(tokens, torch.arange(LENGTH)[None].expand(len(tokens), -1))[..., :WORDS]


def truth(model) -> dict:
    """{"logits": [3, LENGTH, WORDS], "tokens": [2, GROWN]}: what transformers computes, and what it grows from two prompts, each alone."""
    import torch

    with torch.no_grad():
        logits = model(rows()[:, :-1]).logits
        grown = [model.generate(row[None, :PROMPT], do_sample=False, max_new_tokens=GROWN, min_new_tokens=GROWN, pad_token_id=0)[0, PROMPT:] for row in rows()[:2]]
    return {"logits": logits, "tokens": torch.stack(grown)}


def restored(directory: Path, platform, *words: str, train: bool = False, ranks: tuple[int, ...] = (0,)):
    """(the engine of a checkpoint in the layout that `words` say, its source)."""
    from megatron_ext.config.compose import compose
    from megatron_ext.parallel.layout import Layout
    from megatron_ext.train.engine import Engine
    from megatron_ext.train.restored import source
    from megatron_ext.train.weights import load_weights

    typed = (f"checkpoint.load={directory}", f"launch.ranks={len(ranks)}", *words)
    found = source(compose(typed), typed)
    parallel = found.config.parallel
    layout = Layout(tp=parallel.tp, pp=parallel.pp, sp=parallel.sp, ranks=ranks)
    engine = Engine(found.config, layout, platform, vocab_size=found.vocab_size, train=train)
    load_weights(engine, found.path)
    return engine, found


def grown(engine, *, modules_only: bool = False):
    """int64 [2, GROWN]: what our generation grows from the prompts of `truth`."""
    import torch

    from megatron_ext.config.schema import GenerateConfig
    from megatron_ext.generate.decode import generate

    prompts = [row[:PROMPT].tolist() for row in rows()[:2]]
    return torch.tensor([one.tokens for one in generate(engine, prompts, GenerateConfig(max_tokens=GROWN, temperature=0.0), modules_only=modules_only)])


def off(mine, theirs) -> float:
    """The largest difference relative to the largest number."""
    return float((mine - theirs).abs().max() / theirs.abs().max())
