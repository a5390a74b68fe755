"""Caches of compiled kernels on the node's own disk, in jobs whose ranks share a home directory. No torch.

Triton, Inductor and the CUDA driver compile on first use and keep the result under the home directory (~/.triton/cache, ~/.nv) or in /tmp. On a
cluster the home is a network file system, where a thousand ranks that compile the same kernel at once meet "Stale file handle", "Device or resource
busy" and files that are renamed away under their readers (github.com/triton-lang/triton/issues/11512, github.com/pytorch/pytorch/issues/173679).
Each of these writes a file beside its place and renames it, which is safe on one node's own disk: so every node compiles once for its ranks.

What is loaded from such a cache is run, and /tmp is everybody's: a directory there counts only if it is ours and nobody else may write to it.
"""
import os
import stat
import tempfile
from collections.abc import Mapping, MutableMapping
from pathlib import Path

CACHES = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor", "CUDA_CACHE_PATH": "cuda"}


def shares_home(environment: Mapping[str, str]) -> bool:
    """Whether ranks of other nodes may use our home directory: under Slurm, or with more ranks than this machine's."""
    ranks, here = environment.get("WORLD_SIZE", "1"), environment.get("LOCAL_WORLD_SIZE", environment.get("WORLD_SIZE", "1"))
    return "SLURM_JOB_ID" in environment or ranks != here


def keep_local(environment: MutableMapping[str, str], root: Path | None = None) -> None:
    """Points the caches that nobody has placed to this node's disk, where `shares_home`. To be called before CUDA is.

    Args:
        root: a directory of this node; None = the system's for temporary files (TMPDIR, /tmp).
    """
    missing = [name for name in CACHES if not environment.get(name)]
    if not missing or not shares_home(environment):
        return
    try:
        ours = _private(Path(root or tempfile.gettempdir()))
        for name in missing:
            (ours / CACHES[name]).mkdir(mode=0o700, exist_ok=True)
            environment[name] = str(ours / CACHES[name])
    except OSError:  # no room there: the caches stay where they are
        return


def _private(root: Path) -> Path:
    """A directory in `root` that is ours alone. Raises OSError."""
    path = root / f"megatron_ext-{os.getuid()}"
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            return Path(tempfile.mkdtemp(prefix="megatron_ext-", dir=root))
    return path
