"""`convert hf=DIR output=DIR` (or `megatron=DIR`): a run directory with one checkpoint, which train, generate and evaluate take at any layout.

    output/config.yaml, tokenizer.json      as of any run
    output/hugging_face/                    the files that were carried along (carried.py)
    output/checkpoints/step_00000000/       the weights; the record names their origin (origin.py)
"""
import os
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_ext.checkpoint import manifest as m
from megatron_ext.checkpoint.agree import Ranks
from megatron_ext.config import sizes
from megatron_ext.config.compose import compose, to_yaml
from megatron_ext.config.schema import Config
from megatron_ext.config.validate import check_layout
from megatron_ext.convert import carried, origin, peft, shards
from megatron_ext.convert.forms import Heads
from megatron_ext.convert.megatron import Checkpoint, open_checkpoint
from megatron_ext.convert.source import DTYPES, PRECISIONS, Directory, open_directory
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import UserError
from megatron_ext.private import make_directory
from megatron_ext.redact import redact
from megatron_ext.train import record as records

STAGE = "import"
LONGEST = 1024  # tokens of a training sample, where nobody says otherwise


@dataclass(frozen=True)
class Plan:
    """What is written: from where, what that says of itself (for the record), and the configuration that the checkpoint carries."""

    source: Directory | Checkpoint
    origin: dict
    config: Config
    layout: shards.Layout
    tokenizer: bytes | None
    adapter: peft.Adapter | None = None


def plan(config: Config, words: Sequence[str]) -> Plan:
    """Reads and checks all but the weights. Raises UserError.

    Args:
        words: the overrides that were typed: of the model they may say what is no part of it (dropout, padding).
    """
    given = config.hf or config.megatron
    if config.hf is not None:
        source = open_directory(Path(given))
    else:
        source = open_checkpoint(Path(given), Path(config.data.tokenizer) if config.data.tokenizer else None)
    typed = {word.lstrip("+").partition("=")[0] for word in words}
    data, precision = config.data, config.precision
    if not typed & {"precision", "precision.dtype"}:
        precision = replace(precision, dtype=PRECISIONS[source.dtype])
    if "data.sequence_length" not in typed:
        data = replace(data, sequence_length=min(source.model.max_sequence_length, LONGEST))
    merged = compose(words, base=replace(config, model=source.model, precision=precision, data=data))
    has, asked = (records.architecture(model, source.vocab_size) for model in (source.model, merged.model))
    if (key := records.different(asked, has, words)) is not None:
        raise UserError(f"model.{key}", asked.get(key), f"the model in {given} has {has.get(key)}; leave model keys out, it says them itself")
    merged = replace(merged, model=replace(merged.model, vocab_size=source.vocab_size), launch=replace(config.launch, ranks=_ranks(config)))
    check_layout(merged)
    content = Path(config.data.tokenizer).read_bytes() if config.data.tokenizer and config.hf is None else carried.tokenizer(source.path)
    _check_tokenizer(source, content)
    target = Path(config.output).absolute()
    adapter = None
    if config.adapter is not None:
        adapter = peft.read(Path(config.adapter), source.family, source.model, source.vocab_size, DTYPES[merged.precision.dtype])
        merged = replace(merged, lora=adapter.lora)
    merged = replace(merged, hf=None, megatron=None, adapter=None, output=None, run=replace(merged.run, dir=str(target)),
                     data=replace(merged.data, tokenizer=str(target / carried.TOKENIZER) if content else None))
    return Plan(source, source.origin(), merged, shards.Layout(merged.parallel, merged.model), content, adapter)


def _ranks(config: Config) -> int:
    return config.parallel.tp * config.parallel.pp * config.parallel.cp


def _check_tokenizer(source: Directory | Checkpoint, content: bytes | None) -> None:
    """Raises UserError for a tokenizer of other words than the model has. (Models may have rows that no word uses.)"""
    if content is None:
        return
    found = Tokenizer.from_bytes(content, name=source.path / carried.TOKENIZER, key="hf", end=carried.end_text(source.path))
    if found.vocab_size > source.vocab_size:
        raise UserError("hf", source.path, f"its tokenizer has {found.vocab_size} words, config.json says vocab_size={source.vocab_size}: the model has no row "
                                           "for the last ones")


