"""`check ...`: what a configuration means, without torch. It has been validated by the time it comes here."""
import json
from dataclasses import asdict
from pathlib import Path

from megatron_ext import checkpoint
from megatron_ext.checkpoint import ancestry
from megatron_ext.cli import cast, vocabulary
from megatron_ext.cli.notes import notes
from megatron_ext.cli.options import Options
from megatron_ext.config import geometry, sizes, stages
from megatron_ext.config.schema import Config


def check(config: Config, options: Options) -> int:
    """Prints the rank grid, the batch geometry, the models of the stage, where it starts from, and what of the command line it does not read."""
    vocab = vocabulary.words(config)
    members = cast.members(config, vocab or sizes.vocab_size(config))
    chain = _chain(config)
    said = notes(config, options.overrides)
    if options.json:
        models = [{"role": one.role, "source": str(one.source) if one.source else None, "parameters": one.parameters,
                   "layout": {"tp": one.parallel.tp, "pp": one.parallel.pp, "sp": one.parallel.sp}} for one in members]
        print(json.dumps(geometry.report(config, vocab) | ({"models": models} if models else {}) | {"chain": chain, "notes": said}))
        return 0
    print(geometry.text(config, vocab))
    if members:
        print("\n".join(_table("models", [(one.role, f"{one.parameters:,} parameters", one.layout, str(one.source or "")) for one in members])))
    if config.stage.name in stages.ONLINE:
        where = "rollout" if "rollout" in stages.models(config) else "policy"
        print(f"generation  by the {where}: {_sampling(config)}")
    if config.lora.rank and config.stage.name in (*stages.ONLINE, "dpo"):
        print("reference   the policy without its adapters")
    for number, line in enumerate(ancestry.described(chain)):
        print(f"{'' if number else 'chain':<12}{line}")
    for note in said:
        print(f"note        {note}")
    return 0


def _chain(config: Config) -> list[dict]:
    """From the checkpoint that the run would continue or start from."""
    run = Path(config.run.dir) / "checkpoints"
    path = checkpoint.find(config.checkpoint.load, run) or checkpoint.find(config.checkpoint.start, run, key="checkpoint.start", best=True)
    return [] if path is None else ancestry.chain(path)


def _sampling(config: Config) -> str:
    settings = asdict(config.generate)
    cuts = [f"top-k {settings['top_k']}"] * bool(settings["top_k"]) + [f"top-p {settings['top_p']:g}"] * (settings["top_p"] < 1)
    return ", ".join([f"up to {settings['max_tokens']} tokens", f"temperature {settings['temperature']:g}", *cuts,
                      f"{settings['batch_size']} rows at a time on each data rank"])


def _table(name: str, rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [f"{'' if number else name:<12}" + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for number, row in enumerate(rows)]
