"""A tiny chain for tests of RLHF: records, a pretrained model, a reward model, and the command lines that go on from them."""
import json
import subprocess
from pathlib import Path

import forked
import small

VERBS = ("open", "close", "read", "write", "parse", "format", "copy", "move", "sort", "join", "split", "merge")
NOUNS = ("file", "list", "path", "string", "tree", "socket", "queue", "table")
MICRO = ("log.wandb=disabled", "log.every=1000", "launch.device=cpu", "data.workers=1", "optim.schedule=constant", "optim.warmup_steps=0",
         "critic.warmup_steps=0", "validation.every=0", "validation.at_end=false", "log.report=false", "checkpoint.best=false")
PPO = (
    "train.steps=3", "rollout.prompts=6", "ppo.minibatches=2", "ppo.epochs=2", "generate.max_tokens=8", "optim.lr=1e-3", "optim.min_lr=1e-3",
    "critic.lr=1e-3", "critic.min_lr=1e-3", "ppo.evaluate_prompts=4", "rollout.batch_tokens=64",
)


def write_records(folder: Path) -> dict[str, Path]:
    """prompt/response, rankings of three, and prompts with a reference, some hundred each."""
    pairs = [(f"What does {verb}_{noun} do?", f"It will {verb} the {noun} and return it.") for verb in VERBS for noun in NOUNS]
    rows = {
        "sft": [{"prompt": prompt, "response": answer} for prompt, answer in pairs],
        "rankings": [{"prompt": prompt, "responses": [answer, answer[:12], " ".join(reversed(answer.split()))], "ranking": [0, 1, 2]}
                     for prompt, answer in pairs],
        "prompts": [{"prompt": prompt, "reference": answer} for prompt, answer in pairs],
    }
    paths = {}
    for name, records in rows.items():
        paths[name] = folder / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return paths


def run(stage: str, run_dir: Path, *words: str, code: int = 0, script: tuple[str, ...] = ("-m", "megatron_ext")) -> subprocess.CompletedProcess:
    """`train stage=...`; a later word replaces an earlier one of the same key."""
    last = {word.split("=")[0]: word for word in (f"stage={stage}", f"run.dir={run_dir}", *MICRO, *words)}
    done = forked.run(["train", *last.values()], env=small.environment(), timeout=300, program=script)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert code or "Traceback" not in done.stderr, done.stderr[-4000:]
    return done


def make_chain(folder: Path, data: Path) -> dict[str, Path]:
    """{"pretrain", "reward", "sft", "rankings", "prompts": paths}: a model of 2 layers after 6 steps, and a reward model from it."""
    found = write_records(folder)
    found["pretrain"], found["reward"] = folder / "pretrain", folder / "reward"
    small.train(found["pretrain"], data, "train.steps=6", "data.sequence_length=64")
    run("reward", found["reward"], f"checkpoint.start={found['pretrain']}", f"chat.path={found['rankings']}", "train.steps=4", "train.global_batch_size=8",
        "optim.lr=1e-3", "optim.min_lr=1e-3", "rollout.batch_tokens=256")
    return found


def ppo_words(chain: dict[str, Path], *words: str) -> tuple[str, ...]:
    last = {word.split("=")[0]: word for word in (
        f"checkpoint.start={chain['pretrain']}", f"rewards.models=[{chain['reward']}]", f"chat.path={chain['prompts']}", *PPO, *words)}
    return tuple(last.values())
