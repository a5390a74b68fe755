"""kernels/swiglu.py against fp64, on CPU through Triton's interpreter and in torch; on a GPU where there is one."""
from gated_truth import Gated

from kernels.swiglu import swiglu, swiglu_reference


class TestSwiglu(Gated):
    name, kind = "swiglu", "silu"

    @staticmethod
    def op(x, backend="auto"):
        return swiglu(x, backend=backend)

    @staticmethod
    def reference(x):
        return swiglu_reference(x)
