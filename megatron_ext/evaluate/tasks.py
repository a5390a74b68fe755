"""Task files of EleutherAI's lm-evaluation-harness, looked at before the harness sees them. Neither torch nor the harness is imported.

The harness runs what a task file says: a function of the user's (`!function`), a metric or a data set that is a Python file. Here a task is data,
unless `evaluate.task_code` says otherwise. Files that pass are written once more into a directory of our own, with the places of their data made
absolute; the harness reads that one.

    TASK_DIR/capitals.yaml                      a task, a group, or part of one (`include`)
    TASK_DIR/hellaswag/validation.jsonl         data of a task that the harness brings: one file a split, named as the task names it
"""
import importlib.util
import os
import re
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_ext.config.schema import EvaluateConfig
from megatron_ext.errors import UserError

KEY = "evaluate.task_dir"
INSTALL = "pip install 'lm-eval>=0.4.13,<0.5'"
READERS = ("json", "csv", "parquet", "text")  # the readers of `datasets` that run nothing: its `pandas` reader unpickles
BY_ENDING = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
READER_SETTINGS = ("data_files", "field", "delimiter", "sep", "quotechar", "column_names", "encoding", "sample_by", "keep_linebreaks")
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE")
CODE = "say evaluate.task_code=true if you trust it as you trust a program that you run"


class _Function(str):
    """What stands behind `!function`."""


class _Loader(yaml.SafeLoader):
    pass


class _Dumper(yaml.SafeDumper):
    pass


_Loader.add_constructor("!function", lambda loader, node: _Function(loader.construct_scalar(node)))
_Dumper.add_representer(_Function, lambda dumper, value: dumper.represent_scalar("!function", str(value)))


@dataclass(frozen=True)
class Tasks:
    """What the harness is to read.

    Attributes:
        names: of tasks, groups and tags to run.
        directory: of the checked files.
        brought: whether the harness has to look through the tasks that it brings too (that takes half a minute).
        metrics: names of the metrics that the user's files ask for, and the file: the harness would look for one that it does not know elsewhere,
            as a program.
    """

    names: tuple[str, ...]
    directory: Path
    brought: bool
    metrics: dict[str, Path]


def offline(environ: MutableMapping[str, str]) -> None:
    """Keeps Hugging Face's libraries from the network. They read this when they are imported."""
    environ.update(dict.fromkeys(OFFLINE, "1"))
    environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # a line for each file that is read


def check_installed(names: tuple[str, ...]) -> Path:
    """Where the harness lies. Raises UserError with the install line."""
    found = importlib.util.find_spec("lm_eval")
    if found is None or not found.submodule_search_locations:
        raise UserError("evaluate.harness", ",".join(names), f"needs lm-evaluation-harness, which is not installed here: {INSTALL}")
    return Path(found.submodule_search_locations[0])


def gather(settings: EvaluateConfig, directory: Path) -> Tasks:
    """Checks all task files of `evaluate.task_dir` and writes them into `directory`.

    Raises:
        UserError: a file that is no task, that would run code, whose data is not there, or comes from elsewhere; a task that nobody knows.
    """
    harness = check_installed(settings.harness) / "tasks"
    here = _Local(set(), set(), {})
    if settings.task_dir is not None:
        root = Path(settings.task_dir).resolve()
        if not root.is_dir():
            raise UserError(KEY, settings.task_dir, "is no directory; name one that holds the task files (YAML) and their data")
        here = _local(root, directory, code=settings.task_code)
    unknown = {*settings.harness, *here.members} - here.names
    if not unknown:
        return Tasks(settings.harness, directory, False, here.metrics)
    known = _brought(harness)
    if settings.task_dir is not None:
        unknown -= _data_only(root, known, directory)
    for name in sorted(unknown):
        if name not in known:
            raise UserError("evaluate.harness", name, f"no such task; {KEY}={settings.task_dir} has: {', '.join(sorted(here.names)) or 'none'}")
        if known[name] is not None:
            raise UserError("evaluate.harness", name, f"is a task that the harness brings, without its data: put one file a split (such as test.jsonl) "
                                                      f"into {settings.task_dir or KEY}/{name}/")
    return Tasks(settings.harness, directory, bool(unknown), here.metrics)


# ---- files of the user's --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Local:
    """What the user's files define (tasks, groups, tags), the members that groups name, and the metrics that they ask for."""

    names: set[str]
    members: set[str]
    metrics: dict[str, Path]


def _local(root: Path, directory: Path, *, code: bool) -> _Local:
    """What stands in `root`, whose files are in `directory` then."""
    here = _Local(set(), set(), {})
    waiting, done = sorted(path for path in root.rglob("*.yaml") if path.is_file()), set()
    while waiting:
        path = waiting.pop(0)
        if path in done:
            continue
        done.add(path)
        found = _read(path)
        try:
            for included in _list(found.get("include")):
                file = (path.parent / str(included)).resolve()
                if file.is_relative_to(root):
                    waiting.append(file)
                elif not code:
                    raise UserError(KEY, path, f"includes {included}, which lies outside {root}; copy it there")
            for part in _parts(found):
                _check(path, part, code=code)
                _locate_data(path, part)
                _note(path, part, here, code=code)
        except (RecursionError, TypeError, KeyError) as error:  # a mapping that holds itself, a metric without a name, ...
            raise UserError(KEY, path, f"is no task file ({type(error).__name__}: {error})") from None
        _write(directory / path.relative_to(root), yaml.dump(found, Dumper=_Dumper, allow_unicode=True, sort_keys=False))
    for path in root.rglob("*.py") if code else ():
        _write(directory / path.relative_to(root), path.read_text(encoding="utf-8"))
    return here


