"""Builds this rank's part of a model in a layout."""
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import Float16Module

from megatron_ext.config.schema import KernelsConfig, LoraConfig, ModelConfig, ParallelConfig, PrecisionConfig
from megatron_ext.config.sizes import padded_vocabulary
from megatron_ext.models.decoder import Decoder
from megatron_ext.models.encoder import Encoder
from megatron_ext.models.encoder_decoder import EncoderDecoder
from megatron_ext.models.initialise import initialise
from megatron_ext.models.layers import DEFAULTS, transformer_config
from megatron_ext.models.lora import apply_lora

FAMILIES = {"decoder": Decoder, "encoder": Encoder, "encoder_decoder": EncoderDecoder}


def _mark_partitions(chunk: torch.nn.Module) -> None:
    """Says which parameters are split over tensor-parallel ranks: the gradient norm counts the others once.

    megatron-core 0.16 says it only while it draws initial weights, which is not its task here.
    """
    for module in chunk.modules():
        if isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding)):
            dim = 0
        elif isinstance(module, RowParallelLinear):
            dim = 1
        else:
            continue
        if module.weight is not None and not getattr(module.weight, "tensor_model_parallel", False):
            set_tensor_model_parallel_attributes(module.weight, True, dim, 1)


def build_model(model: ModelConfig, parallel: ParallelConfig, precision: PrecisionConfig, groups: ProcessGroupCollection, *,
                vocab_size: int, seed: int, device: torch.device, kernels: KernelsConfig = DEFAULTS,
                accumulate: bool = False, head: str = "vocabulary", lora: LoraConfig | None = None) -> list[torch.nn.Module]:
    """The model chunks of this rank, initialised, on their device and in their dtype; not yet wrapped for data parallelism.

    Args:
        parallel: its sizes are those of `groups`.
        vocab_size: words that exist.
        kernels: of what layers are made.
        accumulate: see `layers.transformer_config`.
        head: vocabulary | scalar.
        lora: with a rank, the model is frozen and has adapters.
    Returns:
        One chunk, or `parallel.vpp` chunks with interleaving: chunk v of pipeline rank r is stage v * pp + r.
    """
    config = transformer_config(model, parallel, precision, kernels, on_cpu=device.type == "cpu", accumulate=accumulate)
    pp_rank, chunks = groups.pp.rank(), parallel.vpp or 1
    built = []
    for index in range(chunks):
        chunk = FAMILIES[model.family](
            model, config, groups,
            vocab_size=vocab_size,
            padded_vocab_size=padded_vocabulary(vocab_size, model.vocab_multiple, parallel.tp),
            first=pp_rank == 0 and index == 0,
            last=pp_rank == parallel.pp - 1 and index == chunks - 1,
            chunk=index if parallel.vpp else None,
            head=head,
        )
        _mark_partitions(chunk)
        if lora is not None and lora.rank:
            apply_lora(chunk, lora)
        initialise(chunk, model, vocab_size=vocab_size, seed=seed)
        chunk.to(device)
        built.append(chunk if precision.dtype == "fp32" else Float16Module(config, chunk))
    return built
