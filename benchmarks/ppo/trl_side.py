"""TRL's PPO on the models of weights.py: `PPOTrainer.train()` as it stands, with a callback that holds the clock.

    TRL_ENVIRONMENT/bin/python benchmarks/ppo/trl_side.py SPEC.json

What is set is what serves TRL: the whole batch in one call of `generate`, the micro-batch that is faster here (bench_ppo.py tries two), fp32 without autocast, no gradient
checkpointing, no sample generations, no reports, no checkpoints, no evaluation. Between the iterations that are timed stand no others.
"""
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import turns

if __name__ == "__main__":
    turns.own_stdout()

import torch
import transformers_model
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import PPOConfig, PPOTrainer


class Turns(TrainerCallback):
    """Holds the clock between updates and reads how long responses were from TRL's own count of EOS."""

    def __init__(self, describe):
        self.clock = turns.Clock(describe)

    def on_train_begin(self, args, state, control, **_):
        self.clock.iteration()

    def on_step_end(self, args, state, control, **_):
        if not self.clock.iteration():
            os._exit(0)  # PPOTrainer.train() looks at no control that would end it


class Generation:
    """The policy's `generate`, and what it did since it was last asked: mean length of responses (EOS included), seconds of an iteration."""

    def __init__(self, model, *, eos: int):
        self._generate, self._eos = model.generate, eos
        self._lengths: list[float] = []
        self._seconds: list[float] = []

    def __call__(self, *args, **options):
        began = time.perf_counter()
        out = self._generate(*args, **options)
        self._seconds.append(time.perf_counter() - began)
        made = out.sequences[:, out.sequences.shape[1] - len(out.scores) :]
        ended = (made == self._eos).int().cumsum(1).cumsum(1)  # 1 at the first EOS
        self._lengths.append(float((ended <= 1).sum(1).float().mean()))
        return out

    def describe(self) -> dict:
        found = {"length": statistics.mean(self._lengths), "rollout_seconds": statistics.mean(self._seconds)}
        self._lengths.clear()
        self._seconds.clear()
        return found


def tokenizer(words: int) -> PreTrainedTokenizerFast:
    """Words are their numbers. The padding token lies behind the model's vocabulary, as in TRL's examples: no response can hold it."""
    table = {f"w{number}": number for number in range(words - 1)} | {"<eos>": words - 1, "<pad>": words}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(table, unk_token="w0")), eos_token="<eos>", pad_token="<pad>", padding_side="left",
    )


def prompts(spec: dict) -> Dataset:
    drawn = torch.Generator().manual_seed(spec["seed"] + 1)
    ids = torch.randint(0, spec["shape"]["words"] - 1, (spec["batch"] * 64, spec["prompt"]), generator=drawn)
    return Dataset.from_dict({"input_ids": ids.tolist()})


def trainer(spec: dict, folder: str) -> PPOTrainer:
    settings = PPOConfig(
        output_dir=folder, exp_name="bench", seed=spec["seed"],
        per_device_train_batch_size=spec["trl_micro_batch"], gradient_accumulation_steps=spec["batch"] // spec["trl_micro_batch"],
        local_rollout_forward_batch_size=spec["batch"], num_ppo_epochs=spec["epochs"], num_mini_batches=1,
        total_episodes=10**6 * spec["batch"], response_length=spec["response"], stop_token=None if spec["share"] is None else "eos",
        temperature=1.0, kl_coef=0.05, learning_rate=spec["lr"], bf16=False, fp16=False, use_cpu=True, gradient_checkpointing=False,
        num_sample_generations=0, report_to=[], save_strategy="no", disable_tqdm=True,
    )
    policy = transformers_model.policy(spec)
    data = prompts(spec)
    made = PPOTrainer(
        args=settings, processing_class=tokenizer(spec["shape"]["words"]), model=policy, ref_model=transformers_model.policy(spec),
        reward_model=transformers_model.scorer(spec, seed=spec["seed"] + 2), value_model=transformers_model.scorer(spec, seed=spec["seed"] + 3),
        train_dataset=data, eval_dataset=data.select(range(spec["batch"])),
    )
    made.remove_callback(PrinterCallback)
    return made


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with tempfile.TemporaryDirectory() as folder:
        made = trainer(spec, folder)
        seen = Generation(made.policy_model, eos=spec["shape"]["words"] - 1)
        made.policy_model.generate = seen
        made.add_callback(Turns(seen.describe))
        made.train()


if __name__ == "__main__":
    main()
