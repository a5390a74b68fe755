"""Values of `recovery.*`. No torch."""
import re

from megatron_ext.errors import UserError

_RANGE = re.compile(r"(\d+):(\d+)")


def parse_range(text: str) -> tuple[int, int]:
    """FIRST:LAST as two numbers. Raises UserError."""
    match = _RANGE.fullmatch(text)
    if match is None or int(match[1]) >= int(match[2]):
        raise UserError("recovery.skip", text, "must be FIRST:LAST, two sample numbers from 0, such as 3200:3232 (3232 is the first that is used again)")
    return int(match[1]), int(match[2])
