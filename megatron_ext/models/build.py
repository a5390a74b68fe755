"""Builds this rank's part of a model in a layout."""
import math

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module

from megatron_ext.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from megatron_ext.models.decoder import Decoder
from megatron_ext.models.initialise import initialise
from megatron_ext.models.layers import transformer_config


def padded_vocabulary(vocab_size: int, multiple: int, tp: int) -> int:
    """Rows of the table: the next multiple of `multiple` that also divides over the tensor-parallel ranks."""
    step = math.lcm(multiple, tp)
    return step * math.ceil(vocab_size / step)


def build_model(model: ModelConfig, parallel: ParallelConfig, precision: PrecisionConfig, groups: ProcessGroupCollection, *,
                vocab_size: int, seed: int, device: torch.device) -> list[torch.nn.Module]:
    """The model chunks of this rank, initialised, on their device and in their dtype; not yet wrapped for data parallelism.

    Args:
        parallel: its sizes are those of `groups`.
        vocab_size: words that exist.
    Returns:
        One chunk, or `parallel.vpp` chunks with interleaving: chunk v of pipeline rank r is stage v * pp + r.
    """
    config = transformer_config(model, parallel, precision, on_cpu=device.type == "cpu")
    pp_rank, chunks = groups.pp.rank(), parallel.vpp or 1
    built = []
    for index in range(chunks):
        chunk = Decoder(
            model, config, groups,
            vocab_size=vocab_size,
            padded_vocab_size=padded_vocabulary(vocab_size, model.vocab_multiple, parallel.tp),
            first=pp_rank == 0 and index == 0,
            last=pp_rank == parallel.pp - 1 and index == chunks - 1,
            chunk=index if parallel.vpp else None,
        )
        initialise(chunk, model, vocab_size=vocab_size, seed=seed)
        chunk.to(device)
        built.append(chunk if precision.dtype == "fp32" else Float16Module(config, chunk))
    return built
