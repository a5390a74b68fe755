"""What a process imports: megatron-core without what few runs use, and compiled all the same where somebody compiles."""
import json
import os
import subprocess
import sys

from small import ROOT, command

HEAVY = ("torch._dynamo", "torch._inductor.lowering", "wandb", "transformers")


def python(text: str, *words: str) -> list:
    """What the program printed last, as JSON."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", text, *words], env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_a_training_imports_no_compiler_and_no_tracker(small_data, tmp_path):
    text = ("import json, sys\nfrom megatron_ext.cli.main import main\ncode = main(sys.argv[1:])\n"
            f"print(json.dumps([code, [name for name in {HEAVY} if name in sys.modules]]))")
    assert python(text, *command(tmp_path / "run", small_data, "log.wandb=disabled")[3:]) == [0, []]


def test_functions_of_megatron_core_are_compiled_at_their_first_call():
    """Beside what torch.compile makes of the same function; megatron-core sees nothing of the way it was imported."""
    text = """
import megatron_ext, json, sys, torch
before = torch.compile
import megatron.core
from megatron.core.fusions.fused_bias_dropout import bias_dropout_add_fused_inference as fused
assert torch.compile is before and "wandb" not in sys.modules and type(megatron.core.__loader__).__module__ == "_frozen_importlib_external"
torch._dynamo.config.cache_size_limit  # Dynamo, as a user imports it
compiled = []
def backend(graph, inputs):
    compiled.append(len(inputs))
    return graph.forward
from megatron_ext import core_import
@core_import.deferred(backend=backend)
def twice(x, *, by=2):
    return x * by
x = torch.arange(3.0)
first, second = twice(x).tolist(), twice(x).tolist()
whole = torch.compile(lambda x: twice(x) + 1, backend=backend, fullgraph=True)(x).tolist()
print(json.dumps([first, second, whole, len(compiled), twice.__name__, callable(fused)]))
"""
    assert python(text) == [[0, 2, 4], [0, 2, 4], [1, 3, 5], 2, "twice", True]


def test_an_op_that_ran_before_dynamo_came_is_kept_out_of_it_afterwards():
    text = """
import json, sys, torch
from kernels.rms_norm import rms_norm
x, weight = torch.randn(4, 64), torch.ones(64)
plain = torch.ops.kernels.rms_norm(x, None, weight, 1e-5, False, "torch")[0]
optimizer = torch.optim.AdamW([torch.nn.Parameter(weight)])
state = optimizer.state_dict()
absent = "torch._dynamo" not in sys.modules
compiled = torch.compile(lambda x: rms_norm(x, weight), backend="aot_eager", fullgraph=True)(x)
optimizer.load_state_dict(state)
print(json.dumps([absent, max(float((one - rms_norm(x, weight)).abs().max()) for one in (plain, compiled)), "torch._dynamo" in sys.modules]))
"""
    absent, difference, present = python(text)
    assert absent and present and difference < 1e-6


def test_megatron_core_that_was_there_before_stays_as_it_is():
    text = "import json, sys, megatron.core as core\nimport megatron_ext, megatron_ext.train.pretrain\nprint(json.dumps([sys.modules['megatron.core'] is core]))"
    assert python(text) == [True]
