"""The environment that TRL's PPO needs: its last release with a PPO trainer, the transformers of its day, and our torch. Made once and kept."""
import hashlib
import os
import subprocess
import sys
from pathlib import Path

PACKAGES = ("trl==0.21.0", "transformers==4.55.4")  # later releases of TRL have no PPO trainer
CPU_INDEX = os.environ.get("TORCH_CPU_INDEX", "https://download.pytorch.org/whl/cpu")


def ensure(folder: Path, *, torch_version: str) -> Path:
    """Its interpreter. Makes the environment where it is missing or another one; a broken attempt is made anew.

    Args:
        torch_version: ours, such as 2.13.0+cpu.
    Raises:
        RuntimeError: pip could not.
    """
    python, stamp = folder / "bin" / "python", folder / ".stamp"
    wanted = hashlib.sha256(" ".join((torch_version, sys.version, str(folder), *PACKAGES)).encode()).hexdigest()
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    print(f"making {folder} ({', '.join(PACKAGES)}, torch {torch_version}); a few minutes, once", file=sys.stderr)
    stamp.unlink(missing_ok=True)
    subprocess.run([sys._base_executable, "-m", "venv", "--clear", str(folder)], check=True)
    torch = f"torch=={torch_version}"
    tries = [[torch], [torch, "--extra-index-url", CPU_INDEX], [torch.partition("+")[0]]]
    if not any(_pip(python, *words, "--no-deps") for words in tries):
        raise RuntimeError(f"torch {torch_version} could not be installed in {folder}; pip's message is above")
    if not _pip(python, *PACKAGES, torch.partition("+")[0]):
        raise RuntimeError(f"{', '.join(PACKAGES)} could not be installed in {folder}; pip's message is above")
    stamp.write_text(wanted)
    return python


def _pip(python: Path, *words: str) -> bool:
    return subprocess.run([str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", *words], check=False).returncode == 0