def _note(path: Path, part: dict, here: _Local, *, code: bool) -> None:
    tasks = {str(name) for name in _list(part.get("task")) if isinstance(name, str)}
    (here.members if "group" in part else here.names).update(tasks)
    here.names.update(str(name) for key in ("group", "tag") for name in _list(part.get(key)))
    if not code:
        here.metrics.update({metric["metric"]: path for metric in _list(part.get("metric_list"))})


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _read(path: Path) -> dict:
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a SafeLoader: `!function` is a string to it
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(KEY, path, f"cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise UserError(KEY, path, f"is no task file: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(found, dict):
        raise UserError(KEY, path, f"is no task file: a mapping with `task` or `group` is wanted, not {type(found).__name__}")
    return found


def _parts(found: dict) -> Iterator[dict]:
    """The mapping itself, and the tasks and groups that are written out inside a group."""
    yield found
    for part in _list(found.get("task")):
        if isinstance(part, dict):
            yield from _parts(part)


def _list(value: object) -> list:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _walk(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """(dotted key, leaf)."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _walk(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _walk(item, path)
    else:
        yield path, value


def _check(path: Path, part: dict, *, code: bool) -> None:
    reader, settings = part.get("dataset_path"), part.get("dataset_kwargs") or {}
    if not isinstance(settings, dict):
        raise UserError(KEY, path, f"dataset_kwargs must be a mapping, not {settings!r}")
    if "trust_remote_code" in settings:
        raise UserError(KEY, path, "asks for trust_remote_code, which is never given; take that line out")
    if reader is not None and not isinstance(reader, _Function) and reader not in READERS:
        raise UserError(KEY, path, f"dataset_path {reader!r} would be fetched or run; data comes from local files: dataset_path must be one of "
                                   f"{', '.join(READERS)}, with dataset_kwargs.data_files")
    if code:
        return
    for key, value in _walk(part):
        if isinstance(value, _Function):
            raise UserError(KEY, path, f"{key} runs the function {value}; write it as a template or a metric's name, or {CODE}")
    for key in ("class", "custom_dataset", "use_prompt"):
        if part.get(key) is not None:
            raise UserError(KEY, path, f"`{key}` runs code; leave it out, or {CODE}")
    if part.get("unsafe_code"):
        raise UserError(KEY, path, "says unsafe_code: it runs what the model writes; that is not done here")
    for metric in _list(part.get("metric_list")):
        if isinstance(metric, dict) and metric.get("hf_evaluate"):
            raise UserError(KEY, path, f"metric {metric.get('metric')!r} is fetched from the network and run (hf_evaluate); take one of the harness's own")
    for key in settings:
        if key not in READER_SETTINGS:
            raise UserError(KEY, path, f"dataset_kwargs.{key} is not known to be harmless; known are {', '.join(READER_SETTINGS)}; leave it out, or {CODE}")


def _locate_data(path: Path, part: dict) -> None:
    """Makes `dataset_kwargs.data_files` absolute: beside the task's file, else from the working directory."""
    settings = part.get("dataset_kwargs") or {}
    if "data_files" not in settings:
        return

    def place(name: object) -> str:
        if not isinstance(name, str) or "://" in name:
            raise UserError(KEY, path, f"data file {name!r} is no local file")
        for base in (path.parent, Path.cwd()):
            if (base / name).is_file() or ("*" in name and not Path(name).is_absolute() and any(base.glob(name))):
                return str((base / name).absolute())
        raise UserError(KEY, path, f"its data file {name} is not there (looked beside the task and in {Path.cwd()})")

    def places(value: object) -> object:
        if isinstance(value, dict):
            return {split: places(names) for split, names in value.items()}
        return [place(name) for name in value] if isinstance(value, list) else place(value)

    settings["data_files"] = places(settings["data_files"])


# ---- tasks that the harness brings ------------------------------------------------------------------------------------------------------


def _brought(harness: Path) -> dict[str, Path | None]:
    """Names that the harness's own files define: tasks with their file, groups and tags with None. Read as text: parsing 14,000 YAML files takes
    half a minute."""
    found: dict[str, Path | None] = {}
    line = re.compile(r"^(task|group|tag):[ \t]*(?:[\"']?([\w.:-]+)[\"']?[ \t]*$|((?:\n[ \t]*-[ \t]*[\w.:-]+)+))", re.MULTILINE)
    for folder, _, files in os.walk(harness):
        for name in files:
            if not name.endswith(".yaml"):
                continue
            path = Path(folder, name)
            for kind, one, several in line.findall(path.read_text(encoding="utf-8", errors="replace")):
                if kind == "task" and one:
                    found[one] = path
                elif kind != "task":
                    for word in [one] if one else re.findall(r"-[ \t]*([\w.:-]+)", several):
                        found.setdefault(word, None)
    return found


def _data_only(root: Path, known: dict[str, Path | None], directory: Path) -> set[str]:
    """Folders of `root` that hold data for a task of the harness's: writes the task with that data. Returns the names."""
    names = set()
    for folder in sorted(root.iterdir()):
        files = [file for file in sorted(folder.iterdir()) if file.suffix in BY_ENDING] if folder.is_dir() else []
        if not files or known.get(folder.name) is None:
            continue  # data of one of the user's own tasks
        kinds = {BY_ENDING[file.suffix] for file in files}
        if len(kinds) > 1:
            raise UserError(KEY, folder, f"holds files of several kinds ({', '.join(sorted(kinds))}); one file a split, all of one kind")
        task = {"include": str(known[folder.name]), "dataset_path": kinds.pop(), "dataset_name": None,
                "dataset_kwargs": {"data_files": {file.stem: str(file) for file in files}}}
        _write(directory / f"{folder.name}.yaml", yaml.dump(task, sort_keys=False))
        names.add(folder.name)
    return names
