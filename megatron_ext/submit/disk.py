"""Whether a run's directory can be written and holds what the run will save. No torch.

A checkpoint holds, for each trained parameter, the fp32 main weight and Adam's two moments (12 bytes), and the weight itself where it is kept in half
precision (2 bytes); a full disk is met while a new one is written beside the `checkpoint.keep` complete ones.
"""
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_ext.config import sizes, stages
from megatron_ext.config.schema import Config
from megatron_ext.errors import UserError
from megatron_ext.submit.job import Job, Run

MEBIBYTE = 1 << 20
# Of /proc/mounts: file systems that other nodes can see.
SHARED = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cephfs", "fuse.ceph", "glusterfs", "fuse.glusterfs", "wekafs", "panfs",
          "pvfs2", "orangefs", "afs", "9p", "virtiofs", "cifs", "smb3", "daos", "fuse.juicefs", "fuse.sshfs")


def checkpoint_bytes(config: Config) -> int:
    """Of one checkpoint, about: what the configuration alone tells. A critic and an average of the weights are models more."""
    vocab = sizes.padded_vocabulary(sizes.vocab_size(config), config.model.vocab_multiple, config.parallel.tp)
    model = sizes.parameters(config.model, vocab)
    half = 0 if config.precision.dtype == "fp32" else 2
    if config.lora.rank:
        return model * (half or 4)  # the base once; adapters are small beside it
    whole = model * (12 + half)
    if stages.has_critic(config):
        whole *= 2
    return whole + (4 * model if config.ppo.ema and config.stage.name in stages.ONLINE else 0)


def needed(run: Run) -> int:
    """Bytes that the run will still write: as many checkpoints as are kept at once and one in the making, less those that are there."""
    kept = run.config.checkpoint.keep or 1  # all: at least one
    there = len(list((run.directory / "checkpoints").glob("step_*/manifest.json")))
    return checkpoint_bytes(run.config) * max(1, kept + 1 - there)


def problems(jobs: Sequence[Job]) -> Iterator[UserError]:
    """Directories that cannot be written, or do not hold all that the jobs will write there. Nothing that was not there stays behind."""
    disks: dict[int, list[tuple[Path, Run]]] = {}
    for run in (run for job in jobs for run in job.runs):
        folder = existing(run.directory)
        try:
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(b"x")
                probe.flush()
        except OSError as error:
            yield UserError("run.dir", run.config.run.dir, f"cannot be written ({folder}: {error.strerror})")
            continue
        disks.setdefault(folder.stat().st_dev, []).append((folder, run))
    for held in disks.values():
        (folder, first), many = held[0], len(held)
        free, want = free_bytes(folder), sum(needed(run) for _, run in held)
        if free < want:
            one = f"{first.config.checkpoint.keep or 'all'} checkpoints of about {size(checkpoint_bytes(first.config))}, and one in the making"
            yield UserError("run.dir", first.config.run.dir, f"has {size(free)} free, and {f'{many} runs' if many > 1 else 'the run'} will hold up to "
                                                             f"{size(want)}: {'the first ' if many > 1 else ''}{one}")


def notes(job: Job) -> Iterator[str]:
    """What works and may surprise."""
    folder = existing(job.folder)
    kind = file_system(folder)
    if job.cluster.nodes > 1 and kind is not None and kind not in SHARED:
        yield f"{job.folder} lies on {kind}: every node has to see the same directory there"
    if job.config.checkpoint.every == 0:
        yield "checkpoint.every=0: a crash or a lost node loses all steps since the last stop"


def existing(path: Path) -> Path:
    """The nearest directory above that is there."""
    return next(one for one in (path, *path.parents) if one.is_dir())


def free_bytes(folder: Path) -> int:
    """What this user may still write there; quotas that the file system does not tell are not seen."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def file_system(folder: Path) -> str | None:
    """Its type, such as ext4; None where the system does not say."""
    best, kind = -1, None
    try:
        mounts = Path("/proc/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in mounts:
        point = Path(line.split()[1].replace("\\040", " "))
        if folder.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), line.split()[2]
    return kind


def size(number: int) -> str:
    """Bytes for people."""
    value, unit = float(number), "bytes"
    for bigger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, bigger
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
