"""torch.compile(dynamic=True): one graph serves every number of rows and every width, with the results of eager."""
import pytest
import torch
import torch._dynamo.testing
from kernel_truth import DEVICE, draw, each_backend

from kernels.bias_gelu import bias_gelu
from kernels.geglu import geglu
from kernels.layer_norm import layer_norm
from kernels.rms_norm import rms_norm
from kernels.rope import inverse_frequencies, rope, rope_tables
from kernels.swiglu import swiglu


def _inputs(op: str, rows: int, width: int) -> list[torch.Tensor]:
    if op == "rope":
        cos, sin = (t[:, None] for t in rope_tables(torch.arange(rows, device=DEVICE), inverse_frequencies(width)))
        return [draw(rows, 2, 4, width, dtype=torch.float32, seed=1).requires_grad_(), draw(rows, 2, 2, width, dtype=torch.float32, seed=2), cos, sin]
    x = draw(rows, 3, width, dtype=torch.float32, seed=1).requires_grad_()
    return [x, *(draw(*s, dtype=torch.float32, seed=2) for s in {"bias_gelu": [(width,)], "rms_norm": [(width,), (rows, 3, width)],
                                                                "layer_norm": [(width,), (width,), (rows, 3, width)]}.get(op, []))]


OPS = {
    "swiglu": swiglu, "geglu": geglu, "geglu tanh": lambda x, **b: geglu(x, approximate="tanh", **b), "bias_gelu": bias_gelu,
    "rms_norm": lambda x, w, r, **b: rms_norm(x, w, residual=r, **b), "layer_norm": lambda x, w, o, r, **b: layer_norm(x, w, o, residual=r, **b),
    "rope": rope,
}


@each_backend
@pytest.mark.parametrize("op", OPS)
def test_one_graph_for_all_sizes(op, backend):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *inputs: OPS[op](*inputs, backend=backend), fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for rows, width in ((5, 12), (7, 20), (9, 34)):
        inputs = _inputs(op, rows, width)
        found, expected = compiled(*inputs), OPS[op](*inputs, backend=backend)
        torch.testing.assert_close(found, expected)
        losses = [sum(o.square().sum() for o in (out if isinstance(out, tuple) else (out,))) for out in (found, expected)]
        torch.testing.assert_close(*(torch.autograd.grad(loss, inputs[0]) for loss in losses))
        frames.append(counter.frame_count)  # tracing may begin anew within the first call; a later one compiles nothing
    assert frames[0] == frames[-1]
