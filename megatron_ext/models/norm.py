"""RMSNorm and LayerNorm as modules of the parallel model.

    RMSNorm    y = x / sqrt(mean(x^2) + eps) * g               (Zhang & Sennrich 2019, arXiv:1910.07467)
    LayerNorm  y = (x - mean(x)) / sqrt(var(x) + eps) * g + b  (Ba et al. 2016, arXiv:1607.06450)

megatron-core's own plain norm refuses sequence parallelism. All it takes is the mark on the parameters: each rank sees its part of the
sequence only, so finalize_model_grads has to sum their gradients over the tensor-parallel ranks.
"""
import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class Norm(torch.nn.Module):
    """Over the last dimension, [..., hidden] -> [..., hidden]; statistics in fp32 (torch's kernels accumulate there)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__()
        self.rms, self.eps, self.shape = config.normalization == "RMSNorm", eps, (hidden_size,)
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.bias = None if self.rms else torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype, device=device))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        if self.rms:
            return F.rms_norm(x, self.shape, self.weight, self.eps)
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)
