"""Whether the job was told to stop: a signal may reach some ranks only, and at different times, so all learn of it by a vote, at the same step."""
from megatron_ext.checkpoint.agree import Ranks
from megatron_ext.parallel.signals import heard


class Votes:
    """Collective.

    The vote of a step is read after the next one, when it has long arrived (see checkpoint/agree.py), so that it costs nothing: a run stops after
    the step in which the signal came, or one later. Once the answer is yes it stays so.
    """

    def __init__(self, *, timeout: float | None = None):
        self._ranks = Ranks(timeout=timeout)
        self._asked = False

    def after_step(self) -> bool:
        if self._ranks.size == 1:
            return heard() is not None
        if not self._read():
            self._cast()
        return self._asked

    def now(self) -> bool:
        """Waits for all ranks; for places inside a long step."""
        if not self._read():
            self._cast()
            if not self._read():
                self._cast()  # `after_step` finds a vote, as it would have
        return self._asked

    def _read(self) -> bool:
        """Takes note of the vote that was cast, where there is one."""
        if self._ranks.voting:
            self._asked = not self._ranks.count()[0] or self._asked
        return self._asked

    def _cast(self) -> None:
        self._ranks.cast(done=heard() is None, good=True)

    def close(self) -> None:
        self._read()
        self._ranks.close()
