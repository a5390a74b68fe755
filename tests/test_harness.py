"""benchmarks/: statistics, schema, what a provider may do wrong, copy share, peaks, bus bandwidth, merging, and the commands that users type."""
import csv
import importlib
import importlib.util
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
CPU = torch.device("cpu")

sys.path.insert(0, str(BENCHMARKS))
harness, plot, run_all, collectives = (importlib.import_module(name) for name in ("harness", "plot", "run_all", "bench_collectives"))
errors, memory, measuring, table, timing = (importlib.import_module(f"measure.{name}") for name in ("errors", "memory", "run", "table", "timing"))

BUDGET = timing.Budget(seconds=0.01, least=3, most=3)
COLUMNS = {"device": "this", "threads": 1, "torch": "2", "triton": "", "cuda": "", "driver": "", "commit": "abc", "date": "2026-01-01T00:00:00Z",
           "command": "python x"}

TINY = '''
import torch
from harness import Case, compiled, main, optional

def breaks(x):
    raise RuntimeError("no kernel image\\nis available")

def cases(device):
    for shape in (4, 8):
        yield Case(op="double", shape=f"3x{shape}", dtype=torch.float32,
                   make=lambda generator, device, shape=shape: (torch.randn(3, shape, generator=generator, device=device),),
                   providers={"ours": lambda x: 2 * x, "eager": lambda x: x + x, "broken": breaks, "liger": optional("no_such_library.ops", lambda m: m.f)},
                   reference=lambda x: x + x, bytes_forward=24 * shape, bytes_backward=24 * shape, flops_forward=3 * shape)

if __name__ == "__main__":
    main(cases)
'''


def case(**given) -> "harness.Case":
    return harness.Case(**{"op": "double", "shape": "2x3", "dtype": torch.float32, "reference": lambda x: x + x,
                           "make": lambda generator, device: (torch.randn(2, 3, generator=generator),), "providers": {"eager": lambda x: x + x}} | given)


