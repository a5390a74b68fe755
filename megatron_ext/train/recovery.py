"""Steps that go wrong: a loss or gradient that is not finite, a loss that jumps. Which of data and hardware is to blame, and what is left out.

    not finite    nothing has changed yet: the step is done once more. Finite this time: hardware. Not finite again: the data; its samples are skipped.
    a spike       the weights have been changed by it: back to the newest checkpoint, and on as before. No spike this time: hardware. The same one
                  again: the data; back once more, past its samples. (Chowdhery et al. 2022, arXiv 2204.02311, section 5.1, skipped 200 to 500
                  batches by hand.)

A skipped step counts as no step: a run that leaves samples out equals one that was told to (`recovery.skip`), bit for bit.
"""
import math
import statistics
from collections import deque

from megatron_ext.config.recovery import parse_range
from megatron_ext.config.schema import RecoveryConfig
from megatron_ext.train.stage import StepReport


class Recovery:
    """What is known of bad steps. The same on every rank: it sees only what all have.

    Attributes:
        skip: ranges (first, last) of samples that are left out, last not included.
        rewinds: how often the run went back.
    """

    def __init__(self, config: RecoveryConfig):
        self._config = config
        self.skip: list[tuple[int, int]] = [parse_range(text) for text in config.skip]
        self.rewinds = 0
        self._losses: deque[float] = deque(maxlen=config.window)
        self._suspects: set[tuple[int, int]] = set()

    def past(self, samples: int, count: int) -> int:
        """Where the next step of `count` samples begins: at `samples`, or behind the ranges that it would touch."""
        for first, last in sorted(self.skip):
            if first < samples + count and samples < last:
                samples = last
        return samples

    def spikes(self, loss: float) -> bool:
        """Whether a loss jumps out of the last ones."""
        factor, known = self._config.spike_factor, self._losses
        return factor is not None and len(known) == known.maxlen and not loss <= factor * statistics.median(known)

    def suspected(self, part: tuple[int, int]) -> bool:
        """Whether these samples have spiked before; if not, they are under suspicion from now on."""
        before = part in self._suspects
        self._suspects.add(part)
        return before

    def cleared(self, part: tuple[int, int]) -> bool:
        """Whether these samples were under suspicion; now they are not."""
        before = part in self._suspects
        self._suspects.discard(part)
        return before

    def keep(self, loss: float) -> None:
        """A step was taken with this loss."""
        if math.isfinite(loss):
            self._losses.append(loss)

    def state_dict(self) -> dict:
        """JSON-able."""
        return {"skip": [list(part) for part in self.skip], "rewinds": self.rewinds, "losses": list(self._losses)}

    def load_state_dict(self, state: dict) -> None:
        """What a later part of the run has found out stays known: a rewind loads an earlier state."""
        self.skip += [tuple(part) for part in state["skip"] if tuple(part) not in self.skip]
        self.rewinds = max(self.rewinds, state["rewinds"])
        self._losses.clear()
        self._losses.extend(state["losses"])


def bad(report: StepReport) -> bool:
    """Whether a step changed nothing because a number was not finite; fp16's search for a loss scale is none."""
    return not report.applied and not report.searching
