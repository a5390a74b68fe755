"""What an iteration costs at least in plain PyTorch: its bare forward and backward passes, and transformers' `generate` with its cache.

    ENVIRONMENT/bin/python benchmarks/ppo/ceiling.py SPEC.json

    rollout             transformers' GPT-2, sampled
    scoring             forward passes of policy, reference, value function and reward model
    update              epochs x (policy, value function): forward, backward, AdamW (torch's fused one)

for responses of full length. No advantages, no KL, no metrics, no data, no journal. Logits are made of response positions alone. The model is
`plain.py` or transformers', in micro-batches of 8 rows or of all: what is fastest here, tried before the first turn.
"""
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import turns

if __name__ == "__main__":
    turns.own_stdout()

import plain
import torch
import torch.nn.functional as F
import transformers_model
from torch import Tensor, nn
from weights import Shape, gpt2, score_head

ROWS = (8, 32)


class Policy(nn.Module):
    """Logprobs of responses, [rows, response]."""

    def __init__(self, backbone: Callable[[Tensor], Tensor], table: Tensor, prompt: int):
        super().__init__()
        self.backbone, self.prompt = backbone, prompt
        self._table = [table]  # the backbone's own parameter

    def forward(self, tokens: Tensor) -> Tensor:
        logits = F.linear(self.backbone(tokens)[:, self.prompt - 1 : -1], self._table[0])
        answers = tokens[:, self.prompt :]
        return -F.cross_entropy(logits.flatten(0, 1), answers.flatten(), reduction="none").view(answers.shape)


class Value(nn.Module):
    """A number a response position, [rows, response]."""

    def __init__(self, backbone: Callable[[Tensor], Tensor], head: Tensor, prompt: int):
        super().__init__()
        self.backbone, self.head, self.prompt = backbone, nn.Parameter(head), prompt

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.backbone(tokens), self.head)[:, self.prompt - 1 : -1, 0]


class TransformersBackbone(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, use_cache=False).last_hidden_state


class Iteration:
    """The four models in one make (`plain` | `transformers`) and one number of rows a micro-batch."""

    def __init__(self, spec: dict, make: str, rows: int):
        self.spec, self.rows, shape = spec, rows, Shape(**spec["shape"])
        state = gpt2(shape, seed=spec["seed"], share=spec["share"], limit=spec["response"])

        def backbone():
            return plain.backbone(shape, state) if make == "plain" else TransformersBackbone(transformers_model.policy(spec).transformer)

        def policy() -> Policy:
            made = backbone()
            return Policy(made, made.wte.weight if make == "plain" else made.model.wte.weight, spec["prompt"])

        self.policy, self.reference = policy(), policy()
        self.value, self.reward = (Value(backbone(), score_head(shape, seed=spec["seed"] + k), spec["prompt"]) for k in (3, 2))
        self.optimizers = {model: torch.optim.AdamW(model.parameters(), lr=spec["lr"], fused=True) for model in (self.policy, self.value)}

    def parts(self, tokens: Tensor) -> list[Tensor]:
        return list(tokens.split(self.rows))

    @torch.no_grad()
    def scores(self, model: nn.Module, tokens: Tensor) -> Tensor:
        return torch.cat([model(part) for part in self.parts(tokens)])

    def step(self, model: nn.Module, tokens: Tensor, loss: Callable[[Tensor, Tensor], Tensor], target: Tensor) -> None:
        for part, wanted in zip(self.parts(tokens), self.parts(target)):
            (loss(model(part), wanted) / target.numel()).backward()
        self.optimizers[model].step()
        self.optimizers[model].zero_grad()

    def update(self, tokens: Tensor, old: Tensor, advantage: Tensor, returns: Tensor) -> None:
        def clipped(logp: Tensor, both: Tensor) -> Tensor:
            before, gain = both.unbind(-1)
            ratio = (logp - before).exp()
            return torch.maximum(-gain * ratio, -gain * ratio.clamp(0.8, 1.2)).sum()

        both = torch.stack((old, advantage), -1)
        for _ in range(self.spec["epochs"]):
            self.step(self.policy, tokens, clipped, both)
            self.step(self.value, tokens, lambda found, wanted: (found - wanted).square().sum() / 2, returns)


def fastest(spec: dict, tokens: Tensor) -> tuple[Iteration, str]:
    """Of the makes and sizes of micro-batches the one whose training pass is shortest here (best of three)."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter  # processor time where no second thread waits in it
    times = {}
    for make, rows in itertools.product(("plain", "transformers"), ROWS):
        iteration = Iteration(spec, make, rows)
        advantage = torch.randn(len(tokens), spec["response"])
        seconds = []
        for _ in range(3):
            began = clock()
            iteration.step(iteration.policy, tokens, lambda found, wanted: (found * wanted).sum(), advantage)
            seconds.append(clock() - began)
        times[make, rows] = min(seconds)
    make, rows = min(times, key=times.get)
    return Iteration(spec, make, rows), f"{make}, {rows} rows"


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    drawn = torch.Generator().manual_seed(spec["seed"] + 1)
    words = spec["shape"]["words"] - 1
    prompts = torch.randint(0, words, (spec["batch"], spec["prompt"]), generator=drawn)
    mask = torch.ones_like(prompts)
    generator = transformers_model.policy(spec).eval()
    whole = torch.randint(0, words, (spec["batch"], spec["prompt"] + spec["response"]), generator=drawn)
    iteration, chosen = fastest(spec, whole)
    laps: dict[str, list[float]] = {"rollout": [], "policy_scoring": [], "scoring": [], "update": []}

    def lap(name: str, began: float) -> float:
        now = time.perf_counter()
        laps[name].append(now - began)
        return now

    def describe() -> dict:
        found = {f"{name}_seconds": sum(seconds) / len(seconds) for name, seconds in laps.items()} | {"model": chosen}
        for seconds in laps.values():
            seconds.clear()
        return found

    clock = turns.Clock(describe)
    while clock.iteration():
        began = time.perf_counter()
        with torch.no_grad():
            tokens = generator.generate(prompts, attention_mask=mask, max_new_tokens=spec["response"], do_sample=True, top_k=0, use_cache=True,
                                        pad_token_id=0, eos_token_id=None)
        began = lap("rollout", began)
        old = iteration.scores(iteration.policy, tokens)
        began = lap("policy_scoring", began)
        others = [iteration.scores(model, tokens) for model in (iteration.reference, iteration.value, iteration.reward)]
        began = lap("scoring", began)
        iteration.update(tokens, old, others[0] - others[2], others[1])
        lap("update", began)


if __name__ == "__main__":
    main()
