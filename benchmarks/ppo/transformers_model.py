"""The models of weights.py as transformers' GPT-2, for TRL's side and the ceiling's (each in its own environment and version)."""
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel
from weights import Shape, gpt2, score_head


def settings(shape: Shape) -> GPT2Config:
    return GPT2Config(
        vocab_size=shape.words, n_positions=shape.positions, n_embd=shape.hidden, n_layer=shape.layers, n_head=shape.heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=shape.eos, num_labels=1,
    )


def policy(spec: dict) -> GPT2LMHeadModel:
    model = GPT2LMHeadModel(settings(Shape(**spec["shape"])))
    _load(model, _backbone(spec))
    model.tie_weights()
    return model


def scorer(spec: dict, *, seed: int) -> GPT2ForSequenceClassification:
    """A reward model or value function: the same backbone, and a head drawn with `seed`."""
    model = GPT2ForSequenceClassification(settings(Shape(**spec["shape"])))
    _load(model, _backbone(spec) | {"score.weight": score_head(Shape(**spec["shape"]), seed=seed)})
    return model


def _backbone(spec: dict) -> dict[str, torch.Tensor]:
    return gpt2(Shape(**spec["shape"]), seed=spec["seed"], share=spec["share"], limit=spec["response"])


def _load(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Every weight is taken, and no other expected (the tied head aside)."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    left = [name for name in missing if name != "lm_head.weight" and not name.endswith((".attn.bias", ".attn.masked_bias"))]
    if left or unexpected:
        raise ValueError(f"weights of GPT-2: missing {left}, unexpected {unexpected}")
