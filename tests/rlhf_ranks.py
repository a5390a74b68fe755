"""A rank of test_rlhf_layouts.py: scores and trains on the same rollouts in many layouts, and writes down how far every number is from one rank's.

A layout is a value and may span some of the ranks, so one spawn of four ranks serves all. Rank 0 answers the prompts, its rollouts are everybody's;
one rank's numbers of them are the truth, of which every rank gets a copy. Each layout also answers the prompts itself, and scores that.

    python tests/rlhf_ranks.py DIRECTORY      under RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT
"""
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rlhf_numbers import (
    BUDGETS,
    EPISODES,
    GPT2,
    PLAIN_DP,
    PPO,
    TEMPERATURE,
    WORDS,
    Job,
    Models,
    after_a_step,
    differences,
    fixed,
    mixture,
    numbers,
    over,
    plain_text,
    rankings,
)

from megatron_ext.config.schema import Config, GenerateConfig, PrecisionConfig, RolloutConfig

RANKS = 4
LENGTHS = (12, 1, 9, 0, 7, 12)  # of the responses of everybody's rollouts
SETTINGS = {
    "plain": GenerateConfig(max_tokens=12, batch_size=8), "warm": GenerateConfig(max_tokens=12, batch_size=8, temperature=0.6),
    "cut": GenerateConfig(max_tokens=12, batch_size=8, temperature=TEMPERATURE, top_k=60, top_p=0.9),
}
ONE, TP2, SP, PP2, TP2PP2 = {}, {"tp": 2}, {"tp": 2, "sp": True}, {"pp": 2}, {"tp": 2, "pp": 2}
FIRST = (Job("one"), Job("gpt2/one", GPT2))  # the truth; on the ranks 0 and 1
PRECISIONS = {"bf16": PrecisionConfig(dtype="bf16"), "fp8": PrecisionConfig(dtype="bf16", fp8="current")}  # meanwhile, on the ranks 2 and 3
# In the order in which they run; what is left of a row's ranks is idle, so jobs of two ranks come in pairs.
JOBS = (
    Job("tp2", parallel=TP2, ranks=2, beside=PP2, answers=("warm", "cut")), Job("pp2", parallel=PP2, ranks=2, beside=SP, answers=("warm", "cut")),
    Job("tp2sp", parallel=SP, ranks=2, beside=ONE, budgets=("all", "each")), Job("dp2", ranks=2, beside=TP2, answers=("warm", "cut")),
    Job("gpt2/tp2sp", GPT2, parallel=SP, ranks=2, budgets=("all",)), Job("gpt2/pp2", GPT2, parallel=PP2, ranks=2, beside=TP2, budgets=("some",)),
    Job("tp2pp2", parallel=TP2PP2, ranks=4, beside=TP2, budgets=("some", "each")),
    Job("gpt2/tp2pp2", GPT2, parallel=TP2PP2, ranks=4, budgets=("all",)),
)
SHARDED = (Job("sharded/dp2", ranks=2), Job("sharded/tp2", parallel=TP2, ranks=2))  # with the distributed optimizer


def prompts() -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, WORDS, (length,), generator=generator).tolist() for length in (3, 14)]


def first_step(models: Models, rollouts) -> dict:
    """What the first inner step says of the ratio after scoring with its micro-batches: plainly; with words cut and the PTX mix beside."""
    from rlhf.objectives import PolicyObjective, TokenScore
    from rlhf.update import Trainer

    facts = {}
    config = Config(ppo=PPO, rollout=RolloutConfig(batch_tokens=BUDGETS["some"]))
    for name, kept, text, ptx in (("policy", None, (), 0.0), ("mixed", {}, plain_text(), 2.0)):
        trainer = Trainer(models.policy, config, rollouts.sequences, rollouts.offsets, text)
        old, = over(trainer, TokenScore(temperature=TEMPERATURE, keep=kept), words=rollouts.words)
        objective = PolicyObjective(PPO, "clip", kl_coef=0.1, temperature=TEMPERATURE, keep=kept)
        tokens = {"old_logprob": old, "ref_logprob": old, "advantage": fixed(len(old), seed=3)}
        result = trainer.step(trainer.cut(0, range(EPISODES)), objective, tokens, lr=0.0, step=0, ptx=ptx)
        wanted = ("ratio", "ratio_max", "clip_fraction", "approx_kl", "kl_loss")
        facts[name] = {key: result.sums[key] for key in wanted} | {"tokens": result.tokens}
    return facts


def answers(models: Models, settings: GenerateConfig, questions: list[list[int]] | None = None):
    """(rollouts, the words that were left to draw from)."""
    from rlhf.rollout import Question, roll_out

    asked = [Question(prompt, "") for prompt in questions or prompts()]
    rollouts = roll_out(models.policy, asked, settings, samples=3, first=100, tokenizer=None, eod=-1)
    return rollouts, {} if settings.top_k or settings.top_p < 1 else None


