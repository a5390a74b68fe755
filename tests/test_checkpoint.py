"""Checkpoints in one process: the format, atomicity, retention, failed saves, damaged and hostile files, comparison."""
import builtins
import functools
import hashlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject, ShardedTensor

from megatron_ext.checkpoint import Checkpoints, checkpoint_hash, find, load, manifest, read_record, verify
from megatron_ext.checkpoint.compare import compare
from megatron_ext.checkpoint.compare import main as compare_main
from megatron_ext.checkpoint.encode import decode, encode
from megatron_ext.checkpoint.opaque import Hostile, inspect
from megatron_ext.checkpoint.optimizer import flat_boxes
from megatron_ext.errors import UserError

pytestmark = pytest.mark.both
MODEL = {"hidden_size": 8, "num_layers": 2}


class Log:
    def __init__(self):
        self.entries = []

    def write(self, kind, **fields):
        self.entries.append((kind, fields))

    def kinds(self):
        return [kind for kind, _ in self.entries]


def state(value: float = 1.0, size: int = 24, extra: object = None) -> dict:
    """A sharded state of every kind: two layers of one tensor, bf16, an empty one, objects, common values, a local one."""
    make = ShardedTensor.from_rank_offsets
    layers = [torch.arange(size, dtype=torch.float32).reshape(-1, 4) * value + layer for layer in range(2)]
    return {
        "model": {
            f"layer{n}": make("layers.weight", tensor, (0, n, 2), replica_id=(0, 0, 0), prepend_axis_num=1) for n, tensor in enumerate(layers)
        }
        | {
            "half": make("half", torch.full((3, 5), value, dtype=torch.bfloat16).t().contiguous(), replica_id=(0, 0, 0)),
            "empty": make("empty", torch.empty(0, 4), replica_id=(0, 0, 0)),
            "extra": ShardedObject("mixer._extra_state", extra, (1,), (0,), replica_id=(0, 0, 0)),
        },
        "optimizer": {
            "groups": [{"lr": 0.1, "betas": (0.9, 0.95), "step": 7, "seen": torch.tensor(3)}],
            "moment": make("optimizer.moment", torch.full((6,), value), replica_id=(0, 0, 0)),
            "here": LocalNonpersistentObject("local"),
        },
    }


def saved(directory: Path, step: int = 1, value: float = 1.0, **settings) -> Path:
    store = Checkpoints(directory, keep=0, background=True, sharding="fully_reshardable")
    store.save(step, state(value, **settings), {"model": MODEL, "layout": {"tp": 1}})
    store.wait()
    store.close()
    return store.newest()


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("pristine") / "checkpoints"
    saved(directory, 1, 1.0, extra={"scale": torch.ones(2)})
    return saved(directory, 2, 2.0, extra={"scale": torch.ones(2)})


@pytest.fixture
def run(pristine, tmp_path) -> Path:
    """A checkpoints directory of one's own with steps 1 and 2."""
    return Path(shutil.copytree(pristine.parent, tmp_path / "run" / "checkpoints"))


