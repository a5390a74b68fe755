"""A training runtime for large language models on megatron-core."""
from megatron_ext import core_import

__version__ = "0.1.0"
core_import.install()
