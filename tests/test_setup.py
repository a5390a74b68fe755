"""Set-up: the stamp, the choice of Python and of torch, failures; with empty stand-ins for what would be downloaded. And the wheel."""
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MINOR = f"{sys.version_info[0]}.{sys.version_info[1]}"

# A build backend of twenty lines: an editable install that needs nothing from any index.
BACKEND = '''
import zipfile

def build_editable(folder, config_settings=None, metadata_directory=None):
    name = "megatron_ext-0.1.0-py3-none-any.whl"
    info = "megatron_ext-0.1.0.dist-info"
    with zipfile.ZipFile(f"{folder}/{name}", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\\nName: megatron-ext\\nVersion: 0.1.0\\nRequires-Dist: megatron-core\\n"
                                           "Provides-Extra: dev\\nProvides-Extra: wandb\\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(f"{info}/RECORD", "")
    return name
'''


def stand_in(folder: Path, name: str, version: str) -> None:
    """An empty wheel."""
    stem = f"{name.replace('-', '_')}-{version}"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")


@pytest.fixture
def project(tmp_path):
    """A project with the real set-up script, empty packages, and an index of empty wheels; no network."""
    project = tmp_path / "project"
    (project / ".ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "environment", project / ".ci" / "environment")
    (project / "setup.py").write_text("# version 1\n")
    (project / "pyproject.toml").write_text('[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n')
    (project / "backend.py").write_text(BACKEND)
    for package in ("torch", "megatron/core", "hydra", "kernels", "megatron_ext"):
        (project / package).mkdir(parents=True)
        (project / package / "__init__.py").touch()
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    stand_in(wheels, "megatron-core", "0.16.1")
    return project


def setup(project: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", ".ci/environment", ".venv", *words], cwd=project, capture_output=True, text=True, check=False, timeout=300,
        env={"PATH": os.environ["PATH"], "HOME": str(project.parent), "PYTHON": sys.executable, "PIP_NO_INDEX": "1",
             "PIP_FIND_LINKS": str(project.parent / "wheels"), "PIP_CONFIG_FILE": os.devnull, "TORCH_CPU_INDEX": "http://127.0.0.1:9",
             **environment})


def test_stamp_is_written_last_and_spares_the_second_time(project):
    stand_in(project.parent / "wheels", "torch", "2.13.0+cpu")
    first = setup(project)
    assert first.returncode == 0, first.stderr
    assert "making .venv" in first.stdout and "CPU build\n" in first.stdout and "is ready after" in first.stdout
    assert "torch 2.13.0+cpu, megatron-core 0.16.1" in first.stdout

    start = sum(os.times()[2:4])  # processor seconds of children: a machine that stands still is not the script's
    again = setup(project)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "") and sum(os.times()[2:4]) - start < 3

    (project / "setup.py").write_text("# version 2\n")
    changed = setup(project)
    assert changed.returncode == 0 and "updating .venv" in changed.stdout

    (project / ".venv" / ".stamp").unlink()  # what an interrupted set-up leaves
    assert "updating .venv" in setup(project).stdout and (project / ".venv" / ".stamp").is_file()

    # The package of the same name that hides our folder.
    stand_in(project.parent / "wheels", "kernels", "0.10.0")
    subprocess.run([project / ".venv/bin/python", "-m", "pip", "install", "-qq", "--no-index", "--find-links", project.parent / "wheels",
                    "kernels"], check=True)
    (project / "setup.py").write_text("# version 3\n")
    collides = setup(project)
    assert collides.returncode == 1 and "pip uninstall kernels" in collides.stderr and not (project / ".venv" / ".stamp").exists()


def test_a_failed_installation_fails_and_leaves_no_stamp(project):
    done = setup(project)  # there is no torch in the index
    assert done.returncode == 1 and "setup: error: torch 2.13.0 could not be installed" in done.stderr and "No matching" in done.stderr
    assert "does not answer" in done.stdout and "3 GB to download" in done.stdout  # the size of the CUDA build is announced before
    assert not (project / ".venv" / ".stamp").exists()


def test_a_broken_shim_is_passed_over_for_pyenvs_versions(project):
    """pyenv's shims exist for versions that are not selected, and fail."""
    shims, version = project.parent / "shims", project.parent / ".pyenv" / "versions" / f"{MINOR}.99" / "bin"
    for folder, body in ((shims, "exit 127"), (version, f'exec "{sys.executable}" "$@"')):
        folder.mkdir(parents=True)
        names = [f"python{MINOR}"] if folder is shims else ["python"]
        for name in names:
            (folder / name).write_text(f"#!/bin/sh\n{body}\n")
            (folder / name).chmod(0o755)
    stand_in(project.parent / "wheels", "torch", "2.13.0+cpu")
    done = setup(project, MINOR, PYTHON="", PATH=f"{shims}:/usr/bin:/bin")
    assert done.returncode == 0, done.stderr
    assert f"with Python {MINOR}." in done.stdout


def test_no_such_python_is_status_3(project):
    done = setup(project, "3.99", PYTHON="")
    assert done.returncode == 3 and "no working Python 3.99 found" in done.stderr and not (project / ".venv").exists()
    wrong = setup(project, PYTHON="/bin/false")
    assert wrong.returncode == 3 and "PYTHON=/bin/false: does not run" in wrong.stderr


def test_wheel_carries_conf_and_runs(tmp_path):
    """An installed wheel has no checkout beside it."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("kernels", "megatron_ext", "rlhf", "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.py", source)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    assert {path.name for path in (tmp_path / "site").iterdir()} >= {"kernels", "megatron_ext", "rlhf"}
    assert not (tmp_path / "site" / "conf").exists()
    done = subprocess.run([sys.executable, "-m", "megatron_ext", "check", "model=gpt2_124m"], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path / "site")}, check=False)
    assert "124,439,808 parameters" in done.stdout, done.stderr


def test_set_up_and_packages_agree_on_torch():
    """The version that the script installs lies in the range of setup.py."""
    pinned = tuple(map(int, re.search(r"^torch=(\S+)", (ROOT / ".ci" / "environment").read_text(), re.MULTILINE)[1].split(".")))
    low, high = re.search(r"torch>=([\d.]+),<([\d.]+)", (ROOT / "setup.py").read_text()).groups()
    assert tuple(map(int, low.split("."))) <= pinned < tuple(map(int, high.split(".")))
