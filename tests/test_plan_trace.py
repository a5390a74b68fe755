"""The planner against dry runs: any rank of a layout, built and stepped with fake tensors and a fake process group, in a process of its own."""
import json
import os
import subprocess
import sys
from functools import cache

import pytest

# Ranks, then overrides in short. Every family of conf/model, small and scaled; every kind of parallelism.
SHORT = {"layers": "model.num_layers", "seq": "data.sequence_length", "micro": "train.micro_batch_size", "batch": "train.global_batch_size",
         "ranks": "launch.ranks", **{name: f"parallel.{name}" for name in ("tp", "pp", "vpp", "cp", "sp", "recompute", "distributed_optimizer")}}
TEXT = """
0    model=micro_llama batch=16 micro=8
0    model=tiny precision=fp32 batch=16 micro=8
1    model=tiny tp=2 sp=true ranks=4 batch=16 micro=4
0,2  model=micro_gpt2 tp=2 sp=true pp=2 ranks=4 batch=64 micro=8
0,3  model=micro_llama pp=2 vpp=2 ranks=4 batch=64 micro=8
0    model=tiny distributed_optimizer=false ranks=2 batch=16 micro=4
0    model=tiny recompute=full batch=16 micro=8
0    model=tiny lora.rank=8 batch=16 micro=8
0    model=gpt2_124m layers=4 seq=512 micro=4 batch=8
0    model=llama32_1b layers=4 precision=fp8_current kernels.layers=fp8 seq=2048 micro=1 batch=2
12   model=llama3_8b layers=8 seq=2048 micro=1 batch=8 tp=4 pp=4 ranks=16 recompute=full
0    model=llama3_405b layers=4 seq=8192 micro=1 batch=4 tp=8 sp=true pp=2 cp=2 ranks=32
16   model=llama31_70b layers=8 seq=4096 micro=1 batch=16 tp=8 sp=true pp=4 vpp=2 ranks=32
8    model=gpt3_175b layers=8 seq=2048 micro=1 batch=16 tp=4 sp=true pp=4 ranks=16
0    model=micro_opt batch=16 micro=8
0    model=micro_gptj batch=16 micro=8
0    model=micro_palm batch=16 micro=8
3    model=palm_8b layers=2 seq=2048 micro=1 batch=2 tp=4 sp=true ranks=4
0    model=qwen3_0.6b layers=2 seq=512 micro=2 batch=4 tp=2 sp=true ranks=2
0    model=micro_bert batch=16 micro=8
0    model=micro_t5 batch=16 micro=8
0    model=micro_transformer batch=16 micro=8
0,3  model=transformer_base seq=256 micro=8 batch=32 pp=2 tp=2 ranks=4
"""


def _long(word: str) -> str:
    key, _, value = word.partition("=")
    return f"{SHORT.get(key, key)}={value}"


CASES = [(line.split()[0], " ".join(_long(word) for word in line.split()[1:])) for line in TEXT.strip().splitlines()]
PROGRAM = """
import json, sys
from megatron_ext.platform import quiet
quiet()
from megatron_ext.config import sizes
from megatron_ext.config.compose import compose
from megatron_ext.plan import counted
for ranks, words in json.load(sys.stdin):
    config = compose([*([] if "precision=" in words else ["precision=bf16"]), *words.split()])
    rows = counted.compare(config, sizes.vocab_size(config), [int(rank) for rank in ranks.split(",")])
    print(json.dumps([{"exact": row.exact, "error": row.error, "planned": row.activations, "counted": row.counted.activations,
                       "sent": [[c.group, c.kind, c.calls, c.bytes] for c in row.counted.collectives]} for row in rows]), flush=True)
"""


@cache
def found() -> list[list[dict]]:
    """Of each case its ranks, from one process: to start one costs more than to run them."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], input=json.dumps(CASES), capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda case: CASES[case][1].split()[0])
def test_parameters_gradients_and_optimizer_are_exact_and_activations_within_ten_percent(case):
    for row in found()[case]:
        assert row["exact"], CASES[case]
        assert abs(row["error"]) <= 0.10, (CASES[case], row)


def test_collectives_of_a_step_by_hand():
    """TP 2 with sequence parallelism, two micro-batches of 4 x 256 tokens and hidden 256 in bf16 on each data rank, of which there are two: a layer gathers
    its input twice forward, and backward once for each of the four products' gradients."""
    sent = {(group, kind): (calls, size) for group, kind, calls, size in found()[2][0]["sent"]}
    whole = 4 * 256 * 256 * 2
    gathers, scatters = sent["tensor", "all-gather"], sent["tensor", "reduce-scatter"]
    layers, batches = 4, 2
    assert gathers[0] >= layers * batches * 6 and gathers[1] >= gathers[0] // 2 * whole
    assert scatters[0] >= layers * batches * 4 and scatters[1] >= layers * batches * 4 * whole
    assert sent["data", "reduce-scatter"][1] == 2 * sent["data", "all-gather"][1], "fp32 gradients, bf16 weights"