def against_generation(models: Models, names: Sequence[str], *, mistakes: bool = False, questions: list[list[int]] | None = None) -> dict:
    """The largest |train - generate| logprob by settings: scored as sampled, and as released code has scored wrongly."""
    from rlhf.objectives import TokenScore
    from rlhf.update import Trainer

    facts: dict = {}
    for name in names:
        settings = SETTINGS[name]
        rollouts, kept = answers(models, settings, questions)
        trainer = Trainer(models.policy, Config(rollout=RolloutConfig(batch_tokens=BUDGETS["some"])), rollouts.sequences, rollouts.offsets)
        hows = {"right": (settings.temperature, kept)}
        if mistakes:
            hows |= {"without temperature": (1.0, kept), "full softmax": (settings.temperature, None)}
        facts[name] = {}
        for how, (temperature, keep) in hows.items():
            old, = over(trainer, TokenScore(temperature=temperature, keep=keep), words=rollouts.words)
            facts[name][how] = float((old - rollouts.generated).abs().max())
    return facts


def micro_batches(models: Models, rollouts) -> dict:
    """By budget: how many micro-batches each data rank has, 0 where its only one is empty; and whether this rank's pairs lie in rows of a batch
    (else they are packed)."""
    from rlhf.experience import plan
    from rlhf.ranked import Cut

    lengths, dp = [len(sequence.tokens) for sequence in rollouts.sequences], models.policy.layout.dp
    facts: dict = {}
    for name, budget in BUDGETS.items():
        plans = [plan(lengths, range(EPISODES), budget=budget, dp_rank=rank, dp_size=dp) for rank in range(dp)]
        batches = Cut(models.policy, [pair for item in rankings() for pair in item.pairs], budget=budget).batches()
        facts[name] = {"counts": [sum(map(bool, one.micro_batches)) for one in plans],
                       "rows": sorted({len(batch.tokens) for batch in batches}), "packed": sum(batch.documents is not None for batch in batches)}
    return facts


def everybodys(platform):
    """The rollouts that all layouts look at, of rank 0: responses of LENGTHS tokens."""
    import torch

    from rlhf.rollout import Rollouts

    drawn, _ = answers(Models(Job("one"), (0,), platform), SETTINGS["cut"])
    cut = [replace(one, tokens=one.tokens[:length], logprobs=one.logprobs[:length], words=one.words[:length])
           for one, length in zip(drawn.completions, LENGTHS, strict=True)]
    offsets = [sum(LENGTHS[:number]) for number in range(EPISODES + 1)]
    return Rollouts(drawn.questions, cut, drawn.groups, offsets, torch.tensor([logprob for one in cut for logprob in one.logprobs]))


def of_one_rank(job: Job, rank: int, rollouts, platform) -> tuple[dict, dict]:
    """(facts, {name: what others are compared with})."""
    models = Models(job, (rank,), platform)
    truth = numbers(models, rollouts, BUDGETS["all"])
    facts = {name: differences(*numbers(models, rollouts, BUDGETS[name]), *truth) for name in ("some", "each")}
    facts |= {"first": first_step(models, rollouts), "generation": against_generation(models, tuple(SETTINGS), mistakes=True)}
    facts |= {"micro_batches": micro_batches(models, rollouts), "mixture": mixture(models)}
    facts["truth"] = {name: value.tolist() for name, value in truth[0].items()}
    return facts, {job.name: truth, f"{job.name}/step": after_a_step(Models(job, (rank,), platform), rollouts)}


def of_layout(job: Job, ranks: tuple[int, ...], rollouts, known: dict, platform) -> dict:
    reference = "gpt2/one" if job.name.startswith("gpt2") else "one"
    if job in SHARDED:
        return {"step": differences(*after_a_step(Models(job, ranks, platform, parallel={}), rollouts), *known[f"{reference}/step"])}
    models = Models(job, ranks, platform, parallel=PLAIN_DP)
    facts = {name: differences(*numbers(models, rollouts, BUDGETS[name]), *known[reference]) for name in job.budgets}
    facts |= {"first": first_step(models, rollouts), "generation": against_generation(models, job.answers)}
    return facts | {"micro_batches": micro_batches(models, rollouts)}


def main(directory: Path) -> None:
    from megatron_ext.platform import connect, disconnect, install, quiet

    quiet()
    platform = install("cpu")
    connect(platform, 300)
    import torch.distributed as dist

    from rlhf.online import LOGPROB_BOUNDS

    rank, facts, known = dist.get_rank(), {}, {}
    box = [everybodys(platform) if rank == 0 else None]
    dist.broadcast_object_list(box, src=0)
    rollouts = box[0]
    if rank < len(FIRST):
        job = FIRST[rank]
        facts[job.name], known = of_one_rank(job, rank, rollouts, platform)
    else:
        name = list(PRECISIONS)[rank - len(FIRST)]
        questions = [[(7 * at + number) % WORDS for at in range(length)] for number, length in enumerate((1, 4, 9, 16, 30))]
        models = Models(Job(name), (rank,), platform, precision=PRECISIONS[name])
        facts[name] = against_generation(models, tuple(SETTINGS), questions=questions) | {"bounds": LOGPROB_BOUNDS}
    everything: list = [None] * RANKS
    dist.all_gather_object(everything, known)
    known = {name: truth for one in everything for name, truth in one.items()}

    place = 0
    for job in (*JOBS, *SHARDED):
        place = -(-place // job.ranks) * job.ranks % RANKS
        ranks = tuple(range(place, place + job.ranks))
        place += job.ranks
        if rank in ranks:
            facts[job.name] = of_layout(job, ranks, rollouts, known, platform)
    (directory / f"rank{rank}.json").write_text(json.dumps(facts))
    dist.barrier()
    disconnect()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
