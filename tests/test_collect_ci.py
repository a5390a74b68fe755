""".ci/browser, with commands of our own in front of the system's: installs Chromium where it is missing and it may, in time, and says why where it cannot."""
import os
import subprocess
from pathlib import Path

import pytest
from small import ROOT

TOOLS = ("bash", "timeout", "mktemp", "rm", "tail", "sleep", "chmod", "cat")
MADE = 'case "$*" in *install*) printf "#!/bin/bash\\n" >"$BIN/chromium"; chmod 755 "$BIN/chromium";; esac; echo noise'


def run(folder: Path, *, limit: str = "60", **commands: str) -> tuple[int, str, str]:
    """(exit code, what it said, what it complained of) on a machine that has TOOLS and these commands. limit: seconds for apt-get."""
    folder.mkdir()
    for tool in TOOLS:
        found = next(path for path in (Path("/usr/bin") / tool, Path("/bin") / tool) if path.exists())
        (folder / tool).symlink_to(found)
    for name, script in commands.items():
        (folder / name.replace("_", "-")).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name.replace("_", "-")).chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "CHROMIUM"} | {"PATH": str(folder), "BIN": str(folder), "LIMIT": limit}
    done = subprocess.run([ROOT / ".ci" / "browser"], env=environment, capture_output=True, text=True, check=False, timeout=120)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.skipif(not Path("/usr/bin/bash").exists(), reason="no bash in /usr/bin")
def test_a_browser_for_ci(tmp_path):
    assert run(tmp_path / "a", chromium="exit 0") == (0, "", "")  # it is there: silence
    code, said, complaint = run(tmp_path / "b", id="echo 1000")
    assert (code, said) == (1, "") and "needs root" in complaint
    code, said, complaint = run(tmp_path / "c", id="echo 0")
    assert (code, said) == (1, "") and "there is no apt-get here" in complaint
    code, said, complaint = run(tmp_path / "d", id="echo 0", apt_get=MADE)
    assert code == 0 and said.startswith("browser: installed chromium in ") and "noise" not in said and complaint == ""
    code, said, complaint = run(tmp_path / "e", id="echo 0", apt_get="echo 'E: no network'; exit 100")
    assert (code, said) == (1, "") and "E: no network" in complaint and "apt-get could not install it" in complaint
    code, said, complaint = run(tmp_path / "f", limit="1", id="echo 0", apt_get="sleep 100")
    assert (code, said) == (1, "") and "took more than 1 s" in complaint
