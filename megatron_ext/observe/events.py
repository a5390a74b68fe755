"""`events.jsonl`: what happened in a run and when: start, save, resume, validation, stop with its reason. One JSON object a line."""
from datetime import UTC, datetime
from pathlib import Path

from .lines import LineFile, read_lines


class Events:
    """Writer of one run's events. A disk that fails is warned of once; it never stops the run."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self._lines = LineFile(self.path)

    def write(self, kind: str, **fields: object) -> None:
        """Append {"time": UTC in ISO 8601, "kind": kind, ...}; a stop names its criterion in another field than `kind`."""
        self._lines.append({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "kind": kind, **fields})

    def close(self) -> None:
        self._lines.close()


def read_events(path: Path) -> list[dict]:
    """The events in order; an empty list when there is no file."""
    return list(read_lines(path))
