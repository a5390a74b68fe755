"""Does it learn? The bars of RLHF on real data, over three seeds; writes docs/learning.md and benchmarks/results/learning.json.

    python benchmarks/campaign_learn.py RUN [--seeds 3] [--ranks 2] [--only embedded,hh,ko] [key=value ...]      RUN: a directory of `make run`

embedded   from RUN's sft: a reward model and ppo for each seed, with the settings of conf/run.yaml. After ppo the held-out reward is above sft's by more
           than two standard errors with KL within its budget, and the reward model is right on at least 80 % of held-out pairs.
hh         2,312 human preferences (../shared/data/hh_harmless_test.jsonl.gz): a reward model, judged on a held-out fifth: better than chance by more than
           two standard errors, or not.
ko         11,823 Korean pairs (../shared/data/chatbot_ko.csv): sft from RUN's pretrained model; held-out loss a third lower than the start's.
"""
import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"


def train(stage: str, run_dir: Path, *words: str) -> float:
    """Runs a stage by the command that a user types; seconds."""
    began = time.monotonic()
    last = {word.split("=")[0]: word for word in (f"stage={stage}", f"run.dir={run_dir}", "log.wandb=disabled", "log.every=20", "checkpoint.load=auto", *words)}
    subprocess.run([sys.executable, "-W", "ignore", "-m", "megatron_ext", "train", *last.values()], cwd=ROOT, check=True)
    return time.monotonic() - began


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def recipe(stage: str) -> tuple[str, ...]:
    from megatron_ext.cli.recipe import with_defaults

    return with_defaults((), stage)


def embedded(run: Path, out: Path, seeds: int, common: list[str]) -> list[dict]:
    found = []
    for seed in range(1, seeds + 1):
        words = [f"train.seed={seed}", f"data.seed={seed}", f"generate.seed={seed}", f"checkpoint.start={run / 'sft'}", *common]
        reward, ppo = out / f"reward-{seed}", out / f"ppo-{seed}"
        seconds = train("reward", reward, *recipe("reward"), *words), train("ppo", ppo, *recipe("ppo"), *words, f"rewards.models=[{reward}]")
        accuracy = max(one.get("validation_accuracy", 0.0) for one in lines(reward / "metrics.jsonl"))
        # The stage's result is the best checkpoint: of the validations within the KL budget the one with the greatest reward.
        best = json.loads((ppo / "checkpoints" / "best.json").read_text())["step"]
        start = next(one for one in lines(ppo / "events.jsonl") if one["kind"] == "samples")
        chosen = next(one for one in lines(ppo / "metrics.jsonl") if one["step"] == best)
        found.append({
            "seed": seed, "accuracy": accuracy, "before": start["reward"], "after": chosen["validation_reward"],
            "error": math.hypot(start["reward_error"], chosen["validation_reward_error"]), "kl": chosen["validation_kl_k1"], "iteration": best,
            "seconds": seconds, "stop": [one["reason"] for one in lines(ppo / "events.jsonl") if one["kind"] == "stop"][-1],
        })
    return found


def hh(run: Path, out: Path, common: list[str]) -> dict:
    seconds = train("reward", out / "hh", *recipe("reward"), f"checkpoint.start={run / 'sft'}", f"chat.path={DATA / 'hh_harmless_test.jsonl.gz'}",
                    "chat.validation_share=0.2", "chat.max_length=512", "chat.overlong=truncate", "train.steps=110", "train.global_batch_size=32",
                    "optim.lr=3e-4", "optim.min_lr=3e-5", "validation.every=22", "data.seed=1", *common)
    metrics = [one for one in lines(out / "hh" / "metrics.jsonl") if "validation_accuracy" in one]
    skipped = sum(one["count"] for one in lines(out / "hh" / "events.jsonl") if one["kind"] == "record_skipped")
    last = metrics[-1]
    return {"accuracy": last["validation_accuracy"], "best": max(one["validation_accuracy"] for one in metrics), "pairs": last["validation_pairs"],
            "error": math.sqrt(0.25 / last["validation_pairs"]), "skipped_or_cut": skipped, "seconds": seconds}


