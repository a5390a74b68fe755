"""The stage of ppo, grpo and rloo: what they share. One step is an iteration:

    rollout   the policy answers prompts                                                        (rollout.py)
    scoring   rewards, old and reference logprobs, values; then KL, advantages, returns          (judge.py, kl.py, advantages.py)
    update    epochs x minibatches of policy steps, then of critic steps                         (update.py, objectives.py)

An algorithm (`Algorithm`) says which advantage and which policy loss; see ppo.py, grpo.py, rloo.py. All of an iteration is a function of the
models at its start, its number, and the KL controller, so that a run that is killed anywhere goes on bit for bit from its last checkpoint.
"""
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_ext.checkpoint.ancestry import chain
from megatron_ext.config.schema import Config
from megatron_ext.errors import RunFailed
from megatron_ext.parallel.signals import Interrupted, heard
from megatron_ext.platform import Platform
from megatron_ext.train.life import Life
from megatron_ext.train.record import data_identity
from megatron_ext.train.schedule import lr_at
from megatron_ext.train.stage import Position, StepReport
from megatron_ext.train.stop import Stop
from rlhf import kl
from rlhf.advantages import ADVANTAGES, Episodes
from rlhf.cast import Cast
from rlhf.experience import gather
from rlhf.held_out import answer_held_out
from rlhf.numbers import Clock, mean, std
from rlhf.objectives import PolicyObjective, TokenScore, ValueObjective, Values
from rlhf.policy_losses import VARIANCE_SUMS, explained_variance
from rlhf.prompts import Prompts
from rlhf.report import write_report
from rlhf.rollout import Rollouts, choose, keeps, roll_out
from rlhf.stop import PolicyCriteria
from rlhf.update import Trainer, kept_elsewhere, passes, ptx_sequences

# Largest |train - generate| logprob by precision, measured (docs/rlhf.md).
LOGPROB_BOUNDS = {"fp32": 2e-5, "bf16": 0.5, "fp16": 0.1, "fp8": 2.0}


@dataclass(frozen=True)
class Algorithm:
    """advantage, policy_loss: names in their registries. over: what policy losses are a mean of, tokens | sequences."""

    advantage: str
    policy_loss: str = "clip"
    over: str = "tokens"


@dataclass
class Experience:
    """An iteration's numbers, fp32 on the CPU, the same on every rank: [response tokens] flat, scores [n]."""

    rollouts: Rollouts
    old: torch.Tensor
    entropy: torch.Tensor
    reference: torch.Tensor
    values: torch.Tensor | None
    scores: torch.Tensor


