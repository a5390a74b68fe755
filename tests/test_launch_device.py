"""Every launch of a Triton kernel is on the GPU of its tensors, whichever is current: read from the source, because it takes two GPUs to see."""
import ast
from pathlib import Path

import torch

from kernels import backend, jit

KERNELS = Path(backend.__file__).parent


def _decorated(function: ast.FunctionDef) -> bool:
    return any(ast.unparse(d).startswith("triton.jit") for d in function.decorator_list)


def launches(tree: ast.Module, names: set[str]) -> dict[int, bool]:
    """Line -> whether it is under `with on_device_of(...)`, of everything that is indexed with a grid: `kernel[...]`, and `pick(...)[...](...)`."""
    found = {}

    def walk(node: ast.AST, guarded: bool) -> None:
        if isinstance(node, ast.FunctionDef) and _decorated(node):
            return
        if isinstance(node, ast.With):
            guarded = guarded or any(ast.unparse(i.context_expr).startswith("on_device_of(") for i in node.items)
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in names or (
                isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) and isinstance(node.func.value, ast.Call)
                and "kernel" in ast.unparse(node.func.value.func)):
            found[node.lineno] = guarded
        for child in ast.iter_child_nodes(node):
            walk(child, guarded)

    walk(tree, False)
    return found


def test_every_launch_is_on_its_tensors_gpu():
    launching = set()
    for path in sorted(KERNELS.glob("*.py")):
        tree = ast.parse(path.read_text())
        names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and _decorated(node)}
        found = launches(tree, names)
        assert all(found.values()), f"{path.name}: not under on_device_of: lines {[line for line, guarded in found.items() if not guarded]}"
        launching |= {path.stem} if found else set()
    assert launching == {"adamw_triton", "bias_gelu", "fp8_triton", "gae", "gated", "grad_norm", "linear_cross_entropy_triton", "norm_rows", "rope",
                         "wgrad_accumulate"}


def test_a_launch_outside_is_found():
    tree = ast.parse("def f(x):\n  k[(1,)](x)\n  with on_device_of(x):\n    k[(1,)](x)\n  pick_kernel(x)[(1,)](x)\n  functools.partial(k[(1,)], x)")
    assert launches(tree, {"k"}) == {2: False, 4: True, 5: False, 6: False}


def test_nothing_to_do_on_a_cpu():
    with jit.on_device_of(torch.ones(1)), jit.on_device_of(torch.ones(1)):
        pass
    assert backend.serving("fp8_linear", "auto", "cpu", None) == "scaled_mm"
