"""What a patch of torch or megatron-core is: it stands alone, says why it is there, and can be asked whether it is still needed.

`tests/test_platform.py` runs every probe twice, before and after `apply`: it must fail without the patch (else upstream no longer
needs it and the patch has to go) and pass with it (else upstream changed under it).
"""
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Patch:
    """One change to a library.

    Attributes:
        name: short and unique.
        why: what does not work without it.
        apply: makes the change, in this process, for good.
        probe: raises an exception where the change is missing.
    """

    name: str
    why: str
    apply: Callable[[], None]
    probe: Callable[[], None]