def reseal(path: Path, change=lambda fields: None) -> None:
    """What an attacker can do too: hashes that fit the files as they are now."""
    fields = json.loads((path / "manifest.json").read_bytes())
    fields.pop("hash")
    for name in list(fields["files"]):
        if name.endswith(".json") and name.startswith("shard"):
            text = json.loads((path / name).read_bytes())
            binary = path / text["file"]
            if binary.is_file() and "/" not in text["file"]:
                text |= {"sha256": hashlib.sha256(binary.read_bytes()).hexdigest(), "size": binary.stat().st_size}
                (path / name).write_text(json.dumps(text))
    for name in fields["files"]:
        content = (path / name).read_bytes()
        fields["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    change(fields)
    (path / "manifest.json").write_bytes(manifest.seal(fields))


# ---- the format ----------------------------------------------------------------------------------------------------------------


def test_round_trip_is_exact_and_in_place(run):
    path = find(str(run.parent), run)
    assert path == find(str(run), run) == find("auto", run) == find(str(path), run) and path.name == "step_00000002"
    record = read_record(path)
    assert record == {"model": MODEL, "layout": {"tp": 1}, "step": 2, "sharding": "fully_reshardable", "ranks": 1}
    target = state(0.0, extra=None)
    kept = target["model"]["layer1"].data
    target["optimizer"]["groups"] = []  # the checkpoint's values count
    target["optimizer"].pop("groups")
    loaded = load(path, target)
    wanted = state(2.0)
    assert loaded["model"]["layer1"].data_ptr() == kept.data_ptr()
    for name in ("layer0", "layer1", "half", "empty"):
        assert torch.equal(loaded["model"][name], wanted["model"][name].data)
    assert torch.equal(loaded["optimizer"]["moment"], torch.full((6,), 2.0))
    groups = loaded["optimizer"]["groups"]
    assert groups[0]["betas"] == (0.9, 0.95) and groups[0]["step"] == 7 and torch.equal(groups[0]["seen"], torch.tensor(3))
    assert loaded["optimizer"]["here"] == "local" and torch.equal(loaded["model"]["extra"]["scale"], torch.ones(2))
    assert set(load(path, {"model": state(0.0)["model"]})) == {"model"}  # the weights alone


def test_small_values_keep_type_and_bits():
    values = [None, True, 3, 1e-320, 0.1 + 0.2, float("inf"), -0.0, "글", (1, [2, (3,)]), {1: "a", "~": 2}, torch.bfloat16, b"\x00\xff",
              torch.tensor([1.5, float("-inf")], dtype=torch.float16), torch.zeros(2, 0), torch.tensor(True), torch.Size([2, 3])]  # fmt: skip
    text = json.dumps(encode(values), allow_nan=False)
    for before, after in zip(values, decode(json.loads(text)), strict=True):
        assert type(before) is type(after)
        if isinstance(before, torch.Tensor):
            assert before.dtype == after.dtype and torch.equal(before, after)
        else:
            assert before == after and str(before) == str(after)
    assert decode(encode(io.BytesIO(b"x"))).getvalue() == b"x" and str(decode(encode(float("nan")))) == "nan"
    with pytest.raises(TypeError, match="random.Random"):
        encode({"a": [random.Random()]})


@pytest.mark.parametrize("shape", [(7,), (5, 3), (3, 4, 5), (2, 1, 3), ()])
def test_flat_ranges_are_boxes(shape):
    whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
    for start in range(whole.numel() + 1):
        for end in range(start, whole.numel() + 1):
            flat = [whole[tuple(slice(o, o + n) for o, n in zip(offset, extent))].reshape(-1) for offset, extent in flat_boxes(shape, start, end)]
            assert torch.equal(torch.cat([torch.empty(0, dtype=torch.long), *flat]), whole.reshape(-1)[start:end])
            assert len(flat) <= max(1, 2 * len(shape) - 1)


def test_reading_a_record_needs_no_torch(run):
    code = f"import sys, megatron_ext.checkpoint as c; print(c.read_record(c.find('auto', {str(run)!r}))['step'], 'torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == ["2", "False"]


# ---- saving --------------------------------------------------------------------------------------------------------------------


def test_background_save_is_a_snapshot_that_poll_finishes(tmp_path):
    log = Log()
    store = Checkpoints(tmp_path / "c", keep=2, background=True, sharding="fully_reshardable", events=log)
    sharded = state(3.0, size=400_000)
    store.save(1, sharded, {})
    sharded["model"]["layer0"].data.zero_()  # training goes on at once
    assert store.pending == 1 and store.newest() is None
    limit = time.monotonic() + 120
    while store.pending is not None and time.monotonic() < limit:
        store.poll()
        time.sleep(0.001)
    assert log.kinds() == ["save"] and log.entries[0][1]["step"] == 1 and log.entries[0][1]["hash"] == checkpoint_hash(store.newest())
    assert torch.equal(load(store.newest(), state(0.0, size=400_000))["model"]["layer0"], state(3.0, size=400_000)["model"]["layer0"].data)
    for step in (2, 3, 4):  # each finishes the one before; two stay
        store.save(step, state(step), {"parent": checkpoint_hash(store.newest())})
    store.wait()
    assert [path.name for path in manifest.steps(tmp_path / "c")] == ["step_00000003", "step_00000004"]
    # Going back to an earlier step: what was written last is the newest, and a step that exists is replaced.
    store.protect(tmp_path / "c" / "step_00000003")
    store.save(2, state(9.0), {}, background=False)
    assert store.newest().name == "step_00000002"
    store.save(2, state(10.0), {}, background=False)
    assert torch.equal(load(store.newest(), state(0.0))["optimizer"]["moment"], torch.full((6,), 10.0))
    store.save(7, state(9.0), {}, background=False)
    assert {path.name for path in manifest.steps(tmp_path / "c")} == {"step_00000002", "step_00000003", "step_00000007"}
    assert not manifest.leftovers(tmp_path / "c")
    store.close()


def test_leftovers_are_cleared_or_completed_at_the_start(run):
    (run / "step_00000003.tmp-dead-1").mkdir()
    (run / "step_00000003.tmp-dead-1" / "shard_00000.bin").write_bytes(b"half")
    shutil.copytree(run / "step_00000002", run / "step_00000004.tmp-dead-2")  # died between the manifest and the rename
    shutil.copytree(run / "step_00000002", run / "step_00000005.tmp-dead-3")
    (run / "step_00000005.tmp-dead-3" / "shard_00000.bin").write_bytes(b"bad")
    assert find("auto", run).name == "step_00000002"
    log = Log()
    Checkpoints(run, keep=0, background=True, sharding="fully_reshardable", events=log).close()
    assert sorted(path.name for path in run.iterdir()) == ["step_00000001", "step_00000002", "step_00000004"]
    verify(run / "step_00000004")
    assert log.kinds() == ["save_cleared"]


def failing(run: Path, harm, log: Log) -> Checkpoints:
    """Starts a save, harms it, and checks that it fails softly, leaves nothing and that the next one works."""
    before = {path.name for path in run.iterdir()}
    store = Checkpoints(run, keep=0, background=True, sharding="fully_reshardable", events=log)
    undo = harm(store)
    limit = time.monotonic() + 120
    while store.pending is not None and time.monotonic() < limit:
        store.poll()
        time.sleep(0.001)
    assert log.kinds()[-1] == "save_failed" and {path.name for path in run.iterdir()} == before
    with pytest.raises(UserError, match="last good checkpoint is .*step_00000002") as caught:
        store.wait()
    assert log.entries[-1][1]["reason"] in caught.value.reason
    if undo:
        undo()
    store.save(9, state(3.0), {})
    store.wait()
    assert store.newest().name == "step_00000009"
    shutil.rmtree(store.newest())
    store.close()
    return store


def test_killed_writer(run):
    log = Log()

    def kill(store):
        store.save(3, state(size=16_000_000), {})
        os.kill(store.writer_pid, signal.SIGKILL)

    failing(run, kill, log)
    assert "signal 9" in log.entries[-2][1]["reason"]


def test_full_disk(run, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.decode().strip()}")
    try:
        log = Log()
        directory = Path(shutil.copytree(run, small / "checkpoints"))
        failing(directory, lambda store: store.save(3, state(size=1_000_000), {}), log)
        assert "No space left" in log.entries[-2][1]["reason"]
        verify(directory / "step_00000002")
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_file_size_limit(run):
    log = Log()

    def limit(store):
        resource.prlimit(store.writer_pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        store.save(3, state(size=1_000_000), {})
        return lambda: resource.prlimit(store.writer_pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    failing(run, limit, log)
    assert "File too large" in log.entries[-2][1]["reason"]


def test_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="run.dir=.*cannot be written"):
        Checkpoints(tmp_path / "file" / "checkpoints", keep=1, background=True, sharding="fully_reshardable")
    with pytest.raises(UserError, match="checkpoint.format=zip"):
        Checkpoints(tmp_path, keep=1, background=True, sharding="zip")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:  # it may go while it is looked at
        return False


def test_killed_run_leaves_the_previous_checkpoint(run):
    """SIGKILL of the rank at random moments of a save; its writer dies with it and what is there loads."""
    code = f"""
import sys; sys.path[:0] = [{str(Path(__file__).parents[1])!r}, {str(Path(__file__).parent)!r}]
from test_checkpoint import *
store = Checkpoints({str(run)!r}, keep=2, background=True, sharding="fully_reshardable")
print(store.writer_pid, flush=True)
for step in range(3, 1000):
    store.save(step, state(step, size=400_000), {{}})
    print(step, flush=True)
"""
    wait = random.Random(0)
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.PIPE, text=True)
    writer = int(process.stdout.readline())
    for _ in range(4):
        process.stdout.readline()
    time.sleep(wait.random() * 0.05)
    process.kill()
    process.wait()
    limit = time.monotonic() + 60
    while alive(writer) and time.monotonic() < limit:
        time.sleep(0.01)
    newest = find("auto", run)
    verify(newest)
    step = read_record(newest)["step"]
    assert step >= 3
    loaded = load(newest, state(0.0, size=400_000))
    assert torch.equal(loaded["optimizer"]["moment"], torch.full((6,), float(step)))
    Checkpoints(run, keep=2, background=True, sharding="fully_reshardable").close()
    assert not manifest.leftovers(run)


# ---- refusing ------------------------------------------------------------------------------------------------------------------


def refused(path: Path, match: str) -> str:
    target = state(0.0)
    with pytest.raises(UserError, match=match) as caught:
        load(path, target, expect={"model": MODEL})
    assert caught.value.key == "checkpoint.load"
    assert torch.equal(target["optimizer"]["moment"].data, torch.zeros(6))  # nothing was changed
    return str(caught.value)


def test_one_flipped_byte_in_any_file(run):
    path = run / "step_00000002"
    draw = random.Random(1)
    for name in sorted(path.iterdir()):
        content = name.read_bytes()
        for _ in range(12):
            position, bit = draw.randrange(len(content)), 1 << draw.randrange(8)
            name.write_bytes(content[:position] + bytes([content[position] ^ bit]) + content[position + 1 :])
            message = refused(path, name.name.replace(".", r"\."))
            assert "step_00000001" in message and str(path) in message
            with pytest.raises(UserError):
                verify(path)
        name.write_bytes(content + b"\n")
        refused(path, name.name)
        name.unlink()
        refused(path, name.name)
        name.write_bytes(content)
    load(path, state(0.0))


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return builtins.open, (str(self.marker), "w")


def payloads(marker: Path) -> dict[str, bytes]:
    pickled, stream, legacy, tar = pickle.dumps(Payload(marker)), io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save(Payload(marker), stream)
    torch.save(Payload(marker), legacy, _use_new_zipfile_serialization=False)
    with tarfile.open(fileobj=tar, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("pickle"), io.BytesIO(b""))
    return {"pickle": pickled, "torch file": stream.getvalue(), "legacy torch file": legacy.getvalue(), "tar": tar.getvalue()}


def test_hostile_files_run_nothing(run, tmp_path):
    """Pickles in every place of a checkpoint, with hashes that fit: refused or plain bytes, and never executed."""
    path, marker = run / "step_00000002", tmp_path / "marker"
    pickle.loads(pickle.dumps(Payload(marker)))  # the payload works
    assert marker.exists()
    marker.unlink()
    pristine = {name.name: name.read_bytes() for name in path.iterdir()}

    def restore():
        for name in path.iterdir():
            name.unlink()
        for name, content in pristine.items():
            (path / name).write_bytes(content)

    for payload in payloads(marker).values():
        for name in ("manifest.json", "common.json", "shard_00000.json"):
            (path / name).write_bytes(payload)
            if name == "common.json":
                reseal(path)
            elif name != "manifest.json":
                fields = json.loads(pristine["manifest.json"])
                fields.pop("hash")
                fields["files"][name] = {"size": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}
                (path / "manifest.json").write_bytes(manifest.seal(fields))
            refused(path, f"{name} is not JSON")
            restore()
        binary = pristine["shard_00000.bin"]
        (path / "shard_00000.bin").write_bytes((payload + binary)[: len(binary)] if len(payload) < len(binary) else payload)
        reseal(path)
        if len(payload) <= len(binary):
            load(path, state(0.0))  # numbers, whatever they say
        restore()
        for name in (".metadata", "common.pt", "__0_0.distcp", "metadata.json"):  # what megatron-core and torch would unpickle
            (path / name).write_bytes(payload)
        reseal(path)
        load(path, state(0.0))
        restore()
        reseal(path, lambda fields, payload=payload: fields["files"].update({"common.pt": {"size": 1, "sha256": "0" * 64}}))
        refused(path, "lists a file that no checkpoint has")
        restore()
    assert not marker.exists()


def test_hostile_objects(run, tmp_path):
    """Byte strings for a layer that would unpickle them: a ShardedObject, at any depth, and a common value."""
    path, marker = run / "step_00000002", tmp_path / "marker"
    index = path / "shard_00000.json"
    original = index.read_bytes()
    for kind, payload in payloads(marker).items():
        for value in (payload, io.BytesIO(payload), {"a": [(payload,)]}, torch.frombuffer(bytearray(payload), dtype=torch.uint8)):
            with pytest.raises(Hostile, match="io.open|torch.load refuses|tar era"):
                inspect(value)
            text = json.loads(original)
            text["index"]["objects"]["mixer._extra_state/shard_0_1"] = encode(value)
            index.write_text(json.dumps(text))
            reseal(path)
            refused(path, "mixer._extra_state.*holds what no checkpoint holds")
        assert kind
    index.write_bytes(original)
    common = json.loads((path / "common.json").read_bytes())
    common["optimizer"]["blob"] = encode(payloads(marker)["pickle"])
    (path / "common.json").write_text(json.dumps(common))
    reseal(path)
    refused(path, "common.json holds what no checkpoint holds: a pickle that asks for")
    assert not marker.exists()
    fine = io.BytesIO()
    torch.save({"scale": torch.ones(3)}, fine)
    inspect([fine, pickle.dumps({"a": [1, (2.0, "x")]}), b"", b"plain", torch.arange(9, dtype=torch.uint8)])


def hostile_indexes():
    chunk = ("index", "tensors", "optimizer.moment")
    return [
        ("a path outside", ("file",), "../../etc/passwd"),
        ("an absolute path", ("file",), "/etc/passwd"),
        ("an unknown dtype", (*chunk, "dtype"), "object"),
        ("a dtype that is an attribute of torch", (*chunk, "dtype"), "load"),
        ("a negative shape", (*chunk, "shape"), [-6]),
        ("a huge shape", (*chunk, "shape"), [1 << 80]),
        ("a shape that is text", (*chunk, "shape"), "6"),
        ("more than its file", (*chunk, "chunks"), [[[0], [6], 1 << 40]]),
        ("an odd address", (*chunk, "chunks"), [[[0], [6], 3]]),
        ("outside its tensor", (*chunk, "chunks"), [[[3], [6], 0]]),
        ("a gap", (*chunk, "chunks"), [[[0], [3], 0]]),
        ("an overlap", (*chunk, "chunks"), [[[0], [3], 0], [[0], [3], 0]]),
        ("too few axes", (*chunk, "chunks"), [[[], [], 0]]),
        ("chunks that are none", (*chunk, "chunks"), None),
        ("no tensors", ("index", "tensors"), []),
        ("objects that are none", ("index", "objects"), [1]),
        ("an object of no type", ("index", "objects", "mixer._extra_state/shard_0_1"), {"~": "function", "v": 1}),
        ("a tensor that does not fit", ("index", "objects", "mixer._extra_state/shard_0_1"),
         {"~": "tensor", "v": {"dtype": "int64", "shape": [1 << 40], "data": ""}}),
    ]  # fmt: skip


def test_hostile_indexes(run):
    path = run / "step_00000002"
    index = path / "shard_00000.json"
    original = index.read_bytes()
    for what, keys, value in hostile_indexes():
        text = json.loads(original)
        functools.reduce(lambda place, key: place[key], keys[:-1], text)[keys[-1]] = value
        index.write_text(json.dumps(text))
        reseal(path)
        assert refused(path, "valid index|exactly once|overlap or leave gaps|no checkpoint holds"), what
    index.write_text("[" * 100_000)
    fields = json.loads((path / "manifest.json").read_bytes())
    fields.pop("hash")
    fields["files"][index.name] = {"size": 100_000, "sha256": hashlib.sha256(index.read_bytes()).hexdigest()}
    (path / "manifest.json").write_bytes(manifest.seal(fields))
    refused(path, "is not JSON")
    for name in ("../x", "/etc/passwd", "shard_00000.bin/../x", "shard_1.bin", "shard_00000.bin\n"):
        reseal_names(path, original, name)
        refused(path, "lists a file that no checkpoint has")


def reseal_names(path: Path, index: bytes, name: str) -> None:
    (path / "shard_00000.json").write_bytes(index)
    fields = json.loads((path / "manifest.json").read_bytes())
    fields.pop("hash")
    fields["files"] = {name: {"size": 1, "sha256": "0" * 64}, "common.json": fields["files"]["common.json"]}
    (path / "manifest.json").write_bytes(manifest.seal(fields))


def test_links_are_refused(run, tmp_path):
    path = run / "step_00000002"
    shutil.move(path / "common.json", tmp_path / "elsewhere")
    (path / "common.json").symlink_to(tmp_path / "elsewhere")
    refused(path, "common.json is missing or not a plain file")


def test_another_model_is_named(run):
    path = run / "step_00000002"
    with pytest.raises(UserError, match=r"another model: hidden_size: 8 / 16; num_layers: 2 / 3"):
        load(path, state(0.0), expect={"model": {"hidden_size": 16, "num_layers": 3}})
    with pytest.raises(UserError, match=r"layers.weight has shape \[2, 6, 4\], this run's \[2, 7, 4\]"):
        load(path, state(0.0, size=28))
    other = state(0.0)
    other["model"]["more"] = ShardedTensor.from_rank_offsets("more", torch.zeros(2), replica_id=0)
    with pytest.raises(UserError, match="more is not in it"):
        load(path, other)
    for load_from, message in (("nowhere", "no such directory"), (str(run.parent.parent), "holds no complete checkpoint")):
        with pytest.raises(UserError, match=message):
            find(load_from, run)
    (path / "manifest.json").unlink()
    with pytest.raises(UserError, match="did not finish; the newest other checkpoint is .*step_00000001"):
        find(str(path), run)
    assert find("auto", run).name == "step_00000001" and find(None, run) is None and find("auto", run / "none") is None


def test_padded_vocabulary_may_differ(tmp_path):
    def table(rows: int, padded: int) -> dict:
        weight = torch.zeros(padded, 2)
        weight[:rows] = 1.0
        return {"model": {"table": ShardedTensor.from_rank_offsets("table", weight, allow_shape_mismatch=True)}}

    store = Checkpoints(tmp_path, keep=0, background=False, sharding="fully_reshardable")
    store.save(1, table(5, 8), {})
    for padded in (6, 8, 12):
        filled = table(0, padded)
        filled["model"]["table"].data.fill_(7.0)
        assert torch.equal(load(store.newest(), filled)["model"]["table"], table(5, padded)["model"]["table"].data)
    store.close()


# ---- comparing -----------------------------------------------------------------------------------------------------------------


def test_compare(run, tmp_path, capsys):
    a, b = run / "step_00000001", run / "step_00000002"
    lines = compare(a, b)
    assert any("optimizer.moment: 6 of 6 differ, largest difference 1.000e+00" in line for line in lines)
    assert not any("empty" in line or "common" in line for line in lines)
    assert compare_main([str(a), str(a)]) == 0 and "identical" in capsys.readouterr().out
    assert compare_main([str(a), str(b)]) == 1 and "layers.weight" in capsys.readouterr().out
    assert compare_main([str(a), str(tmp_path / "none")]) == 2
    copy = saved(tmp_path / "copy", 5, 1.0, extra={"scale": torch.ones(2)})
    assert compare(a, copy) == [] and checkpoint_hash(a) != checkpoint_hash(copy)
