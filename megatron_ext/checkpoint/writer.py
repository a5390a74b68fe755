"""The process that writes: files, hashes, fsync, the manifest, the rename and the removal of old checkpoints.

It is a plain interpreter started once a rank (`python -m megatron_ext.checkpoint.writer`), standard library only: no fork of a
process that holds a CUDA context, registered network memory and threads, and an out-of-memory kill or a full disk hits it and
not the training. Tensor bytes arrive in memory shared with the rank (`staging.py`); jobs and answers are JSON lines on its
standard input and output. Two jobs make a save: every rank's `write`, then, when all have agreed, rank 0's `commit`.
"""
import ctypes
import hashlib
import json
import mmap
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from megatron_ext.checkpoint import manifest as m


def write(job: dict, memory: memoryview) -> dict:
    """`<name>.bin` from shared memory (hashed on the way) and `<name>.json`, both durable. Answers their total size."""
    directory = Path(job["directory"])
    directory.mkdir(parents=True, exist_ok=True)  # the first rank to come makes it
    digest, size = hashlib.sha256(), job["size"]
    binary, index = (m.shard_name(job["rank"], kind) for kind in ("bin", "json"))
    with open(directory / binary, "xb", buffering=0) as file:
        for start in range(0, size, m.BLOCK):
            block = memory[start : min(start + m.BLOCK, size)]
            digest.update(block)
            while block:  # an unbuffered write may be short, for instance just before the disk is full
                block = block[file.write(block) :]
        os.fsync(file.fileno())
    head = json.dumps({"file": binary, "size": size, "sha256": digest.hexdigest()})
    text = f'{head[:-1]}, "index": {job["index"]}}}'
    durable(directory / index, text.encode())
    if job["common"] is not None:
        durable(directory / m.COMMON, job["common"].encode())
    return {"bytes": size + len(text)}


def commit(job: dict) -> dict:
    """The manifest over all ranks' files, then the rename that makes the checkpoint exist, then the removal of old ones."""
    directory = Path(job["directory"])
    files, shards = {}, []
    for rank in range(job["ranks"]):
        name = m.shard_name(rank, "json")
        content = (directory / name).read_bytes()
        shard = m.read_shard(directory, name, content)
        files[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        files[shard["file"]] = {"size": shard["size"], "sha256": shard["sha256"]}
        if (size := (directory / shard["file"]).stat().st_size) != shard["size"]:
            raise OSError(f"{shard['file']} has {size} bytes instead of {shard['size']}")
        shards.append(shard)
    m.covered(directory, shards)
    content = (directory / m.COMMON).read_bytes()
    files[m.COMMON] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    fields = {"format": m.FORMAT, "version": m.VERSION, "written": time.time(), "record": job["record"], "files": files}
    sealed = m.seal(fields)
    durable(directory / m.MANIFEST, sealed)
    m.sync_directory(directory)
    final = place(directory)
    try:
        retain(final.parent, keep=job["keep"], protect={final, *map(Path, job["protect"])})
    except OSError as error:  # the checkpoint is good all the same
        print(f"checkpoints: an old one could not be removed: {error}", file=sys.stderr, flush=True)
    return {"bytes": sum(entry["size"] for entry in files.values()) + len(sealed), "hash": json.loads(sealed)["hash"]}


def place(directory: Path) -> Path:
    """Renames a complete temporary directory to its final name. One of the same step is moved aside first; dying in between, the
    new one is complete and `recover` puts it in place at the next start."""
    final = m.final_name(directory)
    if final.exists():
        aside = directory.with_name(f"{directory.name}-old")
        (final / m.MANIFEST).unlink(missing_ok=True)  # no longer complete, so that `recover` cannot take the old for the new
        os.rename(final, aside)
        os.rename(directory, final)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        os.rename(directory, final)
    m.sync_directory(final.parent)
    return final


def recover(directory: Path) -> list[str]:
    """Clears what dead saves left: complete ones whose rename did not happen are put in place, the others removed. Their names."""
    cleared = []
    for path in m.leftovers(directory):
        cleared.append(path.name)
        if (path / m.MANIFEST).is_file() and not (m.final_name(path) / m.MANIFEST).is_file():
            try:
                m.verify(path)
                place(path)
                continue
            except (m.UserError, OSError):
                pass
        shutil.rmtree(path, ignore_errors=True)
    return cleared


def retain(directory: Path, *, keep: int, protect: set[Path]) -> None:
    """Removes all but the `keep` newest (0: all stay) and the protected. Each is renamed first: what remains of a removal that is
    interrupted is cleared at the next start."""
    names = {path.name for path in protect}
    for path in m.steps(directory)[:-keep] if keep else []:
        if path.name not in names:
            doomed = path.with_name(f"{path.name}.tmp-removed")
            shutil.rmtree(doomed, ignore_errors=True)
            os.rename(path, doomed)
            (doomed / m.MANIFEST).unlink()
            shutil.rmtree(doomed, ignore_errors=True)


def durable(path: Path, content: bytes) -> None:
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def discard(job: dict) -> dict:
    shutil.rmtree(job["directory"], ignore_errors=True)
    return {}


def serve(memory: int) -> None:
    """Answers jobs until standard input closes. `memory`: descriptor of the shared memory."""
    shared = memoryview(b"")
    for line in sys.stdin:
        job = json.loads(line)
        try:
            if job["do"] == "write":
                if job["size"] > len(shared):  # the rank has made it longer
                    shared = memoryview(mmap.mmap(memory, job["size"], prot=mmap.PROT_READ))
                answer = write(job, shared)
            else:
                answer = {"commit": commit, "discard": discard}[job["do"]](job)
        except (OSError, ValueError, MemoryError, m.UserError) as error:
            answer = {"error": error.reason if isinstance(error, m.UserError) else f"{type(error).__name__}: {error}"}
        try:
            print(json.dumps(answer), flush=True)
        except BrokenPipeError:  # the rank is gone
            return


def main() -> None:
    # Slurm gives a signal to every process of a task. The rank decides: a preempted run still makes its last save.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a file-size limit is an error to report, not a death
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: no orphan writes into the next run's directory
        if os.getppid() != int(sys.argv[2]):  # the rank died before the line above
            return
    os.nice(10)  # training first where cores are short
    serve(int(sys.argv[1]))


if __name__ == "__main__":
    main()
