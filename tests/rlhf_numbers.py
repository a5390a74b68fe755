"""What test_rlhf_layouts.py compares between layouts: everything that RLHF computes of the same rollouts, with small models.

Policy, reference, critic and reward model score the rollouts; KL, advantages and returns are made; each objective steps at a learning rate of 0,
which leaves its gradients to be looked at. Imported by the ranks (rlhf_ranks.py); torch is imported when first needed.
"""
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

from parity_ranks import whole_weights

from megatron_ext.config.schema import (
    Config,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PpoConfig,
    PrecisionConfig,
    RolloutConfig,
    TrainConfig,
)

WORDS, EPISODES = 500, 6  # the table has 512 rows: padding must take no part
LLAMA = ModelConfig(num_layers=4, hidden_size=64, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=192, max_sequence_length=48,
                    init_std=0.05)
GPT2 = replace(LLAMA, num_layers=2, num_query_groups=None, position_embedding="learned", norm="layernorm", activation="gelu_tanh", bias=True,
               qkv_bias=True, tied_embeddings=True)
PLAIN_DP = {"distributed_optimizer": False, "overlap_grad_reduce": False, "overlap_param_gather": False}  # gradients are whole on every data rank
BUDGETS = {"all": 10**6, "some": 40, "each": 1}  # tokens of a micro-batch
TEMPERATURE = 0.8
PPO = PpoConfig(entropy_coef=0.05, kl="k2", kl_in="loss", value_clip=0.2, beta=0.3, label_smoothing=0.1)
ZERO = 1e-6  # of a whole gradient's norm: less is rounding
LR, EPS = 0.1, 0.01  # a step of Adam that follows the size of gradients, not only their sign


@dataclass(frozen=True)
class Job:
    """`parallel`: of ParallelConfig; `ranks`: how many; `beside`: the layout of reference and reward model, the policy's where None; `budgets` and
    `answers`: which of BUDGETS, and of the settings of generation."""

    name: str
    model: ModelConfig = LLAMA
    parallel: dict = field(default_factory=dict)
    ranks: int = 1
    beside: dict | None = None
    budgets: tuple[str, ...] = ("all", "some", "each")
    answers: tuple[str, ...] = ("cut",)


def fixed(*shape: int, seed: int):
    """N(0, 1), the same everywhere."""
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Models:
    """Policy, reference, critic (also the reward model that trains) and a reward model that judges, each made when first asked for."""

    def __init__(self, job: Job, ranks: tuple[int, ...], platform, *, parallel: dict = PLAIN_DP, precision: PrecisionConfig | None = None):
        self._job, self._ranks, self._platform, self._parallel, self._precision = job, ranks, platform, parallel, precision or PrecisionConfig()
        self._beside = job.parallel if job.beside is None else job.beside

    def _engine(self, sizes: dict, seed: int, std: float | None = None, **options):
        from megatron_ext.parallel.layout import Layout
        from megatron_ext.train.engine import Engine

        config = Config(
            model=replace(self._job.model, init_std=std or self._job.model.init_std), parallel=ParallelConfig(**sizes, **self._parallel),
            precision=self._precision, ppo=PPO, optim=OptimConfig(clip=0.0, eps=EPS, weight_decay=0.0), train=TrainConfig(seed=seed),
        )
        return Engine(config, Layout(**sizes, ranks=self._ranks), self._platform, vocab_size=WORDS, **options)

    @cached_property
    def policy(self):
        return self._engine(self._job.parallel, 1)

    @cached_property
    def critic(self):
        return self._engine(self._job.parallel, 2, head="scalar")

    @cached_property
    def reference(self):
        return self._engine(self._beside, 3, std=0.02, train=False)  # so near that KL is not a small difference of e^5

    @cached_property
    def judge(self):
        return self._engine(self._beside, 4, train=False, head="scalar")

    @contextmanager
    def awake(self) -> Iterator:
        """The reward model as `scalar_scores` takes one: this stands in for a `Role`."""
        yield self.judge


