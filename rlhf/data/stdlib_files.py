"""The embedded tasks as files, which the stages read where `chat.path` names none: made once a Python, atomically, and checked by hash.

    sft.jsonl        {"prompt", "response"}
    rankings.jsonl   {"prompt", "responses", "ranking", "demonstration"}
    prompts.jsonl    {"prompt", "reference"}
    tasks.json       sizes, hashes, counts, the Python they were made from
"""
import hashlib
import json
import platform
import shutil
from collections.abc import Iterable
from pathlib import Path

from megatron_ext.config.schema import DataConfig
from megatron_ext.data.corpus import stdlib_files
from megatron_ext.data.directories import publish, temporary
from megatron_ext.data.prepared import file_sha256
from megatron_ext.data.read import fingerprint
from megatron_ext.errors import UserError
from rlhf.data import stdlib_tasks

FILE = "tasks.json"
FORMAT = "rlhf.tasks/2"  # counted up when other tasks come out of the same library
STAGES = {"sft": "sft.jsonl", **dict.fromkeys(("reward", "dpo"), "rankings.jsonl"), **dict.fromkeys(("ppo", "grpo", "rloo"), "prompts.jsonl")}


def ensure(data: DataConfig, root: Path | None = None) -> dict[str, Path]:
    """The file of each stage, made if it is not there yet. Any number of processes may call it at once: one of them publishes, all get the same.

    Args:
        data: `cache`.
        root: the library's directory; None = the running Python's.

    Raises:
        UserError: the cache cannot be written, or holds files that changed since.
    """
    directory = Path(data.cache) / f"stdlib-tasks-py{platform.python_version()}-{_identity(root)[:8]}"
    if not (directory / FILE).exists():
        write(directory, root)
    _check(directory)
    return {stage: directory / name for stage, name in STAGES.items()}


def write(directory: Path, root: Path | None = None) -> None:
    """Makes the files in `directory`, which appears whole or not at all; where another process was first, its files stay.

    Raises:
        UserError: it cannot be written, or holds something else.
    """
    questions = stdlib_tasks.tasks(root)
    records = {
        "sft.jsonl": stdlib_tasks.conversations(questions), "rankings.jsonl": stdlib_tasks.rankings(questions),
        "prompts.jsonl": stdlib_tasks.prompts(questions),
    }  # fmt: skip
    try:
        made = temporary(directory)
        try:
            files = {name: _write(made / name, lines) for name, lines in records.items()}
            manifest = {
                "format": FORMAT, "identity": _identity(root), "python": f"{platform.python_implementation()} {platform.python_version()}",
                "questions": {kind: sum(task.kind == kind for task in questions) for kind in stdlib_tasks.KINDS}, "files": files,
            }  # fmt: skip
            (made / FILE).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
            if not publish(made, directory) and not (directory / FILE).exists():
                raise UserError("data.cache", directory, "exists and does not hold the embedded tasks; remove it or name another data.cache")
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except OSError as error:
        raise UserError("data.cache", directory, f"cannot be written: {error.strerror}") from error


def _write(path: Path, records: Iterable[dict]) -> dict:
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        for count, record in enumerate(records, 1):
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
    return {"sha256": file_sha256(path), "records": count}


def _check(directory: Path) -> None:
    try:
        manifest = json.loads((directory / FILE).read_text(encoding="utf-8"))
        damaged = [name for name in set(STAGES.values()) if file_sha256(directory / name) != manifest["files"][name]["sha256"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError("data.cache", directory, f"the embedded tasks cannot be read ({type(error).__name__}); remove this directory") from error
    if damaged:
        raise UserError("data.cache", directory, f"{', '.join(sorted(damaged))} changed since it was written; remove this directory")


def _identity(root: Path | None) -> str:
    """Of what the tasks are made from: the format, the Python, and the library's files."""
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return hashlib.sha256(f"{FORMAT} {python}\0{fingerprint(stdlib_files(root))}".encode()).hexdigest()