def write(found: Plan, output: Path, *, private: bool = True) -> str:
    """Writes the run directory, which appears whole or not at all. Collective over the ranks of the job, which share the work. The checkpoint's hash.

    Raises UserError: a directory that cannot be written.
    """
    ranks = Ranks()
    output = output.absolute()
    name = ranks.gather(secrets.token_hex(4))[0]
    draft = output.with_name(f".{output.name}.{name}")
    step = draft / "checkpoints" / f"{m.step_name(0)}.tmp-{name}"
    try:
        if ranks.rank == 0:
            make_directory(draft, private=private)
            step.mkdir(parents=True)
        ranks.gather(None)
        mine = range(ranks.rank, found.layout.shards, ranks.size)
        dtype, heads = DTYPES[found.config.precision.dtype], Heads.of(found.config.model)

        def make(one):
            if isinstance(one, peft.Part):
                return one.tensor
            return found.source.make(one, heads).to(dtype)

        parts = found.adapter.parts if found.adapter is not None else ()
        shards.write(step, found.layout, (*found.source.placed, *parts), make, mine)
        hashes = _hashes(found.source, ranks)
        sealed = None
        if ranks.rank == 0:
            sealed = _finish(found, draft, step, hashes)
            if output.exists():
                output.rmdir()  # it was empty
            os.rename(draft, output)
        return ranks.gather(sealed)[0]
    except OSError as error:
        raise UserError("output", output, f"cannot be written: {error.strerror}") from None
    finally:
        if ranks.rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
        ranks.close()


def _hashes(source: Directory | Checkpoint, ranks: Ranks) -> dict[str, str]:
    """The sha256 of the weights' files (the Hub shows the same), each hashed by one rank."""
    mine = {file.name: m.hash_file(file) for file in source.files[ranks.rank :: ranks.size]}
    return {name: value for part in ranks.gather(mine) for name, value in sorted(part.items())}


def _finish(found: Plan, draft: Path, step: Path, hashes: dict[str, str]) -> str:
    """All but the weights."""
    source, config = found.source, found.config
    files = carried.copy(source.path, draft)
    if found.tokenizer is not None:
        (draft / carried.TOKENIZER).write_bytes(found.tokenizer)
    (draft / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    whence = found.origin | {"files": files, "weights": hashes, "adapter": found.adapter.hashes if found.adapter else None}
    if DTYPES[config.precision.dtype] != source.dtype:
        whence["dtypes"] = {}  # what was typed goes before
    record = {
        "step": 0, "samples": 0, "tokens": 0, "vocab_size": source.vocab_size, "model": records.architecture(config.model, source.vocab_size),
        "layout": records.layout(config), "ranks": found.layout.shards, "config": asdict(config), "stage": STAGE, "sharding": config.checkpoint.format,
        "stop": {}, "parent": None, "parent_path": None, "best": None, "recovery": None, "origin": whence,
        "data": {"tokenizer": origin.digest(found.tokenizer) if found.tokenizer is not None else "", "sources": list(hashes.values())},
    }
    return shards.close(step, found.layout, redact(record))


def described(found: Plan, output: Path, sealed: str) -> list[str]:
    """What a person wants to know of it."""
    source, model, whence = found.source, found.config.model, found.origin
    count = sizes.parameters(model, source.vocab_size)
    kind = f"{source.kind}, {count:,} parameters in {found.config.precision.dtype}, {source.vocab_size:,} words"
    lines = [
        f"{output}: {kind}, up to {model.max_sequence_length:,} tokens",
        f"  from        {source.path} ({whence['name']}), licence {whence['licence']}",
        f"  checkpoint  {output / 'checkpoints' / m.step_name(0)}, hash {sealed[:12]}",
    ]
    lines += [f"  licence     {line}" for line in origin.warnings(whence)]
    if found.tokenizer is None:
        lines.append("  note: there is no tokenizer.json; generate and train need one: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR), then convert again")
    if found.adapter is not None:
        lines += [f"  {note}" for note in found.adapter.notes]
    lines += [f"  note: {note}" for note in source.notes]
    return lines
