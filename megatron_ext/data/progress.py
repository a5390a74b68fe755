"""Progress bars for whatever takes long: on stderr, and quiet where nobody watches (no terminal) unless asked for."""
import sys


class Progress:
    """Makes bars.

    Args:
        shown: True, False, or None = where stderr is a terminal.
    """

    def __init__(self, shown: bool | None = None):
        self.shown = sys.stderr.isatty() if shown is None else shown

    def bytes(self, label: str, total: int):
        """A bar over `total` bytes; a context manager with `.update(bytes)`."""
        return self._bar(desc=label, total=total, unit="B", unit_scale=True, unit_divisor=1024)

    def items(self, label: str, total: int, unit: str):
        return self._bar(desc=label, total=total, unit=unit, unit_scale=True)

    def _bar(self, **options):
        from tqdm import tqdm

        return tqdm(file=sys.stderr, disable=not self.shown, leave=True, dynamic_ncols=True, **options)
