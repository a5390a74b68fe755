"""The line a person watches while a run goes on.

On a terminal one line is drawn over and over; elsewhere (a log file, a pipe) plain lines are printed, at most one in `interval` seconds:

    step   120/1000 12% | loss 3.4182 | val 3.5011 | 12.4k tok/s | lr 9.8e-04 | grad 0.812 | eta 4m 12s
"""
import shutil
import sys
import time
from collections.abc import Callable
from typing import TextIO


def human_count(value: float) -> str:
    """1234 -> '1.23k', 5.6e6 -> '5.60M': three digits and a unit."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            scaled = value / limit
            return f"{scaled:.{2 if abs(scaled) < 10 else 1 if abs(scaled) < 100 else 0}f}{unit}"
    return f"{value:.0f}"


def human_time(seconds: float) -> str:
    """75 -> '1m 15s', 7260 -> '2h 01m', 200000 -> '2d 07h': the two largest units."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02d}h"


class Progress:
    """Draws the line.

    Args:
        total: steps of the run. done: steps done in earlier lives. every: steps between lines.
        stream: where to; None = standard error. interval: least seconds between plain lines (None: 0.1 on a terminal, else 2).
        clock: seconds, for tests.
    """

    def __init__(self, total: int, *, done: int = 0, every: int = 1, stream: TextIO | None = None, interval: float | None = None,
                 clock: Callable[[], float] = time.monotonic):
        self.total, self.every, self.stream, self._clock = total, max(1, every), stream or sys.stderr, clock
        self.tty = bool(getattr(self.stream, "isatty", lambda: False)())
        self.interval = interval if interval is not None else 0.1 if self.tty else 2.0
        self._last_step, self._last_time, self._drawn, self._seconds = done, clock(), None, None
        self._validation: float | None = None
        self._open_line = False

    def update(self, done: int, *, loss: float | None = None, tokens_per_second: float | None = None, lr: float | None = None,
               grad_norm: float | None = None, validation_loss: float | None = None, mfu: float | None = None) -> None:
        """`done`: steps done. The first and the last line are always printed, and so is one with a new validation loss."""
        now = self._clock()
        if done > self._last_step:
            each = (now - self._last_time) / (done - self._last_step)
            # A moving average: the first steps are slow (compilation, caches) and must not shape the estimate for long.
            self._seconds = each if self._seconds is None else 0.9 * self._seconds + 0.1 * each
            self._last_step, self._last_time = done, now
        fresh = validation_loss is not None
        if fresh:
            self._validation = validation_loss
        must = fresh or self._drawn is None or done >= self.total
        if not must and (done % self.every or now - self._drawn < self.interval):
            return
        self._drawn = now
        width = len(str(self.total))
        parts = [f"step {done:>{width}}/{self.total} {100 * done // max(1, self.total):>2d}%"]
        if loss is not None:
            parts.append(f"loss {loss:.4f}")
        if self._validation is not None:
            parts.append(f"val {self._validation:.4f}")
        if tokens_per_second is not None:
            parts.append(f"{human_count(tokens_per_second)} tok/s")
        if mfu is not None:
            parts.append(f"mfu {100 * mfu:.1f}%")
        if lr is not None:
            parts.append(f"lr {lr:.1e}")
        if grad_norm is not None:
            parts.append(f"grad {grad_norm:.3f}")
        if self._seconds is not None and done < self.total:
            parts.append(f"eta {human_time(self._seconds * (self.total - done))}")
        self._draw(" | ".join(parts))

    def note(self, text: str) -> None:
        """A line of its own (saved, resumed, stopped), above the one that is being drawn."""
        if self._open_line:
            self._write("\r\x1b[K")
            self._open_line = False
        self._write(text + "\n")

    def close(self) -> None:
        if self._open_line:
            self._write("\n")
            self._open_line = False

    def _draw(self, line: str) -> None:
        if self.tty:
            columns = shutil.get_terminal_size().columns
            self._write("\r\x1b[K" + line[: columns - 1])
            self._open_line = True
        else:
            self._write(line + "\n")

    def _write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):  # the reader of a pipe has gone, or a closed stream: the run goes on unseen
            pass
