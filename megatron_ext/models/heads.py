"""What stands on the last stage of a decoder: the projection onto the vocabulary, or onto one number a token (reward models, value functions)."""
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region
from torch import Tensor

from megatron_ext.models.own import OwnParameters

HEADS = ("vocabulary", "scalar")
ALIGNED = 8  # elements: 16 bytes of the narrowest dtype


class Head(ColumnParallelLinear):
    """The projection onto the vocabulary, split over the tensor-parallel ranks."""

    def forward(self, hidden: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None, *,
                score: Callable[[Tensor, Tensor], tuple] | None = None, adds_bias: bool = False) -> tuple:
        """Logits and no bias, as megatron-core's (whose logits hold it); with `score` what it makes of the hidden states and the weight, without logits.
        adds_bias: `score` does that by itself. It is called in here because hooks hang on this module: with `parallel.overlap_param_gather` they wait for the newest weight."""
        if score is not None:
            return score(*widened(hidden, self.weight if weight is None else weight, None if adds_bias else self.bias))
        return super().forward(hidden, weight=weight, runtime_gather_output=runtime_gather_output)


def widened(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """hidden [..., h] and weight [V, h] whose products are logits with their bias, for ops that know of none: the bias is a column of the weight, which a
    column of ones meets (and zeros, so that rows stay aligned). Copies the weight: few models have such a bias (GPT-J)."""
    if bias is None:
        return hidden, weight
    beside = F.pad(torch.ones_like(hidden[..., :1]), (0, ALIGNED - 1))
    return torch.cat((hidden, beside), dim=-1), torch.cat((weight, F.pad(bias[:, None], (0, ALIGNED - 1))), dim=-1)


class ValueHead(OwnParameters):
    """hidden -> one number a token, in fp32. The same on every tensor-parallel rank.

    It starts from N(0, 1 / (hidden + 1)), as the reward models of Stiennon et al. 2020 (arXiv 2009.01325, appendix B).
    """

    def __init__(self, config, tp_group):
        super().__init__(config, tp_group)
        self.weight = torch.nn.Parameter(torch.empty(1, config.hidden_size, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.zeros(1, dtype=config.params_dtype))
        # Over part of the sequence each rank's gradient is a part: megatron-core adds those that say so.
        self.weight.sequence_parallel = self.bias.sequence_parallel = config.sequence_parallel

    @staticmethod
    def std(hidden_size: int) -> float:
        return 1 / math.sqrt(hidden_size + 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [seq (/ TP with sequence parallel), batch, hidden] -> values [batch, seq] fp32."""
        values = F.linear(hidden.float(), self.weight.float(), self.bias.float()).squeeze(-1)
        if self.config.sequence_parallel:
            values = gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False, group=self.tp_group)
        return values.t()
