"""Who is where (the rank grid) and how much goes through at once (the batch geometry). No torch.

Ranks are numbered as megatron-core's default order "tp-cp-ep-dp-pp" does, tensor parallel fastest:
    rank = tp + TP (cp + CP (dp + DP pp)).
"""
import math
from dataclasses import asdict, dataclass

from megatron_ext.config import sizes
from megatron_ext.config.schema import Config
from megatron_ext.config.stages import ONLINE, RANKED

SHOWN = 8  # entries of one axis printed before the middle is left out


@dataclass(frozen=True)
class Grid:
    """Sizes of the four kinds of parallelism; `dp` follows from the number of ranks."""

    tp: int
    cp: int
    dp: int
    pp: int

    @classmethod
    def of(cls, config: Config) -> "Grid":
        parallel = config.parallel
        model_ranks = parallel.tp * parallel.cp * parallel.pp
        assert config.launch.ranks % model_ranks == 0, "validate() comes first"
        return cls(parallel.tp, parallel.cp, config.launch.ranks // model_ranks, parallel.pp)

    @property
    def ranks(self) -> int:
        return self.tp * self.cp * self.dp * self.pp

    def rank(self, *, tp: int = 0, cp: int = 0, dp: int = 0, pp: int = 0) -> int:
        """The rank at these coordinates."""
        return tp + self.tp * (cp + self.cp * (dp + self.dp * pp))

    def coordinates(self, rank: int) -> dict[str, int]:
        """`rank` taken apart: {"tp": .., "cp": .., "dp": .., "pp": ..}."""
        found = {}
        for name, size in (("tp", self.tp), ("cp", self.cp), ("dp", self.dp), ("pp", self.pp)):
            rank, found[name] = divmod(rank, size)
        return found


@dataclass(frozen=True)
class Batch:
    """How a step is cut, in samples (sequences) unless said otherwise."""

    global_batch: int
    micro_batch: int
    data_ranks: int
    accumulation: int  # micro-batches a rank runs before the optimizer steps
    sequence_length: int
    tokens_per_step: int
    steps: int
    samples: int  # of the whole run
    tokens: int  # of the whole run

    @classmethod
    def of(cls, config: Config) -> "Batch":
        train, length, data_ranks = config.train, config.data.sequence_length, Grid.of(config).dp
        per_step = train.global_batch_size * length
        steps = steps_of(config)
        return cls(
            train.global_batch_size, train.micro_batch_size, data_ranks,
            train.global_batch_size // (train.micro_batch_size * data_ranks), length, per_step, steps,
            steps * train.global_batch_size, steps * per_step,
        )


@dataclass(frozen=True)
class Iteration:
    """A step of ppo, grpo and rloo: what is generated, and how often the optimizer steps on it."""

    prompts: int
    samples: int  # responses to a prompt
    episodes: int
    minibatches: int
    minibatch: int  # episodes of an optimizer step
    epochs: int
    optimizer_steps: int
    prompt_tokens: int  # at most
    response_tokens: int  # at most
    tokens: int  # of all episodes, at most
    batch_tokens: int  # of a micro-batch, at most; a longer episode has one of its own
    iterations: int
    run_episodes: int
    run_optimizer_steps: int

    @classmethod
    def of(cls, config: Config) -> "Iteration":
        rollout, ppo, steps = config.rollout, config.ppo, config.train.steps
        episodes, response = rollout.prompts * rollout.samples, config.generate.max_tokens
        room = config.model.max_sequence_length - response
        prompt = room if rollout.max_prompt is None else min(room, rollout.max_prompt)
        updates = ppo.epochs * ppo.minibatches
        return cls(rollout.prompts, rollout.samples, episodes, ppo.minibatches, episodes // ppo.minibatches, ppo.epochs, updates, prompt, response,
                   episodes * (prompt + response), rollout.batch_tokens, steps, steps * episodes, steps * updates)


def steps_of(config: Config) -> int:
    """Steps of the run: `train.steps`, or as many as `train.tokens` needs (the last one may go over)."""
    if config.train.tokens is None:
        return config.train.steps
    return math.ceil(config.train.tokens / (config.train.global_batch_size * config.data.sequence_length))


def grid_lines(grid: Grid) -> list[str]:
    """The grid as a table: a row a pipeline stage, a column a data rank, in each cell the ranks that share its layers; elided when large."""
    kinds = [("TP", grid.tp), ("CP", grid.cp), ("DP", grid.dp), ("PP", grid.pp)]
    inner = grid.tp * grid.cp
    lines = [f"ranks       {grid.ranks:,} = " + " x ".join(f"{name} {size}" for name, size in kinds if size > 1 or name == "DP")]

    def cell(pp: int, dp: int) -> str:
        first = grid.rank(dp=dp, pp=pp)
        return str(first) if inner == 1 else f"{first}-{first + inner - 1}"

    columns = _some(grid.dp)
    table = [["", *("..." if dp is None else f"data {dp}" for dp in columns)]]
    for pp in _some(grid.pp):
        if pp is None:
            table.append(["..."] + [""] * len(columns))
        else:
            table.append([f"stage {pp}", *("..." if dp is None else cell(pp, dp) for dp in columns)])
    widths = [max(len(row[i]) for row in table) for i in range(len(columns) + 1)]
    return lines + [("  " + "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True))).rstrip() for row in table]


def _some(size: int) -> list[int | None]:
    """0 .. size-1, with None for a middle that is left out."""
    if size <= SHOWN:
        return list(range(size))
    return [*range(SHOWN // 2), None, *range(size - SHOWN // 2, size)]


def report(config: Config, vocab: int | None = None) -> dict[str, object]:
    """Everything that `check` prints, as one JSON-able object. `vocab`: words of the tokenizer, where it is known."""
    grid, vocab = Grid.of(config), vocab or sizes.vocab_size(config)
    padded = sizes.padded_vocabulary(vocab, config.model.vocab_multiple, config.parallel.tp)
    chunks = config.parallel.pp * (config.parallel.vpp or 1)
    found = {
        "stage": config.stage.name,
        "model": config.model.name,
        "parameters": sizes.parameters(config.model, vocab),
        "vocab_size": vocab,
        "padded_vocab_size": padded,
        "layers_per_stage": sizes.layers(config.model) // config.parallel.pp,
        "layers_per_chunk": sizes.layers(config.model) // chunks,
        "ranks": grid.ranks,
        "grid": asdict(grid),
    }
    if config.stage.name in ONLINE:
        return found | {"iteration": asdict(Iteration.of(config))}
    if config.stage.name in RANKED:
        train = config.train
        return found | {"batch": {"unit": unit(config), "global_batch": train.global_batch_size, "batch_tokens": config.rollout.batch_tokens,
                                  "steps": train.steps, "samples": train.steps * train.global_batch_size}}
    return found | {"batch": asdict(Batch.of(config))}


def unit(config: Config) -> str:
    """What `train.global_batch_size` counts."""
    return {"reward": "prompts", "dpo": "pairs", "sft": "sequences"}.get(config.stage.name, "samples")


def text(config: Config, vocab: int | None = None) -> str:
    """What `check` prints for people."""
    found, model, parallel = report(config, vocab), config.model, config.parallel
    groups = sizes.query_groups(model)
    heads = f"{model.num_attention_heads} heads" + (f" ({groups} key/value)" if groups != model.num_attention_heads else "")
    vocabulary = f"{found['vocab_size']:,} words" + (" (of the tokenizer to be trained)" if not (model.vocab_size or vocab) else "")
    if found["padded_vocab_size"] != found["vocab_size"]:
        vocabulary += f", padded to {found['padded_vocab_size']:,} rows: a multiple of {model.vocab_multiple} that divides over " \
                      f"{parallel.tp} tensor-parallel ranks"
    extras = [word for word, on in (("sequence parallel", parallel.sp), (f"{parallel.vpp} chunks a stage", parallel.vpp),
                                    (f"sequences split over {parallel.cp} ranks ({parallel.cp_method})", parallel.cp > 1),
                                    (f"recompute {parallel.recompute}", parallel.recompute != "none"),
                                    (f"adapters of rank {config.lora.rank}", config.lora.rank),
                                    ("distributed optimizer", parallel.distributed_optimizer and found["grid"]["dp"] > 1)) if on]
    return "\n".join([
        f"stage       {config.stage.name}",
        (f"model       {model.name}: {found['parameters']:,} parameters, {model.num_layers} layers, hidden {model.hidden_size}, {heads}, "
        f"feed-forward {sizes.ffn_size(model)}"),
        f"vocabulary  {vocabulary}",
        *grid_lines(Grid.of(config)),
        f"layout      {found['layers_per_stage']} layers a stage" + "".join(f", {word}" for word in extras) + f", {config.precision.dtype}"
        + (f" with FP8 products ({config.precision.fp8} scaling)" if config.precision.fp8 else ""),
        *_batch_lines(config),
    ])


def _batch_lines(config: Config) -> list[str]:
    if config.stage.name in ONLINE:
        return _iteration_lines(Iteration.of(config))
    if config.stage.name in RANKED:
        train, name = config.train, unit(config)
        each = "all responses to a prompt together" if name == "prompts" else "every decided pair of a ranking"
        return [f"batch       {train.global_batch_size} {name} ({each}), in micro-batches of up to {config.rollout.batch_tokens:,} tokens",
                f"run         {train.steps:,} steps = {train.steps * train.global_batch_size:,} {name}"]
    batch, name = Batch.of(config), unit(config)
    lines = [
        (f"batch       {batch.global_batch} {name} = micro-batch {batch.micro_batch} x {batch.accumulation} accumulated x "
        f"{batch.data_ranks} data ranks"),
        (f"tokens      {batch.tokens_per_step:,} a step ({batch.global_batch} x {batch.sequence_length}); {batch.steps:,} steps = "
        f"{batch.tokens:,} tokens, {batch.samples:,} {name}"),
    ]
    if config.train.tokens is not None:
        lines.append(f"budget      train.tokens={config.train.tokens:,} gives {batch.steps:,} steps (train.steps is not used)")
    return lines


def _iteration_lines(one: Iteration) -> list[str]:
    return [
        f"iteration   {one.episodes:,} episodes = {one.prompts:,} prompts x {one.samples} responses",
        (f"update      {one.optimizer_steps} optimizer steps = {one.epochs} passes x {one.minibatches} minibatches of {one.minibatch:,} episodes, in "
        f"micro-batches of up to {one.batch_tokens:,} tokens"),
        (f"tokens      at most {one.tokens:,} an iteration: prompts of up to {one.prompt_tokens:,} and responses of up to "
        f"{one.response_tokens:,} tokens"),
        f"run         {one.iterations:,} iterations = {one.run_episodes:,} episodes, {one.run_optimizer_steps:,} optimizer steps",
    ]