def ko(run: Path, out: Path, common: list[str]) -> dict:
    """The start's loss is measured by the validation of a run whose learning rate is nothing."""
    words = [*recipe("sft"), f"checkpoint.start={run / 'pretrain'}", f"chat.path={DATA / 'chatbot_ko.csv'}", "chat.prompt_key=Q", "chat.response_key=A",
             "validation.samples=128", *common]
    seconds = train("sft", out / "ko", *words, "train.steps=300", "validation.every=100")
    train("sft", out / "ko-start", *words, "train.steps=1", "optim.lr=1e-30", "optim.min_lr=0", "optim.warmup_steps=0", "optim.weight_decay=0", "validation.every=1")
    before = lines(out / "ko-start" / "metrics.jsonl")[-1]["validation_loss"]
    after = min(one["validation_loss"] for one in lines(out / "ko" / "metrics.jsonl") if "validation_loss" in one)
    return {"before": before, "after": after, "lower_by": 1 - after / before, "seconds": seconds}


def table(found: dict, command: str) -> str:
    rows = ["# Does it learn?", "", "Two CPU cores, the model of `make run` (4.3 M parameters). Made by", "", f"    {command}", ""]
    if found.get("embedded"):
        budget = next(word.split("=")[1] for word in recipe("ppo") if word.startswith("stop.kl_budget="))
        rows += ["## The embedded tasks, held-out prompts and pairs", "",
                 "| seed | reward model right on | reward of sft | after ppo | gain in standard errors | KL, nats a response | iteration | stopped because |", "|---|---|---|---|---|---|---|---|"]
        for one in found["embedded"]:
            gain = one["after"] - one["before"]
            rows.append(f"| {one['seed']} | {one['accuracy']:.1%} | {one['before']:.3f} | {one['after']:.3f} | {gain / one['error']:.1f} | "
                        f"{one['kl']:.2f} of {budget} | {one['iteration']} | {one['stop']} |")
        rows += ["", "The model is the best checkpoint of the stage. The standard error is that of the difference of two independent means over the held-out prompts.", ""]
    if found.get("hh"):
        one = found["hh"]
        above = (one["accuracy"] - 0.5) / one["error"]
        rows += ["## Anthropic HH, harmless-base/test", "",
                 f"{one['pairs']:.0f} held-out pairs: {one['accuracy']:.1%} right at the end ({one['best']:.1%} at the best validation), chance 50 % with a standard error of "
                 f"{one['error']:.1%}: {above:.1f} standard errors above chance. " + ("The bar of two is met." if above > 2 else
                 "The bar of two is not met: a model of this size, pretrained on source code, cannot tell these dialogues apart.")
                 + f" {one['skipped_or_cut']} records were skipped or cut (four have an empty response).", ""]
    if found.get("ko"):
        one = found["ko"]
        rows += ["## Korean pairs (chatbot_ko.csv)", "", f"Held-out loss {one['before']:.3f} -> {one['after']:.3f} nats a token of the responses: {one['lower_by']:.0%} lower.", ""]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--only", default="embedded,hh,ko")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "learning")
    options, words = parser.parse_known_args()
    common, run, result = [f"launch.ranks={options.ranks}", *words], options.run.resolve(), ROOT / "benchmarks" / "results" / "learning.json"
    found = json.loads(result.read_text()) if result.exists() else {}
    for name, work in (("embedded", lambda: embedded(run, options.out, options.seeds, common)), ("hh", lambda: hh(run, options.out, common)),
                       ("ko", lambda: ko(run, options.out, common))):
        if name in options.only.split(","):
            found[name] = work()
            result.write_text(json.dumps(found, indent=1) + "\n")
    text = table(found, "python benchmarks/campaign_learn.py outputs/run")
    (ROOT / "docs" / "learning.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
