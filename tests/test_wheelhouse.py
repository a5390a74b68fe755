"""Installation without a network: the wheelhouse, made and installed with empty stand-ins for the packages; and the Apptainer recipe, as far as it
can be read without Apptainer."""
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from megatron_ext.cli.options import VERBS

ROOT = Path(__file__).resolve().parent.parent

# A build backend of a few lines: a wheel of the project that needs nothing from any index.
BACKEND = '''
import zipfile

def build_wheel(folder, config_settings=None, metadata_directory=None):
    name, info = "megatron_ext-0.1.0-py3-none-any.whl", "megatron_ext-0.1.0.dist-info"
    with zipfile.ZipFile(f"{folder}/{name}", "w") as wheel:
        wheel.writestr("megatron_ext_stand_in.py", "")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\\nName: megatron-ext\\nVersion: 0.1.0\\nRequires-Dist: torch\\nProvides-Extra: dev\\n"
                                           "Requires-Dist: tool-of-tests; extra == 'dev'\\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(f"{info}/RECORD", "")
    return name
'''


def stand_in(folder: Path, name: str, version: str) -> None:
    stem = f"{name.replace('-', '_')}-{version}"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """The real script in a project of empty packages; pip sees a folder of stand-ins and nothing else."""
    project = tmp_path_factory.mktemp("project")
    for name in ("slurm/wheelhouse", ".ci/environment"):
        (project / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, project / name)
    (project / "setup.py").write_text("")
    (project / "pyproject.toml").write_text('[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n')
    (project / "backend.py").write_text(BACKEND)
    index = project / "index"
    index.mkdir()
    torch = re.search(r"^torch=(.*)$", (ROOT / ".ci" / "environment").read_text(), re.MULTILINE)[1]
    for name, version in (("torch", torch), ("torch", f"{torch}+cpu"), ("tool-of-tests", "1.0"), ("pip", "25.0"), ("setuptools", "80.0"), ("wheel", "0.45")):
        stand_in(index, name, version)
    return project