def measured(given: "harness.Case", **options) -> dict:
    """(provider, mode) -> row."""
    run = measuring.Run(CPU, BUDGET, timing.Copy(CPU, megabytes=1), COLUMNS, **options)
    return {(r["provider"], r["mode"]): r for r in harness.measure(given, run)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "bench_double.py"
    path.write_text(TINY)
    return path


def loaded(script: Path):
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command(script: Path, *words: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(script), *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
                          env={**os.environ, "PYTHONPATH": str(BENCHMARKS), "OMP_NUM_THREADS": "1", **environment})


# ---- numbers ------------------------------------------------------------------------------------------------------------------------------------------

def test_percentiles_by_hand():
    assert [timing.percentile([4.0, 1.0, 3.0, 2.0], p) for p in (0, 0.5, 1)] == [1.0, 2.5, 4.0]
    assert timing.percentile([0.0, 10.0], 0.2) == 2.0 and timing.percentile([7.0], 0.8) == 7.0


def test_ratio_is_taken_within_a_turn():
    # the machine was four times slower in the second turn; the ratio of the turns does not see it
    assert timing.ratio_in_turns([2.0, 8.0, 2.0], [1.0, 4.0, 1.0]) == 2.0
    assert timing.ratio_in_turns([2.0, 2.0], [1.0, 1.0, 1.0]) == 2.0  # not the same turns: ratio of medians


def test_share_of_copy_bandwidth_and_flops():
    moving = case(bytes_forward=4e6, bytes_backward=8e6, flops_forward=6e9)
    got = measuring.figures(moving, "forward", [0.002] * 3, [0.004] * 3, copy=8e9)
    assert got["gb_per_s"] == pytest.approx(2.0) and got["share_of_copy"] == pytest.approx(0.25) and got["tflops"] == pytest.approx(3.0)
    assert got["time_over_eager"] == pytest.approx(0.5) and got["p50_ms"] == pytest.approx(2.0) and got["copy_gb_per_s"] == 8.0
    assert measuring.figures(moving, "both", [0.002], None, copy=12e9)["share_of_copy"] == pytest.approx(0.5)
    computing = measuring.figures(case(bytes_forward=4e6, memory_bound=False), "forward", [0.002], None, copy=8e9)
    assert computing["share_of_copy"] is None and computing["gb_per_s"] == pytest.approx(2.0) and computing["tflops"] is None


def test_copy_bandwidth_counts_reads_and_writes():
    copy = timing.Copy(CPU, megabytes=8)
    assert copy.bandwidth([0.001, 0.002, 0.009]) == pytest.approx(2 * 8 * 2**20 / 0.002)
    assert torch.equal(copy(), copy.source)
    (row,) = measured(case(bytes_forward=48, bytes_backward=48), modes=("forward",)).values()
    assert float(row["share_of_copy"]) == pytest.approx(float(row["gb_per_s"]) / float(row["copy_gb_per_s"]), rel=0.01)


def test_peak_of_a_known_allocation_on_cpu():
    def call():
        a = torch.empty(1000, 1000)  # 4 MB
        b = torch.empty(500, 1000)  # 2 MB beside it
        del a
        return torch.empty(250, 1000), b  # 1 MB, after the first is gone

    assert memory.peak_bytes(call, CPU) == pytest.approx(6e6, rel=0.01)
    x = torch.ones(1000, 1000)
    assert memory.peak_bytes(lambda: x.add_(1), CPU) < 1e4  # inputs are not counted


@pytest.mark.parametrize("op, n, expected", [("all_reduce", 2, 1.0), ("all_reduce", 8, 1.75), ("all_gather", 4, 0.75), ("reduce_scatter", 8, 0.875), ("p2p", 8, 1.0)])
def test_bus_bandwidth_by_hand(op, n, expected):
    assert collectives.bus_bandwidth(op, n, size=10**9, seconds=1.0) == expected * 1e9


def test_errors_are_relative_to_those_of_pytorch():
    exact, plain = [torch.tensor([1.0, 4.0]).double()], [torch.tensor([1.0, 4.5])]
    error, of_torch, ratio = errors.worst([torch.tensor([2.0, 4.0])], exact, plain)
    assert (error, of_torch, ratio) == (0.25, 0.125, 2.0)
    assert errors.worst([torch.tensor([float("nan"), 4.0])], exact, plain)[2] != 0  # a NaN is no small error
    _, _, lucky = errors.worst([torch.tensor([1.0, 4.0])], exact, [exact[0].float()])
    assert lucky == 0


# ---- what a provider may do -----------------------------------------------------------------------------------------------------------------------------

def test_modes_errors_and_gradients():
    rows = measured(case(providers={"eager": lambda x: x + x, "ours": lambda x: 2.001 * x}, bytes_forward=24))
    assert set(rows) == {(p, m) for p in ("eager", "ours") for m in harness.MODES}
    assert all(float(r["p20_ms"]) <= float(r["p50_ms"]) <= float(r["p80_ms"]) for r in rows.values())
    assert float(rows["eager", "both"]["error_ratio"]) <= 1 and float(rows["ours", "backward"]["error_ratio"]) > 100
    assert float(rows["eager", "forward"]["time_over_eager"]) == 1.0


def test_a_failure_is_a_row_and_the_others_go_on():
    calls = []

    def later(x):
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return 2 * x

    def backward_breaks(x):
        return torch.ops.aten.add(x, x).detach().requires_grad_().sum() * float("nan")

    rows = measured(case(providers={
        "absent": harness.optional("no_such_library.ops", lambda module: module.f), "half": harness.optional("measure.nothing", lambda module: module.f),
        "broken": lambda x: x.no_such_method(), "later": later, "graphless": backward_breaks, "eager": lambda x: x + x}))
    assert rows["absent", "forward"]["note"] == "not installed"
    assert "not installed" == rows["half", "both"]["note"] or "cannot be imported" in rows["half", "both"]["note"]
    assert rows["broken", "backward"]["note"].startswith("failed: AttributeError")
    assert rows["later", "both"]["note"] == "out of memory" and not rows["later", "both"]["p50_ms"]
    assert all(rows["eager", mode]["p50_ms"] for mode in harness.MODES)


def test_optional_takes_a_library_that_is_there():
    rows = measured(case(providers={"eager": lambda x: x + x, "theirs": harness.optional("torch", lambda torch: lambda x: torch.mul(x, 2)),
                                    "made": harness.optional("torch", lambda: lambda x: x * 2)}))
    assert float(rows["theirs", "both"]["p50_ms"]) > 0 and float(rows["made", "forward"]["error_ratio"]) == 0


def test_compiled_code_is_differentiated_again_and_again():
    rows = measured(case(providers={"eager": lambda x: x.exp().sin(), "compile": harness.compiled(lambda x: x.exp().sin(), backend="aot_eager")},
                         reference=lambda x: x.exp().sin()))
    assert all(rows["compile", mode]["p50_ms"] and float(rows["compile", mode]["error_ratio"]) <= 2 for mode in harness.MODES), rows


def test_without_gradients_only_forward_is_measured():
    rows = measured(case(differentiable=(), providers={"eager": lambda x: x.add_(1)}, reference=None))
    assert set(rows) == {("eager", "forward")} and rows["eager", "forward"]["error"] == ""
    rows = measured(case(providers={"eager": lambda x: x.detach() + 1}))
    assert rows["eager", "backward"]["note"] == "no gradient"


def test_a_reference_that_fails_costs_the_errors_only(capsys):
    rows = measured(case(reference=lambda x: x.no_such_method()))
    assert rows["eager", "both"]["p50_ms"] and not rows["eager", "both"]["error"]
    assert "no error columns" in capsys.readouterr().err


def test_outputs_that_are_not_those_of_the_reference_are_said():
    rows = measured(case(providers={"eager": lambda x: x + x, "less": lambda x: (x + x)[:1], "more": lambda x: (x + x, x)}))
    assert not rows["less", "forward"]["error"] and "other outputs" in rows["less", "forward"]["note"] and rows["less", "forward"]["p50_ms"]
    assert rows["more", "forward"]["error_ratio"] == "0" and "other outputs" in rows["more", "both"]["note"] and not rows["eager", "both"]["note"]


def test_a_device_that_breaks_costs_its_rows_and_not_the_run(monkeypatch):
    def broken(*given):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(timing, "seconds_in_turns", broken)
    assert all("illegal memory access" in r["note"] for r in measured(case()).values())


def test_every_provider_sees_the_same_inputs():
    seen = []
    measured(case(providers={"a": lambda x: seen.append(x.detach().clone()) or 2 * x, "b": lambda x: seen.append(x.detach().clone()) or 2 * x}))
    assert all(torch.equal(x, seen[0]) for x in seen)


# ---- the schema ------------------------------------------------------------------------------------------------------------------------------------------

def test_rows_have_all_columns_and_no_others():
    row = table.row(op="a", p50_ms=1 / 3, note="two\nlines")
    assert tuple(row) == table.COLUMNS and row["p50_ms"] == "0.3333" and row["note"] == "two lines" and row["error"] == ""
    with pytest.raises(KeyError, match="speed is no column"):
        table.row(speed=1.0)


def test_merging_replaces_what_was_measured_again(tmp_path):
    def row(provider, time, device="a"):
        return table.row(op="x", mode="forward", shape="1", dtype="float32", provider=provider, device=device, p50_ms=time)

    merged = table.merge([row("ours", 1.0), row("eager", 2.0)], [row("ours", 3.0), row("ours", 4.0, "b")])
    assert [(r["provider"], r["p50_ms"], r["device"]) for r in merged] == [("ours", "3", "a"), ("eager", "2", "a"), ("ours", "4", "b")]
    table.write(tmp_path / "x.csv", merged)
    assert table.read(tmp_path / "x.csv") == merged and [p.name for p in tmp_path.iterdir()] == ["x.csv"]
    (tmp_path / "y.csv").write_text("op,speed\nx,1\n")
    with pytest.raises(ValueError, match="y.csv: not the schema"):
        table.read(tmp_path / "y.csv")


def test_widths_of_shapes():
    assert [plot.width(s) for s in ("8192x4096", "n=4 64 KB", "n=4 1 MB", "")] == [4096, 65536, 1 << 20, 0]
    assert plot.file_name("all_reduce[tp]") == "all_reduce_tp.png"


# ---- commands ----------------------------------------------------------------------------------------------------------------------------------------------

def test_the_command_of_a_benchmark(tiny):
    ran = command(tiny, "--quick", "--threads", 1)
    assert ran.returncode == 0, ran.stderr
    rows = list(csv.DictReader(io.StringIO(ran.stdout)))
    assert tuple(rows[0]) == table.COLUMNS and {r["shape"] for r in rows} == {"3x4"} and len(rows) == 12
    assert "of copy" in ran.stderr and "failed: RuntimeError: no kernel image" in ran.stderr and "USDT" not in ran.stderr
    one = rows[0]
    assert one["provider"] == "ours" and one["threads"] == "1" and one["torch"] == torch.__version__ and one["commit"] and one["device"]
    assert one["command"].endswith("bench_double.py --quick --threads 1") and float(one["share_of_copy"]) > 0 and float(one["error_ratio"]) == 0


def test_output_replaces_what_was_measured_again(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(tiny)])
    for shapes in (["3x4"], ["3x*"]):
        harness.main(loaded(tiny).cases, ["--quick", "--output", str(tmp_path / "out"), "--providers", "ours", "--modes", "forward", "--shapes", *shapes])
    assert "p50 ms" in capsys.readouterr().out and len(table.read(tmp_path / "out" / "double.csv")) == 1  # --quick takes the first of the shapes


