"""The fit of the timing model's two constants to the nine rows of the Megatron-LM table, and how well it says what it has not seen. No torch.

Both constants multiply the time of products, so the logarithm of throughput is smooth in their logarithms: a few Gauss-Newton steps find the least squares.
Leave one out: each row is predicted by constants fitted to the other eight; beside it stands the best constant throughput, treated the same way.
"""
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.plan import published
from megatron_ext.plan.calibration import FITTED, Calibration, as_dict
from megatron_ext.plan.published import Row
from megatron_ext.plan.timing import step_time

START = Calibration(gemm=0.7, depth=2000.0)
COMMAND = "python -m megatron_ext plan calibrate output=megatron_ext/plan/calibration.json"


@dataclass(frozen=True)
class Judged:
    """A row and what was said of it; errors as shares of the measured figure."""

    name: str
    unit: str
    measured: float
    predicted: float
    left_out: float | None = None  # predicted from the other rows
    constant: float | None = None  # the best constant of the other rows

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def say(row: Row, calibration: Calibration) -> float:
    """What the model says of a row, in its unit."""
    return published.predicted(row, step_time(row.config, calibration, row.vocab, software=row.software))


def fit(rows: Sequence[Row], start: Calibration = START, *, steps: int = 8) -> Calibration:
    """The constants that fit `rows` best, in relative error."""
    found = start
    for _ in range(steps):
        logs = [math.log(say(row, found)) for row in rows]
        rest = [math.log(row.measured) - log for row, log in zip(rows, logs, strict=True)]
        columns = []
        for name in FITTED:
            moved = _with(found, {name: getattr(found, name) * 1.01})
            columns.append([(math.log(say(row, moved)) - log) / math.log(1.01) for row, log in zip(rows, logs, strict=True)])
        (a, b), (c, d) = ([sum(x * y for x, y in zip(one, two, strict=True)) for two in columns] for one in columns)
        p, q = (sum(x * y for x, y in zip(one, rest, strict=True)) for one in columns)
        det = a * d - b * c
        change = ((d * p - b * q) / det, (a * q - c * p) / det)
        found = _with(found, {name: getattr(found, name) * math.exp(max(-0.5, min(0.5, x))) for name, x in zip(FITTED, change, strict=True)})
        if max(map(abs, change)) < 1e-6:
            break
    return found


def _with(calibration: Calibration, values: dict[str, float]) -> Calibration:
    return Calibration(**(as_dict(calibration) | values))


def judge(rows: Sequence[Row], calibration: Calibration, *, leave_one_out: bool = False) -> list[Judged]:
    """Every row by the constants, and by those of the others."""
    found = []
    for index, row in enumerate(rows):
        rest = [*rows[:index], *rows[index + 1:]]
        out = say(row, fit(rest, calibration)) if leave_one_out else None
        found.append(Judged(row.name, row.unit, row.measured, say(row, calibration), out, _best_constant(rest) if leave_one_out else None))
    return found


def _best_constant(rows: Sequence[Row]) -> float:
    """The constant of least squares in relative error, as `fit`: the geometric mean."""
    return math.exp(sum(math.log(row.measured) for row in rows) / len(rows))


def mean_error(rows: Sequence[Judged], of: str) -> float:
    """Mean of |x / measured - 1|, `of` predicted | left_out | constant."""
    return sum(abs(getattr(row, of) / row.measured - 1) for row in rows) / len(rows)


def report() -> dict[str, object]:
    """The fit, all that it says, and how far off it is: what calibration.json holds."""
    rows = published.megatron_table()
    constants = fit(rows)
    table, rest = judge(rows, constants, leave_one_out=True), judge(published.others(), constants)
    scaling = [{"name": row.name, "stated_mfu": stated, "mfu": _mfu(row, constants), "mfu_four_chunks": _mfu(four, constants)}
               for (row, stated), (four, _) in zip(published.strong_scaling(), published.strong_scaling(4), strict=True)]
    return {
        "command": COMMAND, "source": published.TABLE, "fitted": list(FITTED), "constants": as_dict(constants),
        "error": {"fit": mean_error(table, "predicted"), "leave_one_out": mean_error(table, "left_out"), "constant": mean_error(table, "constant")},
        "rows": [vars(row) | {"error": row.error} for row in table],
        "not_fitted": [vars(row) | {"error": row.error} for row in rest],
        "strong_scaling": scaling,
    }


def _mfu(row: Row, calibration: Calibration) -> float:
    return step_time(row.config, calibration, row.vocab, software=row.software).mfu


def write(path: Path) -> dict[str, object]:
    """Fits, and writes the constants with their errors."""
    found = report()
    path.write_text(json.dumps(_rounded(found), indent=1) + "\n", encoding="utf-8")
    return found


def _rounded(value):
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list | tuple) else value