def gradients(engine) -> dict | None:
    """As `whole_weights`, of what the last step left in `main_grad`: it lies in the weights' place for a moment."""
    parameters = [parameter for chunk in engine.models for parameter in chunk.parameters()]
    kept = [parameter.data.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.data.copy_(parameter.main_grad)
    found = whole_weights(engine)
    for parameter, weights in zip(parameters, kept):
        parameter.data.copy_(weights)
    return found


def over(trainer, objective, columns: int = 1, **tokens) -> list:
    """fp32 [response tokens] of each column that the objective scores. tokens: fields that it reads."""
    from rlhf.experience import gather

    minibatch = trainer.cut(0, range(len(trainer.offsets) - 1))
    found = [one if isinstance(one, tuple) else (one,) for one in trainer.collect(minibatch, objective, tokens)]
    return [gather(trainer.engine, minibatch.plan, [one[column] for one in found], trainer.offsets) for column in range(columns)]


def rankings() -> list:
    """Rankings of three, two, four and one, with ties. Two have responses of one length: rows of a batch, where nothing else is in it."""
    import numpy as np

    from rlhf.ranked import Ranked

    found, random = [], np.random.RandomState(5)
    for ranks, lengths, margin in (((1, 0, 2), (8, 8, 8), None), ((0, 1), (4, 4), 0.5), ((0, 1, 1, 2), (5, 1, 12, 5), None), ((0,), (6,), None)):
        prompt = random.randint(0, WORDS, 4)
        found.append(Ranked(tuple(_sequence(prompt, random.randint(0, WORDS, length)) for length in lengths), ranks, margin))
    return found


def _sequence(prompt, response):
    import numpy as np

    from rlhf.experience import Sequence_

    return Sequence_(np.concatenate([prompt, response]).astype(np.int64), len(prompt))


def plain_text(seed: int = 6) -> list:
    """The PTX mix: every token of them is predicted."""
    import numpy as np

    random = np.random.RandomState(seed)
    return [_sequence(tokens[:1], tokens[1:]) for tokens in random.randint(0, WORDS, (3, 25))]


def numbers(models: Models, rollouts, budget: int) -> tuple[dict, dict]:
    """({quantity: fp32 array}, {gradient of objective: {tensor: array}}), the second on the layout's first rank, else empty."""
    import torch

    from rlhf import kl
    from rlhf.advantages import ADVANTAGES, Episodes
    from rlhf.judge import scalar_scores
    from rlhf.objectives import PolicyObjective, PreferenceObjective, RankingObjective, Rewards, TokenScore, ValueObjective, Values
    from rlhf.ranked import Cut
    from rlhf.update import Trainer, kept_elsewhere

    config = Config(ppo=PPO, rollout=RolloutConfig(batch_tokens=budget))
    sequences, offsets, cu = rollouts.sequences, rollouts.offsets, rollouts.cu_seqlens
    policy = Trainer(models.policy, config, sequences, offsets)
    mixed = Trainer(models.policy, config, sequences, offsets, plain_text())
    critic = Trainer(models.critic, config, sequences, offsets)
    score = TokenScore(temperature=TEMPERATURE)
    found: dict = {}
    found["old"], found["entropy"] = over(policy, score, 2)
    reference = Trainer(models.reference, config, sequences, offsets)
    found["reference"], = over(reference, score)
    kept: dict = {}  # the same over the words that top-k and top-p left
    found["old_cut"], found["entropy_cut"] = over(policy, TokenScore(temperature=TEMPERATURE, keep=kept), 2, words=rollouts.words)
    same = kept_elsewhere(kept, policy, reference, [range(EPISODES)])
    found["reference_cut"], = over(reference, TokenScore(temperature=TEMPERATURE, keep=same))
    found["values"], = over(critic, Values())
    found["rewards"] = scalar_scores(models, config, rollouts)
    for kind in kl.KINDS:
        found[f"kl_{kind}"] = kl.estimate(found["old"], found["reference"], kind)
    episodes = Episodes(cu_seqlens=cu, scores=found["rewards"], groups=rollouts.groups, kl=found["kl_k1"], kl_coef=0.05, values=found["values"])
    found["advantages"], found["returns"] = ADVANTAGES["gae"](episodes, PPO)
    for name in ("grpo", "rloo", "reinforce"):
        found[f"advantages_{name}"] = ADVANTAGES[name](episodes, PPO)[0]

    slopes: dict = {}

    def step(name: str, engine, result) -> None:
        assert result.applied
        found[f"loss_{name}"], found[f"norm_{name}"] = torch.tensor(result.loss), torch.tensor(result.grad_norm)
        found.update({f"{name}_{key}": torch.tensor(value / (1 if key.endswith("_max") else result.tokens)) for key, value in result.sums.items()})
        slopes[name] = gradients(engine)

    # Ratios of 0.5 to 2 and values far off: some tokens are clipped.
    tokens = {"old_logprob": found["old"] + 0.3 * fixed(offsets[-1], seed=1), "ref_logprob": found["reference"], "advantage": found["advantages"]}
    objective = PolicyObjective(PPO, "clip", kl_coef=0.1, temperature=TEMPERATURE)
    step("policy", models.policy, policy.step(policy.cut(0, range(EPISODES)), objective, tokens, lr=0.0, step=0))
    objective = PolicyObjective(PPO, "clip", kl_coef=0.1, temperature=TEMPERATURE, keep=kept)
    tokens |= {"old_logprob": found["old_cut"] + 0.3 * fixed(offsets[-1], seed=1), "ref_logprob": found["reference_cut"]}
    step("mixed", models.policy, mixed.step(mixed.cut(0, range(EPISODES)), objective, tokens, lr=0.0, step=0, over="sequences", ptx=2.0))
    values = {"old_values": found["values"] + 0.3 * fixed(offsets[-1], seed=2), "returns": found["returns"] + 1.0}
    step("value", models.critic, critic.step(critic.cut(0, range(EPISODES)), ValueObjective(PPO), values, lr=0.0, step=0))

    cut = Cut(models.critic, rankings(), budget=budget, margin=0.1)
    found["ranked"] = cut.scores(Rewards())
    step("ranking", models.critic, models.critic.step(cut.batches(), lr=0.0, step=0, objective=RankingObjective()))
    pairs, objective = [pair for item in rankings() for pair in item.pairs], PreferenceObjective(PPO)
    found["dpo_reference"] = Cut(models.reference, pairs, budget=budget).scores(objective)
    cut = Cut(models.policy, pairs, budget=budget)
    batches = cut.batches(reference=found["dpo_reference"].tolist())
    step("dpo", models.policy, models.policy.step(batches, lr=0.0, step=0, objective=objective))
    return {name: tensor.numpy() for name, tensor in found.items()}, {name: slope for name, slope in slopes.items() if slope}


def differences(found: Mapping, slopes: Mapping, reference: Mapping, known: Mapping) -> dict[str, float]:
    """How far every quantity is from the reference: numbers relative to max(1, |number|), gradients to each tensor's norm, the largest of all.

    The KL of a token is a difference of two logprobs, and as exact as they are: it is relative to the larger one. A tensor whose gradient is 0 but for rounding (a head's bias where only differences of rewards count) is compared with the whole's norm.
    """
    import numpy as np

    apart = {}
    for name, truth in reference.items():
        sizes = (truth, reference["old"], reference["reference"]) if name.startswith("kl_") else (truth,)
        apart[name] = float(np.max(np.abs(found[name] - truth) / np.maximum.reduce([np.ones_like(truth), *map(np.abs, sizes)])))
    for objective, slope in slopes.items():
        assert slope.keys() == known[objective].keys()
        norms = {name: float(truth.norm()) for name, truth in known[objective].items()}
        whole = sum(norm**2 for norm in norms.values()) ** 0.5
        parts = {name: float((slope[name] - known[objective][name]).norm()) / (norm if norm > ZERO * whole else whole) for name, norm in norms.items()}
        apart[f"gradient_{objective}"] = max(parts.values())
    return apart


def mixture(models: Models) -> float:
    """How far the gradient of the PTX mix is from what it should be: the policy's, and the coefficient times that of the text by itself."""
    from megatron_ext.train.objective import LanguageModelling
    from rlhf.experience import Assembler, plan
    from rlhf.objectives import PolicyObjective
    from rlhf.update import Trainer

    engine, config, episodes = models.policy, Config(ppo=PPO, rollout=RolloutConfig(batch_tokens=BUDGETS["some"])), plain_text(seed=9)
    offsets = [sum(one.response for one in episodes[:number]) for number in range(len(episodes) + 1)]
    tokens = {name: fixed(offsets[-1], seed=seed) - 6 for seed, name in enumerate(("old_logprob", "ref_logprob", "advantage"))}
    trainer = Trainer(engine, config, episodes, offsets, plain_text())
    found = []
    for coefficient in (0.0, 2.0):
        objective = PolicyObjective(PPO, "clip", kl_coef=0.1, temperature=TEMPERATURE)
        trainer.step(trainer.cut(0, range(len(episodes))), objective, tokens, lr=0.0, step=0, over="sequences", ptx=coefficient)
        found.append(gradients(engine))
    text = plain_text()
    planned = plan([len(one.tokens) for one in text], range(len(text)), budget=BUDGETS["all"], dp_rank=0, dp_size=1)
    engine.step(Assembler(engine, text).batches(planned), lr=0.0, step=0, objective=LanguageModelling())
    alone = gradients(engine)
    return max(float((found[1][name] - found[0][name] - 2.0 * alone[name]).norm() / found[1][name].norm()) for name in alone)


def after_a_step(models: Models, rollouts) -> tuple[dict, dict]:
    """({what the policy says of the rollouts after a step}, {its weights}), as `numbers`."""
    from rlhf.objectives import PolicyObjective, TokenScore
    from rlhf.update import Trainer

    config = Config(ppo=PPO, rollout=RolloutConfig(batch_tokens=BUDGETS["some"]))
    trainer = Trainer(models.policy, config, rollouts.sequences, rollouts.offsets, plain_text())
    score = TokenScore(temperature=TEMPERATURE)
    old, = over(trainer, score)
    before = whole_weights(models.policy)
    tokens = {"old_logprob": old, "ref_logprob": old, "advantage": fixed(len(old), seed=3)}
    objective = PolicyObjective(PPO, "clip", kl_coef=0.1, temperature=TEMPERATURE)
    assert trainer.step(trainer.cut(0, range(EPISODES)), objective, tokens, lr=LR, step=0, ptx=2.0).applied
    with models.policy.complete_weights():
        after = whole_weights(models.policy)
    scored = over(trainer, score)[0]
    assert float((scored - old).abs().max()) > 0.1
    return {"after": scored.numpy()}, {"step": {name: after[name] - before[name] for name in after}} if after else {}