@pytest.mark.parametrize("words, message", [
    (["--providers", "apex"], "argument --providers: apex is none of broken, eager, liger, ours"),
    (["--shapes", "9x9"], "argument --shapes: 9x9 matches none of 3x4, 3x8"),
    (["--dtype", "int7"], "argument --dtype: int7 is none of float32"),
    (["--threads", "0"], "argument --threads: 0 is below 1"),
    (["--modes", "sideways"], "argument --modes: invalid choice: 'sideways'"),
    (["--fast"], "unrecognized arguments: --fast"),
    (["--output", "README.md"], "argument --output: README.md is a file"),
])
def test_bad_options_end_with_one_message(words, message, tiny, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [str(tiny)])
    with pytest.raises(SystemExit) as ended:
        harness.main(loaded(tiny).cases, words)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and message in said and said.count("\n") == 1 and said.startswith("error: ")


@pytest.mark.parametrize("words, message", [
    ([], "argument --ranks: how many ranks"), (["--ranks", "3", "--tp", "2"], "3 ranks do not divide into tp=2"),
    (["--ranks", "2", "--sizes", "big"], "argument --sizes: big are not sizes"), (["--ranks", "0"], "argument --ranks: 0 is below 1"),
])
def test_bad_options_of_the_collectives(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        collectives.options_of(words)
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("words, message", [
    (["--only", "nothing"], "argument --only: nothing is none of"), (["--index", "99"], "argument --index: 99 is not in 0.."),
    (["--merge", "nowhere"], "nowhere: no CSV files"), (["--list", "--index", "1"], "not allowed with"),
])
def test_bad_options_of_run_all(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        run_all.main(words)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_collectives_over_two_ranks(tmp_path):
    ran = command(BENCHMARKS / "bench_collectives.py", "--ranks", 2, "--tp", 2, "--sizes", "64K", "--quick", "--output", tmp_path)
    assert ran.returncode == 0, ran.stderr
    rows = table.read(tmp_path / "collectives.csv")
    assert [r["op"] for r in rows] == [f"{op}[tp]" for op in collectives.FACTORS] and all(float(r["gb_per_s"]) > 0 for r in rows)
    assert rows[0]["provider"] == "gloo TP2" and rows[0]["shape"] == "n=2 64 KB" and rows[0]["note"] == "2 ranks, 1 node"
    (tmp_path / "environment.a.json").write_text('{"host": "n1"}')
    merged = run_all.merge(tmp_path)
    assert '"n1"' in merged[0].read_text() and "| all_reduce[tp] | n=2 64 KB | gloo TP2 |" in merged[-1].read_text()
    assert not (tmp_path / "environment.a.json").exists()


def test_a_results_directory_becomes_plots_and_a_page(tmp_path):
    def row(provider, width, share, **more):
        return table.row(op="norm", mode="forward", shape=f"8192x{width}", dtype="bfloat16", provider=provider, share_of_copy=share, p50_ms=1 / share,
                         **COLUMNS, **more)

    table.write(tmp_path / "norm.csv", [row("ours", w, 0.9, time_over_eager=0.5) for w in (2048, 4096)] + [row("eager", w, 0.45) for w in (2048, 4096)]
                + [table.row(op="norm", mode="forward", shape="8192x4096", dtype="bfloat16", provider="liger", note="not installed", **COLUMNS)])
    png, page = plot.draw(tmp_path)
    assert png.name == "norm.png" and png.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert "| norm | 8192x4096 | bfloat16 | forward | 1.111 | 0.5 | 90 % |" in text and "| eager | 2.222 |" in text
    assert "Without numbers: liger (norm: not installed)." in text and "`python x`" in text


def test_every_index_of_the_array_names_a_benchmark():
    found = run_all.names()
    assert "swiglu" in found and "collectives" not in found and "adamw" not in [n for n in found if not (BENCHMARKS / f"bench_{n}.py").exists()]
    assert run_all.layouts(8) == [["--tp", "8"], ["--tp", "2"]] and run_all.layouts(2) == [["--tp", "2"]]
    assert run_all.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
