"""Files of records, whole or not at all, and the manifest beside them: what went in, what came out, what was left out and why."""
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Self

import yaml

from megatron_ext.config.build import to_dict
from megatron_ext.config.schema import Config
from megatron_ext.data.prepared import file_sha256
from megatron_ext.errors import UserError
from megatron_ext.files import whole
from megatron_ext.redact import redact

GROUPS = ("collect", "chat", "generate")  # keys that decide what is made


def identity(*parts: object) -> str:
    """16 hexadecimal digits of what a record is made of: the same wherever and whenever it is made."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def directory(path: str | Path | None, key: str = "output") -> Path:
    """The directory to write into, made where it is missing. Raises UserError."""
    if path is None:
        raise UserError(key, "null", "name the directory to write")
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(key, path, f"cannot be written: {error.strerror}") from None
    return Path(path)


class Records:
    """A file of JSON lines that is there when all of it is: written beside, then renamed. Counts what is written, and by domain.

    Use as a context; with an exception nothing is renamed.
    """

    def __init__(self, path: Path):
        self.path, self.count, self.domains = Path(path), 0, Counter()

    def __enter__(self) -> Self:
        self._part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")  # hidden: readers of a directory pass it over
        try:
            self._stream = self._part.open("w", encoding="utf-8", newline="\n")
        except OSError as error:
            raise UserError("output", self.path, f"cannot be written: {error.strerror}") from None
        return self

    def write(self, record: dict) -> None:
        self._stream.write(json.dumps(record, ensure_ascii=False) + "\n")
        self.count += 1
        self.domains[record.get("domain") or ""] += 1

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self._stream.flush()
            os.fsync(self._stream.fileno())
        self._stream.close()
        if kind is None and self.count:
            self._part.rename(self.path)
        else:
            self._part.unlink(missing_ok=True)
            if kind is None:  # nothing came out this time: what an earlier run left would be taken for it
                self.path.unlink(missing_ok=True)

    def facts(self) -> dict:
        """For the manifest."""
        if not self.count:
            return {}
        return {"file": self.path.name, "records": self.count, "domains": dict(sorted(self.domains.items())), "sha256": file_sha256(self.path)}


def manifest(path: Path, config: Config, *, inputs: Iterable[Path], outputs: Iterable[Mapping], left_out: Mapping[str, int], **more: object) -> dict:
    """Writes PATH (YAML: no stage takes it for records) and returns what it holds. It has no date: the same input and keys make the same file."""
    from megatron_ext.cli.help import version

    values = redact({group: found for group, found in to_dict(config).items() if group in GROUPS})
    found = {"version": version(), "inputs": [{"file": str(file), "bytes": file.stat().st_size, "sha256": file_sha256(file)} for file in inputs],
             "outputs": [dict(one) for one in outputs if one], "left_out": dict(sorted(left_out.items())), **more, "config": values}
    with whole(path) as stream:
        yaml.safe_dump(found, stream, sort_keys=False, allow_unicode=True, width=140, encoding="utf-8")
    return found
