"""Every Triton kernel, compiled for GPUs that are not here: no spills, wide loads, nothing worse than docs/kernels.md says."""
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import backend, static_check
from kernels.static_check import Cost, complaints, gone, read_table, table_text

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
ROOT = Path(__file__).parent.parent


def command(*arguments: str, interpret: str | None = None) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if interpret is not None:
        environment["TRITON_INTERPRET"] = interpret
    return subprocess.run([sys.executable, "-m", "kernels.static_check", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True,
                          timeout=550, check=False)


def test_no_kernel_spills_loads_narrowly_or_got_worse():
    done = command()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no spills, no regressions" in done.stdout


def test_every_op_with_a_triton_kernel_is_checked():
    """A kernel that nobody compiles could spill unseen."""
    with_triton = {op for op, backends in backend.ops().items() if any(b.name == "triton" for b in backends)}
    checked = {key[0] for key in read_table()[1]}
    assert with_triton <= checked, f"not in docs/kernels.md: {sorted(with_triton - checked)}"


def test_what_is_complained_of():
    key = ("rms_norm", "forward", 90)
    good = Cost(registers=40, spilled=0, shared=64, wide_loads=2)
    table = {key: good}
    assert complaints({key: (good, True)}, table, True) == []
    assert complaints({key: (Cost(39, 0, 64, 2), True)}, table, True) == []
    worse = {
        "spills 8 bytes": Cost(40, 8, 64, 2), "16 bytes at a time": Cost(40, 0, 64, 0), "41 registers, 40": Cost(41, 0, 64, 2),
        "128 bytes of shared": Cost(40, 0, 128, 2), "a program may have 232448": Cost(40, 0, 240_000, 2), "1 16-byte loads, 2": Cost(40, 0, 64, 1),
    }
    for words, now in worse.items():
        assert any(words in line for line in complaints({key: (now, True)}, table, True)), words
    assert complaints({key: (Cost(99, 0, 999, 1), True)}, table, False) == [], "figures of another Triton are not comparable"
    assert complaints({key: (Cost(40, 8, 64, 2), True)}, table, False) != []
    assert "not in kernels.md" in complaints({key: (good, True)}, {}, True)[0]
    assert gone({key: (good, True)}, table) == [] and "not launched any more" in gone({}, table)[0]


def test_the_table_is_read_as_it_is_written(tmp_path):
    found = {("op", "backward N=8 bf16", 80): (Cost(1, 0, 3, 4), True), ("op", "forward", 100): (Cost(5, 0, 7, 8), False)}
    path = tmp_path / "kernels.md"
    path.write_text(table_text(found, "3.7.1"))
    assert read_table(path) == ("3.7.1", {key: cost for key, (cost, _) in found.items()})


def test_a_spilling_kernel_is_found(tmp_path):
    """The check can fail: 4,096 accumulators in one warp do not fit 255 registers a thread."""
    (tmp_path / "fat.py").write_text(
        "from kernels.jit import Launch, tl, triton\n"
        "@triton.jit\n"
        "def fat(x_ptr, y_ptr, n, BLOCK: tl.constexpr):\n"
        "    col = tl.arange(0, BLOCK)\n"
        "    a = tl.zeros((BLOCK,), tl.float32)\n"
        "    b = tl.zeros((BLOCK,), tl.float32)\n"
        "    c = tl.zeros((BLOCK,), tl.float32)\n"
        "    for i in range(n):\n"
        "        x = tl.load(x_ptr + i * BLOCK + col).to(tl.float32)\n"
        "        a += x\n"
        "        b += x * x\n"
        "        c = tl.maximum(c, x)\n"
        "    tl.store(y_ptr + col, a + tl.sum(b) + tl.sum(c) + b * c)\n"
        "from kernels.static_check import cost\n"
        "print(cost(Launch('fat', 'forward', fat, {'x_ptr': '*bf16', 'y_ptr': '*fp32', 'n': 'i32'}, {'BLOCK': 4096}, 1), 90).spilled)\n")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(tmp_path / "fat.py")], env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
                          check=False)
    assert int(done.stdout) > 0, done.stderr


@pytest.mark.parametrize(("arguments", "interpret", "words"), [
    (["--op", "softmax"], None, "--op softmax: no such op"), (["--write", "--op", "swiglu"], None, "leave --op"),
    ([], "1", "TRITON_INTERPRET=1"),
])
def test_bad_options(arguments, interpret, words):
    done = command(*arguments, interpret=interpret)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


def test_modules_that_launch_are_found():
    assert "swiglu" in static_check.modules()