def test_a_rank_of_530_billion_parameters_on_2240_is_planned_and_run_in_under_a_minute():
    """The last stage of MT-NLG in its published layout; stage 0 has all of the pipeline's micro-batches in flight, and takes longer."""
    began = sum(os.times()[2:4])
    command = [sys.executable, "-m", "megatron_ext", "plan", "--dry-run", "--rank", "2176", "model=mt_nlg_530b", "parallel.tp=8", "parallel.pp=35",
               "launch.ranks=2240", "train.global_batch_size=1920", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sum(os.times()[2:4]) - began < 60  # of its own processor time: what else the machine does is not the planner's
    row, = json.loads(done.stdout)["ranks"]
    assert row["exact"] and abs(row["error"]) < 0.1 and row["counted"]["parameters"] == 2_016_678_400


ORDERS = """
import json, sys
from unittest import mock
from megatron_ext.platform import quiet
quiet()
from megatron.core.pipeline_parallel import schedules
from megatron_ext.config.compose import compose
from megatron_ext.plan import trace
forward, backward = schedules.forward_step, schedules.backward_step
for pp, vpp, count in json.load(sys.stdin):
    words = ["model=tiny", f"model.num_layers={pp * (vpp or 1)}", "model.hidden_size=32", "model.num_attention_heads=2", f"parallel.pp={pp}", f"launch.ranks={pp}",
             "data.sequence_length=16", "train.micro_batch_size=1", f"train.global_batch_size={count}", *([f"parallel.vpp={vpp}"] if vpp else [])]
    config, found = compose(words), []
    for rank in range(pp):
        seen = []
        def told(kind, run):
            return lambda *a, **k: (seen.append(kind), run(*a, **k))[1]
        with mock.patch.object(schedules, "forward_step", told("F", forward)), mock.patch.object(schedules, "backward_step", told("B", backward)):
            trace.dry_run(config, rank, 64, micro_batches=count)
        found.append("".join(seen))
    print(json.dumps(found), flush=True)
"""
SHAPES = ((2, None, 4), (4, None, 8), (2, 2, 4), (4, 3, 8))


def test_the_simulated_bubble_is_that_of_megatron_cores_schedules_and_the_theory():
    """The order of passes on every rank is taken from megatron-core's own schedules; on a clock where every pass of a kind takes as long the idle share is
    (p - 1) / (m v)."""
    from megatron_ext.plan.bubble import order, simulate

    done = subprocess.run([sys.executable, "-c", ORDERS], input=json.dumps(SHAPES), capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    real = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(real) == len(SHAPES)
    for (pp, vpp, count), orders in zip(SHAPES, real, strict=True):
        ours = [order(rank, pp, vpp, count) for rank in range(pp)]
        assert ["".join(kind for kind, _, _ in one) for one in ours] == orders, (pp, vpp, count)
        timeline = simulate(pp, vpp, count, lambda kind, stage: 1.0 if kind == "F" else 2.0)
        assert timeline.bubble == pytest.approx((pp - 1) / (count * (vpp or 1)))


REAL = """
import json
from megatron_ext.platform import connect, install, quiet
quiet()
import torch
from megatron_ext.config.compose import compose
from megatron_ext.data.batches import Batch
from megatron_ext.parallel.layout import Layout
from megatron_ext.train.engine import Engine
from megatron_ext.train.foretold import foretold
platform = install("cpu")
connect(platform, 60.0)
config = compose(["model=micro_llama", "precision=bf16", "data.sequence_length=16", "train.micro_batch_size=1", "train.global_batch_size=1"])
engine = Engine(config, Layout(), platform, vocab_size=300)
tokens = torch.arange(16)[None]
engine.step([Batch(tokens, tokens, torch.ones(1, 16), tokens, None)], lr=1e-3, step=0)
print(json.dumps(foretold(config, engine, platform, [1.0] * 5)))
"""


def test_a_run_tells_what_was_planned_beside_what_it_holds(tmp_path):
    from megatron_ext.observe import report

    done = subprocess.run([sys.executable, "-W", "ignore", "-c", REAL], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {"parameters", "weights", "gradients", "optimizer"}, "a CPU counts no peak, and has no planned speed"
    assert all(row["planned"] == row["measured"] > 0 for row in found.values())
    (tmp_path / "events.jsonl").write_text(json.dumps({"kind": "foretold", **found}) + "\n")
    heading, table = report.foretold(report.Run.read(tmp_path))
    assert heading == "## Planned and measured" and "MiB planned" in table