def run(project: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", *words], cwd=project, capture_output=True, text=True, check=False, timeout=300, env={
        **{name: value for name, value in os.environ.items() if not name.startswith("PIP_")}, "PYTHON": sys.executable, "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(project / "index"), **environment})


def test_made_here_installed_there(project, tmp_path):
    made = run(project, "slurm/wheelhouse", str(tmp_path / "wheels"), DEVICE="cpu", EXTRAS="dev")
    assert made.returncode == 0, made.stderr
    lines = (tmp_path / "wheels" / "requirements.txt").read_text().splitlines()
    names = {line.split("==")[0] for line in lines}
    assert names == {"torch", "megatron-ext", "tool-of-tests", "pip", "setuptools", "wheel"} and all(" --hash=sha256:" in line for line in lines)
    assert [line for line in lines if line.startswith("torch==") and "+cpu" in line] and "6 wheels" in made.stdout

    # What is installed there comes from the folder alone: no index, no folder of ours.
    offline = {"PIP_FIND_LINKS": "", "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_NO_INDEX": "0"}
    (tmp_path / "wheels" / "requirements.txt").write_text("\n".join(line for line in lines if not line.startswith("pip==")) + "\n")  # the stand-in is no pip
    installed = run(project, str(tmp_path / "wheels" / "install.sh"), str(tmp_path / "venv"), **offline)
    assert installed.returncode == 0, installed.stderr
    found = subprocess.run([tmp_path / "venv/bin/python", "-c", "import importlib.metadata as m, megatron_ext_stand_in; print(m.version('torch'), m.version('tool-of-tests'))"],
                           capture_output=True, text=True, check=True)
    assert re.fullmatch(r"[\d.]+\+cpu 1\.0\n", found.stdout)

    # A file that was changed on the way is refused.
    wheel = next((tmp_path / "wheels").glob("tool_of_tests*"))
    wheel.write_bytes(wheel.read_bytes() + b"\0")
    refused = run(project, str(tmp_path / "wheels" / "install.sh"), str(tmp_path / "venv"), **offline, PIP_FORCE_REINSTALL="1")
    assert refused.returncode != 0 and "DO NOT MATCH THE HASHES" in refused.stderr


def test_the_build_for_cpus_is_no_answer_to_cuda(project, tmp_path):
    """Some indices have only that; the folder would be found useless where there is no network to mend it."""
    index = tmp_path / "index"
    shutil.copytree(project / "index", index, ignore=lambda folder, names: [name for name in names if name.startswith("torch-") and "+cpu" not in name])
    made = run(project, "slurm/wheelhouse", str(tmp_path / "wheels"), DEVICE="cuda", EXTRAS="", PIP_FIND_LINKS=str(index))
    assert made.returncode != 0 and "gives torch for CPUs alone" in made.stderr and not (tmp_path / "wheels" / "requirements.txt").exists()
    assert not list((tmp_path / "wheels").glob("tool_of_tests*"))  # EXTRAS="": none


def test_an_older_folder_is_not_mixed_with_a_new_one(project, tmp_path):
    stand_in(tmp_path, "torch", "1.0")
    made = run(project, "slurm/wheelhouse", str(tmp_path), DEVICE="cpu")
    assert made.returncode != 0 and "several versions of torch" in made.stderr


@pytest.mark.parametrize(("environment", "message"), [
    ({"DEVICE": "tpu"}, "DEVICE=tpu: cuda or cpu"), ({"EXTRAS": "dev; rm -rf /"}, "names of setup.py"), ({"PIP_FIND_LINKS": "/gone"}, "pip could not get everything"),
])
def test_bad_input(project, tmp_path, environment, message):
    refused = run(project, "slurm/wheelhouse", str(tmp_path / "wheels"), **environment)
    assert refused.returncode != 0 and message in refused.stderr


# ---- the recipe ----------------------------------------------------------------------------------------------------------------

RECIPE = (ROOT / "slurm" / "apptainer.def").read_text(encoding="utf-8")


def sections(recipe: str) -> tuple[dict[str, str], dict[str, str]]:
    """Header and sections, by Apptainer's grammar: `Key: value` lines, then `%name` at the beginning of a line and what is indented below."""
    head, *rest = re.split(r"^%", recipe, flags=re.MULTILINE)
    header = dict(line.split(": ", 1) for line in head.splitlines() if line.strip() and not line.startswith("#"))
    return header, {part.split("\n", 1)[0].strip(): part.split("\n", 1)[1] for part in rest}


def test_recipe():
    header, parts = sections(RECIPE)
    assert header == {"Bootstrap": "docker", "From": "{{ base }}"}
    assert set(parts) == {"arguments", "files", "post", "environment", "test", "runscript", "labels", "help"}
    known = {line.strip().split("=")[0] for line in parts["arguments"].splitlines() if line.strip()}
    assert {name.strip() for name in re.findall(r"\{\{(.*?)\}\}", RECIPE)} == known
    assert re.search(r"base=python:3\.1[123]\b", parts["arguments"])
    for name in ("post", "environment", "test", "runscript"):  # Apptainer runs them by /bin/sh
        done = subprocess.run(["sh", "-n"], input=parts[name], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    (files,) = [line.split() for line in parts["files"].splitlines() if line.strip()]
    assert files == ["wheelhouse", "/opt/wheelhouse"] and "bash /opt/wheelhouse/install.sh /opt/megatron_ext" in parts["post"]
    assert all(line.startswith("    ") for part in parts.values() for line in part.splitlines() if line.strip())


def test_what_the_recipe_runs_exists():
    _, parts = sections(RECIPE)
    commands = [line.split("-m megatron_ext ")[1].split() for line in parts["test"].splitlines() if line.strip()]
    assert commands[0] == ["--version"] and commands[1][0] in VERBS
    for words in commands:
        done = subprocess.run([sys.executable, "-m", "megatron_ext", *words], capture_output=True, text=True, check=False, cwd=ROOT, timeout=300)
        assert done.returncode == 0, done.stderr
