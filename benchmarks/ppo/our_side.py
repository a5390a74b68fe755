"""Our PPO on the models of weights.py: the stage `ppo` as `train stage=ppo` runs it, with a clock between iterations.

    python benchmarks/ppo/our_side.py SPEC.json [key=value ...]

Before the clock starts the weights become two checkpoints (a policy and a reward model) and the prompts a JSONL file, in a temporary
directory. Then the loop runs whole: rollout, scoring, update, journal; without validations, checkpoints and report, as on TRL's side.
"""
import json
import os
import sys
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import turns

if __name__ == "__main__":
    turns.own_stdout()

import torch
from weights import Shape, gpt2, score_head

EOS = "<|endoftext|>"
PHASES = ("rollout", "scoring", "update")
TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"


def model_words(shape: Shape) -> list[str]:
    """GPT-2 in our words."""
    return [
        f"model.num_layers={shape.layers}", f"model.hidden_size={shape.hidden}", f"model.num_attention_heads={shape.heads}",
        f"model.max_sequence_length={shape.positions}", f"model.vocab_size={shape.words}", "model.position_embedding=learned", "model.norm=layernorm",
        "model.activation=gelu_tanh", "model.bias=true", "model.qkv_bias=true", "model.tied_embeddings=true",
    ]


def to_ours(shape: Shape, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of `weights.gpt2` in the names and layout of a `Decoder` on one rank: queries, keys and values of a head together."""
    heads = shape.heads
    found = {"embedding.word_embeddings.weight": state["transformer.wte.weight"], "embedding.position_embeddings.weight": state["transformer.wpe.weight"]}
    names = {"ln_1": "input_layernorm", "ln_2": "pre_mlp_layernorm", "attn.c_attn": "self_attention.linear_qkv", "attn.c_proj": "self_attention.linear_proj",
             "mlp.c_fc": "mlp.linear_fc1", "mlp.c_proj": "mlp.linear_fc2"}
    for layer in range(shape.layers):
        for theirs, ours in names.items():
            for part in ("weight", "bias"):
                value = state[f"transformer.h.{layer}.{theirs}.{part}"]
                value = value.t() if value.dim() == 2 else value
                if theirs == "attn.c_attn":
                    value = value.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)
                found[f"decoder.layers.{layer}.{ours}.{part}"] = value
    return found | {f"decoder.final_layernorm.{part}": state[f"transformer.ln_f.{part}"] for part in ("weight", "bias")}


def write_inputs(spec: dict, folder: Path) -> None:
    """tokenizer.json (words are their numbers), prompts.jsonl and the template."""
    words = spec["shape"]["words"]
    table = {f"w{number}": number for number in range(words - 1)} | {EOS: words - 1}
    (folder / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "added_tokens": [{"id": words - 1, "content": EOS, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
                                            "normalized": False}],
        "normalizer": None, "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": table, "unk_token": "w0"},
    }), encoding="utf-8")
    ids = prompts(spec)
    lines = (json.dumps({"prompt": " ".join(f"w{number}" for number in row)}) for row in ids.tolist())
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "template.jinja").write_text(TEMPLATE, encoding="utf-8")


def prompts(spec: dict) -> torch.Tensor:
    """As on TRL's side, int64 [n, prompt]."""
    drawn = torch.Generator().manual_seed(spec["seed"] + 1)
    return torch.randint(0, spec["shape"]["words"] - 1, (spec["batch"] * 64, spec["prompt"]), generator=drawn)


def write_checkpoint(spec: dict, folder: Path, *, head: str) -> Path:
    """A run directory with the benchmark's weights, as the stage before would have left it."""
    import hashlib

    from megatron_ext import checkpoint, platform
    from megatron_ext.config.compose import compose
    from megatron_ext.parallel.layout import Layout
    from megatron_ext.train import record
    from megatron_ext.train.engine import Engine

    shape = Shape(**spec["shape"])
    device = platform.install("cpu")
    platform.connect(device, 600)
    stage = "sft" if head == "vocabulary" else "reward"
    run = folder / stage
    config = compose([f"stage={stage}", *model_words(shape), f"run.dir={run}", "model.hidden_dropout=0"])
    engine = Engine(config, Layout(), device, vocab_size=shape.words, train=False, head=head)
    state = to_ours(shape, gpt2(shape, seed=spec["seed"], share=spec["share"], limit=spec["response"]))
    if head == "scalar":
        state |= {"value_head.weight": score_head(shape, seed=spec["seed"] + 2), "value_head.bias": torch.zeros(1)}
    own = dict(engine.models[0].named_parameters())
    if own.keys() != state.keys():
        raise ValueError(f"weights: not set {sorted(own.keys() - state.keys())}, unknown {sorted(state.keys() - own.keys())}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])
    saver = checkpoint.Checkpoints(run / "checkpoints", keep=0, background=False, sharding="fully_reshardable")
    tokenizer = (folder / "tokenizer.json").read_bytes()
    saver.save(1, engine.sharded_state(loading=False, weights_only=True), {
        "samples": 0, "tokens": 0, "vocab_size": shape.words, "model": record.architecture(config.model, shape.words), "layout": record.layout(config),
        "config": asdict(config), "stage": stage, "data": {"tokenizer": hashlib.sha256(tokenizer).hexdigest()}, "head": head, "reward_bias": 0.0,
    })
    saver.wait()
    saver.close()
    (run / "tokenizer.json").write_bytes(tokenizer)
    return run


def configuration(spec: dict, folder: Path, extra: list[str]):
    from megatron_ext.config.compose import compose
    from megatron_ext.train.start import adopt

    words = [
        "stage=ppo", f"checkpoint.start={folder / 'sft'}", f"rewards.models=[{folder / 'reward'}]", f"data.tokenizer={folder / 'tokenizer.json'}",
        f"chat.path={folder / 'prompts.jsonl'}", f"chat.template={folder / 'template.jinja'}", "chat.validation_share=0", f"run.dir={folder / 'run'}",
        f"rollout.prompts={spec['batch']}", "rollout.samples=1", f"generate.max_tokens={spec['response']}", "generate.temperature=1.0",
        f"generate.batch_size={spec['batch']}", f"ppo.epochs={spec['epochs']}", "ppo.minibatches=1", "ppo.kl_coef=0.05",
        f"optim.lr={spec['lr']}", f"optim.min_lr={spec['lr']}", f"critic.lr={spec['lr']}", f"critic.min_lr={spec['lr']}", "train.steps=1000000",
        "validation.every=0", "validation.at_end=false", "checkpoint.best=false", "checkpoint.save_at_end=false", "checkpoint.every=0",
        "log.wandb=disabled", "log.report=false", "launch.device=cpu", *extra,
    ]
    return adopt(compose(words), words)


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

    from megatron_ext import platform
    from megatron_ext.train import loop
    from rlhf.online import Online
    from rlhf.ppo import PPO
    from rlhf.prompts import prepare

    platform.quiet()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_inputs(spec, folder)
        for head in ("vocabulary", "scalar"):
            write_checkpoint(spec, folder, head=head)
        said: list[dict] = []

        def describe() -> dict:
            found = {name: sum(one[name] for one in said) / len(said) for name in said[0]}
            said.clear()
            return found

        clock = turns.Clock(describe)
        clock.iteration()

        class Timed(Online):
            """An iteration lasts from the end of the one before it to its own end, journal included."""

            def step(self, position):
                if position.steps and not clock.iteration():
                    os._exit(0)  # the parent has seen enough; nothing is to be written
                report = super().step(position)
                numbers = report.numbers
                said.append({"length": numbers["response_length"], **{f"{name}_seconds": numbers[f"seconds_{name}"] for name in PHASES}})
                return report

        loop.run(configuration(spec, folder, sys.argv[2:]), partial(Timed, algorithm=PPO), prepare)


if __name__ == "__main__":
    main()
