"""`evaluate evaluate.harness=[...]`, in every rank: tasks of lm-evaluation-harness over a checkpoint, at any layout."""
import json
import os
import tempfile
from pathlib import Path

import torch

from megatron_ext import platform
from megatron_ext.cli.options import Options
from megatron_ext.config.schema import Config
from megatron_ext.config.sizes import parameters
from megatron_ext.evaluate import tasks
from megatron_ext.evaluate.harness_inputs import find
from megatron_ext.evaluate.ranks import Ranks
from megatron_ext.evaluate.text import PlainTokenizer
from megatron_ext.train import record as records
from megatron_ext.train.restored import Source, restored_engine

PRINTED = ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples", "higher_is_better")


def run(config: Config, options: Options) -> int:
    """Prints the harness's table, on rank 0: text, or with --json its results as one object.

    Raises:
        UserError: the harness is not installed; no checkpoint, a layout that does not fit, a task that is unknown or runs code, ...
    """
    found = find(config, options)
    with tempfile.TemporaryDirectory() as folder:
        checked = tasks.gather(found.config.evaluate, Path(folder) / "tasks") if platform.is_first_rank() else None
        return _run(found, checked, Path(folder), options)


def _run(found: Source, checked: tasks.Tasks | None, folder: Path, options: Options) -> int:
    """checked: the tasks, on rank 0. folder: for what does not stay."""
    settings = found.config.evaluate
    device = platform.install(found.config.launch.device)
    platform.connect(device, found.config.launch.timeout)
    engine = restored_engine(found, device)
    ranks = Ranks(engine, found.tokenizer(), batch_size=settings.batch_size, ends=found.ends,
                  max_length=settings.max_length or found.config.model.max_sequence_length)
    if checked is not None:
        _drive(found, ranks, checked, folder, options)
    else:
        ranks.serve()
    platform.disconnect()
    return 0


def _drive(found: Source, ranks: Ranks, checked: tasks.Tasks, folder: Path, options: Options) -> None:
    settings = found.config.evaluate
    output = Path(settings.output) if settings.output else found.run / "harness"
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")  # read at import: nothing stays behind, and no home directory is needed
    from megatron_ext.evaluate import harness

    tokenizer = PlainTokenizer(found.tokenizer_file(), eos=ranks.tokenizer.eod, folder=found.folder)
    model = harness.Runtime(ranks, tokenizer, facts=_facts(found), add_bos=settings.add_bos, batch_size=settings.batch_size,
                            seed=found.config.generate.seed)
    with torch.random.fork_rng(devices=[]):  # the harness seeds torch; the model's generators are its own
        results, files = harness.run_tasks(model, checked, settings, name=_name(found), output=output)
    ranks.end()
    if options.json:
        kept = {key: results[key] for key in PRINTED if key in results}
        kept |= {"checkpoint": str(found.path), "layout": records.layout(found.config), "files": [str(file) for file in files]}
        print(json.dumps(kept, default=harness.plain, ensure_ascii=False))
    else:
        print(harness.table(results))
        print(f"{found.path}: {output}/results.json, and {files[0].parent}/")


def _name(found: Source) -> str:
    """Of the model, in the harness's file names."""
    return f"{found.run.name}/{found.path.name}"


def _facts(found: Source) -> dict:
    model = found.config.model
    return {
        "model_source": "megatron_ext", "checkpoint": str(found.path.absolute()), "step": found.record["step"], "layout": records.layout(found.config),
        "tokenizer_sha256": found.tokenizer_sha256, "model_dtype": found.config.precision.dtype, "model_num_parameters": parameters(model, found.vocab_size),
    }