class Online:
    """A stage (megatron_ext/train/stage.py)."""

    training_flops = False
    samples_move_on = False
    life = Life()

    def __init__(self, config: Config, platform: Platform, algorithm: Algorithm):
        self.config, self.platform = config, platform
        self.algorithm = replace(algorithm, advantage=config.ppo.advantage or algorithm.advantage,
                                 policy_loss=config.ppo.policy_loss or algorithm.policy_loss)
        self.advantage = ADVANTAGES[self.algorithm.advantage]
        self.prompts = Prompts(config)
        self.tokenizer, self.vocab_size, self.identity = self.prompts.file, self.prompts.vocab_size, self.prompts.identity
        self.identity = self.identity | {"prompts an iteration": config.rollout.prompts, "samples a prompt": config.rollout.samples}
        self.validates, self.steps = bool(self.prompts.held_out), config.train.steps
        self.cast = Cast(config, platform, vocab_size=self.vocab_size, tokenizer=self.prompts.tokenizer.sha256, critic=self.advantage.critic)
        self.layout = self.cast.layout
        self.controller = kl.controller(config.ppo)
        self.criteria = PolicyCriteria(config)
        self.best = self.criteria.best if config.checkpoint.best else None
        self.ptx = self.prompts.pretraining() if config.ppo.ptx_coef else None
        if self.ptx is not None:
            self.identity = self.identity | {"pretraining": data_identity(config.data, config.model)}
        precision = "fp8" if config.precision.fp8 else config.precision.dtype
        self.bound = LOGPROB_BOUNDS[precision] if config.rollout.logprob_bound is None else config.rollout.logprob_bound

    # ------------------------------------------------------------ an iteration

    def step(self, position: Position) -> StepReport:
        config, settings, count = self.config, self.config.ppo, self.config.rollout.prompts * self.config.rollout.samples
        clock = Clock(self.platform)
        questions = choose(self.prompts.training, first=position.steps * config.rollout.prompts, count=config.rollout.prompts, seed=config.data.seed)
        with self.life.phase("rollout"), self.cast.generating() as engine:
            rollouts = roll_out(engine, questions, config.generate, samples=config.rollout.samples, first=position.steps * count,
                                tokenizer=self.prompts.tokenizer, eod=self.prompts.template.end, leave=heard)
        self._may_leave()
        clock.lap("rollout")
        kept = keeps(config.generate)
        wanted = passes(count, config, iteration=position.steps, reshuffle=kept is None)
        steps = settings.epochs * settings.minibatches
        extra = self._ptx(first=position.steps * steps, steps=steps, count=count // settings.minibatches)
        judged = self.cast.judge(rollouts)
        self._may_leave()
        policy = Trainer(self.cast.policy.engine, config, rollouts.sequences, rollouts.offsets, extra, parts=steps)
        critic = Trainer(self.cast.critic.engine, config, rollouts.sequences, rollouts.offsets) if self.cast.critic else None
        found = self._score(rollouts, judged.scores, policy, critic, wanted[0], kept)
        self._may_leave()
        numbers = self._look(found) | judged.numbers
        self._hold(numbers)
        divergence = kl.estimate(found.old, found.reference, settings.kl)
        episodes = Episodes(
            cu_seqlens=rollouts.cu_seqlens, scores=found.scores, groups=rollouts.groups, kl=divergence if settings.kl_in == "reward" else None,
            kl_coef=self.controller.value, values=found.values,
        )
        advantages, returns = self.advantage(episodes, settings)
        clock.lap("scoring")
        numbers |= {"kl_coef": self.controller.value, "advantage_mean": mean(advantages), "advantage_std": std(advantages)}
        updated, norm, lr = self._update_policy(position, policy, found, advantages, wanted, kept, pretrain=position.steps < config.critic.pretrain)
        numbers |= updated
        if critic is not None:
            numbers |= self._update_critic(position, critic, found, returns, wanted)
        self.controller.update(numbers["kl_k1"], count)
        self.cast.average()
        clock.lap("update")
        numbers |= clock.numbers() | {"episodes": position.samples + count, "skipped_prompts": self.prompts.skipped,
                                       "device_bytes_peak": self.cast.ledger.peak}
        for function, reason, times in judged.failures:
            self.journal.event("reward_failed", step=position.steps + 1, function=function, reason=reason, count=times)
        applied = all([numbers.pop("applied"), numbers.pop("critic_applied", True)])
        return StepReport(numbers["policy_loss"], norm, lr, samples=count, tokens=sum(len(one.tokens) for one in rollouts.sequences),
                          applied=applied, numbers=numbers)

    def _may_leave(self) -> None:
        """Raises Interrupted where the job was told to stop: nothing has been learnt from these rollouts yet, and they can be made again."""
        if self.life.asked():
            raise Interrupted

    def _score(self, rollouts: Rollouts, scores: torch.Tensor, policy: Trainer, critic: Trainer | None, first: list[tuple[int, ...]],
               kept: dict | None) -> Experience:
        """Everything that models say of the rollouts, with the micro-batches of the first pass."""
        temperature, drawn = self.config.generate.temperature, {"words": rollouts.words}

        def over(trainer: Trainer, objective, columns: int) -> list[torch.Tensor]:
            totals = [torch.zeros(rollouts.offsets[-1]) for _ in range(columns)]
            for number, episodes in enumerate(first):
                minibatch = trainer.cut(number, episodes)
                found = [one if isinstance(one, tuple) else (one,) for one in trainer.collect(minibatch, objective, drawn)]
                for column, total in enumerate(totals):
                    total += gather(trainer.engine, minibatch.plan, [one[column] for one in found], rollouts.offsets)
            return totals

        with self.cast.policy.awake():
            old, entropy = over(policy, TokenScore(temperature=temperature, keep=kept), 2)
        with self.cast.reference() as engine:
            trainer = Trainer(engine, self.config, rollouts.sequences, rollouts.offsets)
            same = None if kept is None else kept_elsewhere(kept, policy, trainer, first)
            reference = over(trainer, TokenScore(temperature=temperature, keep=same), 1)[0]
        values = None
        if critic is not None:
            with self.cast.critic.awake():
                values = over(critic, Values(), 1)[0]
        return Experience(rollouts, old, entropy, reference, values, scores)

    def _look(self, found: Experience) -> dict[str, float]:
        """What the rollouts were like, before anything is learnt from them."""
        rollouts, cu = found.rollouts, found.rollouts.cu_seqlens
        difference = (found.old - rollouts.generated).abs()
        numbers = {
            "reward": mean(found.scores), "reward_std": std(found.scores), "response_length": sum(rollouts.lengths) / len(rollouts.lengths),
            "eos_rate": sum(rollouts.ended) / len(rollouts.ended), "logprob_difference": float(difference.max()), "entropy": mean(found.entropy),
        }
        for kind in ("k1", "k3"):
            numbers[f"kl_{kind}"] = mean(kl.sequence_kl(kl.estimate(found.old, found.reference, kind), cu))
        return numbers

    def _hold(self, numbers: dict[str, float]) -> None:
        """Raises RunFailed where training would learn from other probabilities than those that wrote."""
        if not numbers["logprob_difference"] <= self.bound:
            raise RunFailed(f"logprobs of generation and training differ by {numbers['logprob_difference']:.3g}, more than the {self.bound:g} that "
                            f"rollout.logprob_bound allows: what is learnt from would not be what the policy wrote")

    def _update_policy(self, position: Position, trainer: Trainer, found: Experience, advantages, wanted, kept, *, pretrain: bool):
        """(numbers, gradient norm, lr): means over all steps; the ratio's largest value."""
        config, settings = self.config, self.config.ppo
        lr = 0.0 if pretrain else lr_at(position.steps, config.optim, self.steps)
        objective = PolicyObjective(settings, self.algorithm.policy_loss, kl_coef=self.controller.value, temperature=config.generate.temperature,
                                    keep=kept)
        tokens = {"old_logprob": found.old, "ref_logprob": found.reference, "advantage": advantages}
        sums, norms, largest, applied, first = {}, [], 0.0, True, None
        numbered = {episodes: number for number, episodes in enumerate(wanted[0])}
        with self.cast.policy.awake():
            for index, episodes in enumerate(episodes for one in wanted for episodes in one) if not pretrain else ():
                minibatch = trainer.cut(numbered.get(episodes, index), episodes)
                result = trainer.step(minibatch, objective, tokens, lr=lr, step=position.steps, over=self.algorithm.over,
                                      ptx=settings.ptx_coef if self.ptx else 0.0, part=index)
                largest = max(largest, result.sums["ratio_max"])
                first = first or dict(result.sums)
                sums = {name: sums.get(name, 0.0) + value for name, value in result.sums.items()}
                norms.append(result.grad_norm or 0.0)
                applied = applied and (result.applied or result.searching)
        weights = max(sums.get("weights", 0.0), 1e-9)
        numbers = {name: sums.get(name, 0.0) / weights for name in ("policy_loss", "clip_fraction", "ratio", "approx_kl")}
        numbers |= {"ratio_max": largest, "applied": applied}
        if first:
            numbers |= {"first_ratio_max": first["ratio_max"], "first_clip_fraction": first["clip_fraction"] / max(first["weights"], 1e-9)}
        if self.ptx:
            numbers["ptx_loss"] = sums.get("ptx_loss", 0.0) / max(sums.get("ptx_tokens", 0.0), 1.0)
        return numbers, sum(norms) / max(len(norms), 1), lr

    def _update_critic(self, position: Position, trainer: Trainer, found: Experience, returns, wanted) -> dict[str, float]:
        config, critic = self.config, self.config.critic
        optim = replace(config.optim, lr=critic.lr, min_lr=critic.min_lr, warmup_steps=critic.warmup_steps)
        lr, objective = lr_at(position.steps, optim, self.steps), ValueObjective(config.ppo)
        tokens = {"old_values": found.values, "returns": returns}
        loss, count, clipped, norms, applied, first = 0.0, 0, 0.0, [], True, None
        with self.cast.critic.awake():
            for index, episodes in enumerate(episodes for one in wanted for episodes in one):
                result = trainer.step(trainer.cut(index, episodes), objective, tokens, lr=lr, step=position.steps, over="tokens")
                loss, count, clipped = loss + result.loss * result.tokens, count + result.tokens, clipped + result.sums["value_clip_fraction"]
                norms.append(result.grad_norm or 0.0)
                applied = applied and (result.applied or result.searching)
                if index < config.ppo.minibatches:  # the first pass: each episode once, before it was learnt from
                    first = {name: (first or {}).get(name, 0.0) + result.sums[name] for name in VARIANCE_SUMS}
        return {"value_loss": loss / max(count, 1), "value_clip_fraction": clipped / max(count, 1), "explained_variance": explained_variance(first),
                "critic_grad_norm": sum(norms) / len(norms), "critic_lr": lr, "critic_applied": applied}

    def _ptx(self, *, first: int, steps: int, count: int):
        """Text for each of an iteration's optimizer steps, the first of which has number `first` in the run."""
        if self.ptx is None:
            return ()
        count = self.config.ppo.ptx_samples or count
        return ptx_sequences(self.ptx, first=first * count, count=steps * count)

    # ------------------------------------------------------------ held-out prompts

    def validate(self, position: Position) -> dict[str, float]:
        """The held-out prompts answered with the same random numbers each time, so that what changes is the policy."""
        rollouts, judged, divergence = answer_held_out(self.config, self.cast, self.prompts)
        error = std(judged.scores) / len(judged.scores) ** 0.5
        return {
            "validation_reward": mean(judged.scores), "validation_reward_error": error, "validation_kl_k1": mean(divergence),
            "validation_response_length": sum(rollouts.lengths) / len(rollouts.lengths), "validation_eos_rate": sum(rollouts.ended) / len(rollouts.ended),
        }

    def verdict(self, metrics: dict[str, float]) -> Stop | None:
        return self.criteria.after_iteration(metrics)

    # ------------------------------------------------------------ state

    def build(self) -> None:
        self.cast.build()

    def complete(self):
        return self.cast.complete()

    def state(self, *, loading: bool, sharding: str | None = None) -> dict:
        return self.cast.state(loading=loading, sharding=sharding)

    def load(self, state: dict, record: dict) -> None:
        self.cast.load(state, record["roles"])
        self.controller.load_state_dict(record["kl"])
        self.criteria.load_state_dict(record["criteria"])

    def start(self, source: Path) -> None:
        self.cast.start(source)

    def report(self, run_dir: Path, chosen: Path | None) -> None:
        write_report(run_dir, title=f"{self.config.model.name}, {self.config.stage.name}", chain=chain(chosen) if chosen else ())

    def record(self) -> dict:
        return {"kl": self.controller.state_dict(), "criteria": self.criteria.state_dict(), "roles": self.cast.identities(),
                "average": self.config.ppo.ema is not None}

    def begins(self, position: Position, journal) -> None:
        self.journal = journal
        self.prompts.tell(journal)
        journal.event("memory", step=position.steps, offload=self.config.ppo.offload, bytes=self.cast.ledger.now())
        if position.steps == 0 and self.validates:
            self._samples(position, journal)

    def ends(self, position: Position, stop: Stop, journal) -> None:
        if self.validates:
            self._samples(position, journal)
        journal.event("memory", step=position.steps, offload=self.config.ppo.offload, bytes=self.cast.ledger.now(), peak=self.cast.ledger.peak)
        self.cast.close()

    def _samples(self, position: Position, journal) -> None:
        rollouts, judged, divergence = answer_held_out(self.config, self.cast, self.prompts)
        journal.event("samples", step=position.steps, reward=mean(judged.scores), reward_error=std(judged.scores) / len(judged.scores) ** 0.5,
                      kl_k1=mean(divergence))
        journal.samples({
            "step": position.steps, "prompt": question.text, "response": one.text, "reward": score, "kl": nats, "stop": one.stop,
        } for question, one, score, nats in zip(rollouts.questions, rollouts.completions, judged.scores.tolist(), divergence.tolist()))
