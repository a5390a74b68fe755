"""Many processes at once on one file system: prepared data, splits of Megatron files, caches of compiled kernels. Each ends with one good result."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.data import subset
from megatron_ext.platform import caches

ROOT = Path(__file__).resolve().parent.parent

# What is slow to import is imported once; eight forks of it then meet at a gate before they begin, and again before they publish.
RACE = '''
import hashlib, json, multiprocessing, sys, sysconfig
from pathlib import Path
from megatron_ext.config.schema import DataConfig
from megatron_ext.data import build, prepare
from megatron_ext.data.mcore import indexed_dataset

indexed_dataset()
library, cache = sys.argv[1:]
sysconfig.get_path = lambda name, *rest: library
data = DataConfig(vocab_size=300, cache=cache, workers=1, split=(0.5, 0.25, 0.25), sequence_length=8)
fork = multiprocessing.get_context("fork")
begin, ready, answers = fork.Barrier(8), fork.Barrier(8), fork.SimpleQueue()
publish = prepare.publish

def together(made, output):
    ready.wait(300)
    return publish(made, output)

prepare.publish = together

def one():
    begin.wait(300)
    try:
        build.ensure_prepared(data, progress=False)
        samples = build.build_datasets(data, ("train",))["train"]
        answers.put([samples[k].tokens.tolist() for k in range(4)])
    except BaseException as error:
        answers.put(repr(error))

ranks = [fork.Process(target=one) for _ in range(8)]
for rank in ranks:
    rank.start()
said = [answers.get() for _ in ranks]
for rank in ranks:
    rank.join()
print(json.dumps(said))
'''


def test_eight_processes_prepare_the_same_corpus(tmp_path):
    library, cache = tmp_path / "library", tmp_path / "cache"
    library.mkdir()
    for number in range(12):
        (library / f"module{number}.py").write_text(f'"""Module {number}."""\n' + f"def f{number}(a, b):\n    return a + {number} * b\n" * 20)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", RACE, str(library), str(cache)], capture_output=True, text=True, check=False, timeout=400,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout)
    assert len(said) == 8 and all(isinstance(each, list) and each == said[0] for each in said), said
    (made,) = cache.iterdir()  # one directory, and nothing of the seven others
    assert (made / "prepared.json").is_file() and not made.name.startswith(".")


def test_ranks_of_two_nodes_with_one_process_id_split_a_file(tmp_path, monkeypatch):
    """The node's name and process id are no name of their own: containers share the first, nodes that booted alike the second."""
    monkeypatch.setattr(os, "getpid", lambda: 4711)
    path, codes = tmp_path / "splits" / "x.npy", np.arange(100, dtype=np.uint8)
    names = []
    save = np.save

    def saving(stream, *arguments, **settings):
        names.append(stream.name)
        if len(names) == 1:  # in the middle of our write another rank begins and ends its own
            subset._write(path, codes)
        save(stream, *arguments, **settings)

    monkeypatch.setattr(subset.np, "save", saving)
    subset._write(path, codes)
    assert len(set(names)) == 2 and (np.load(path) == codes).all()
    assert [file.name for file in path.parent.iterdir()] == ["x.npy"]


@pytest.mark.parametrize(("environment", "moved"), [
    ({}, False), ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}, False), ({"WORLD_SIZE": "8"}, False),
    ({"SLURM_JOB_ID": "7"}, True), ({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, True),
])
def test_compiled_kernels_go_to_the_nodes_own_disk_in_cluster_jobs(tmp_path, environment, moved):
    before = dict(environment)
    caches.keep_local(environment, tmp_path)
    if not moved:
        assert environment == before and not list(tmp_path.iterdir())
        return
    folder = tmp_path / f"megatron_ext-{os.getuid()}"
    assert environment == before | {"TRITON_CACHE_DIR": str(folder / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
                                    "CUDA_CACHE_PATH": str(folder / "cuda")}
    assert folder.stat().st_mode & 0o777 == 0o700
    again = dict(before)
    caches.keep_local(again, tmp_path)
    assert again == environment  # the next rank shares it


def test_caches_that_somebody_placed_stay(tmp_path):
    environment = {"SLURM_JOB_ID": "7", "TRITON_CACHE_DIR": "/scratch/triton"}
    caches.keep_local(environment, tmp_path)
    assert environment["TRITON_CACHE_DIR"] == "/scratch/triton" and environment["CUDA_CACHE_PATH"].startswith(str(tmp_path))


@pytest.mark.parametrize("planted", ["open", "link", "file"])
def test_nothing_is_loaded_from_a_directory_that_others_may_write_to(tmp_path, planted):
    place = tmp_path / f"megatron_ext-{os.getuid()}"
    if planted == "open":
        place.mkdir()
        place.chmod(0o777)
    elif planted == "link":
        (tmp_path / "theirs").mkdir()
        place.symlink_to(tmp_path / "theirs")
    else:
        place.touch()
    environment = {"SLURM_JOB_ID": "7"}
    caches.keep_local(environment, tmp_path)
    used = Path(environment["TRITON_CACHE_DIR"]).parent
    assert used != place and used.parent == tmp_path and used.stat().st_mode & 0o777 == 0o700
    assert planted == "file" or not list(place.iterdir())


def test_no_room_for_caches(tmp_path):
    environment = {"SLURM_JOB_ID": "7"}
    caches.keep_local(environment, tmp_path / "gone")
    assert environment == {"SLURM_JOB_ID": "7"}
