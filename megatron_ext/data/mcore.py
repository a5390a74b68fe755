"""megatron-core's indexed datasets, imported when first needed and quietly: importing any part of it warns four times that Apex is missing,
which tells someone who prepares text nothing (`doctor` says what serves each op)."""
import warnings
from types import ModuleType


def indexed_dataset() -> ModuleType:
    """The module `megatron.core.datasets.indexed_dataset`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset as module
    return module
