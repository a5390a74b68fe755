"""Linear layers for a few rows at a time on the CPU, in fp32.

With 32 rows a product reads each weight once and is over: oneDNN's product on weights that lie in its own blocked order takes two thirds of
the time of the plain one. Putting them in that order costs about as much as `PACK_AFTER` tokens gain, so it is done when generation has
gone on that long (rent until the rent has paid the price). The copies live as long as one call of `generate`: training changes weights
only outside of it.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

PACK_AFTER = 16  # single-token passes
ROWS = 32  # for which oneDNN chooses the order; any number works


def available(weight: Tensor) -> bool:
    """Whether this torch can do it for such weights. The operators are those that torch's own compiler uses on the CPU."""
    ops = torch.ops.mkldnn
    return (
        weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
        and hasattr(ops, "_reorder_linear_weight") and hasattr(ops, "_linear_pointwise")
    )


class Linear:
    """x, W [out, in], bias or None -> x W^T + bias, x [rows, in]. Call `passed` after each pass over the model.

    Args:
        pack: False never puts weights in another order. oneDNN's sums are another order too: logprobs are then twice as far from those of training,
            whose products run as the plain ones here.
    """

    def __init__(self, *, pack: bool = True):
        self._passes, self._pack = 0, pack
        self._packed: dict[int, Tensor] = {}

    def passed(self) -> None:
        self._passes += 1

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not self._pack or self._passes < PACK_AFTER or not available(weight):
            return F.linear(x, weight, bias)
        packed = self._packed.get(id(weight))  # the model keeps its parameters alive, so that no other takes the id
        if packed is None:
            packed = self._packed[id(weight)] = torch.ops.mkldnn._reorder_linear_weight(weight.detach().clone(), ROWS)
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
