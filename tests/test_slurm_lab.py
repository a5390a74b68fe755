"""The lab itself, and what needs a real Slurm but no training: who tasks are, what they tell when one fails."""
import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_lab import REQUIRED, SCRIPTS, script
from test_failures import PROBE

from megatron_ext.parallel import slurm


def listening(pids: list[int]) -> set[tuple[str, int]]:
    """(address, port) of every listening TCP socket of these processes, IPv4 and IPv6, as the kernel has them."""
    sockets, found = set(), set()
    for fd in [fd for pid in pids for fd in Path(f"/proc/{pid}/fd").iterdir()]:
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile: a message that was answered
            sockets.add(os.readlink(fd))
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                address, port = fields[1].split(":")
                found.add((address, int(port, 16)))
    return found


def test_it_starts_stops_and_leaves_nothing(lab, tmp_path):
    """A second lab beside the session's: its own folder, ports and processes."""
    folder, hosts = tmp_path / "second", Path("/etc/hosts").read_bytes()
    settings = {"NODES": "2", "GPUS": "1"}
    try:
        first = script("start", folder=folder, **settings)
        assert first.returncode == 0 and "2 nodes are up" in first.stdout, first.stderr
        daemons = {path.name: path.read_text() for path in (folder / "run").glob("*.daemon")}
        opened = listening([int(record.split()[0]) for record in daemons.values()])
        assert len(opened) == 3 and {address for address, _ in opened} == {"0100007F"}  # 127.0.0.1: the controller and two nodes
        assert script("start", folder=folder, **settings).returncode == 0
        assert daemons == {path.name: path.read_text() for path in (folder / "run").glob("*.daemon")}  # what runs stays
        other = script("start", folder=folder, NODES="3")
        assert other.returncode == 1 and "runs with other settings" in other.stderr

        assert script("stop", "vn2", folder=folder).stdout == "slurm lab: vn2 crashed\n"
        assert script("stop", "vn2", folder=folder).returncode == 1
        assert script("start", folder=folder, **settings).returncode == 0
        again = {path.name: path.read_text() for path in (folder / "run").glob("*.daemon")}
        assert {name for name in daemons if daemons[name] != again[name]} == {"slurmd.vn2.daemon"}
    finally:
        stopped = script("stop", folder=folder)
    assert stopped.stdout.endswith("slurm lab: stopped\n") and not folder.exists()
    assert lab.processes(str(folder)) == []
    assert Path("/etc/hosts").read_bytes() == hosts
    assert script("stop", folder=folder).returncode == 0  # there is none


@pytest.mark.skipif(os.getuid() != 0 or REQUIRED, reason="looks at what start.sh says where it cannot: needs root, and a machine that may lack Slurm")
def test_why_it_cannot_be_started_is_said(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "uname", "id", "unshare", "true", "dirname"):
        (tools / name).symlink_to(subprocess.run(["which", name], capture_output=True, text=True, check=True).stdout.strip())
    done = subprocess.run([SCRIPTS / "start.sh"], env={"PATH": str(tools), "LAB": str(tmp_path / "lab"), "INSTALL": "no"}, capture_output=True, text=True,
                          check=False, timeout=20)
    assert done.returncode == 3 and "slurmctld slurmd slurm-client munge: not installed" in done.stderr and not (tmp_path / "lab").exists()


def test_node_lists_are_read_as_scontrol_reads_them(lab):
    for text in ("vn1", "vn[1-2]", "a[1-3,7],b,c[08-11]", "rack[1-2]n[1-3]", "gpu-[001-003,010]", "n[1,3-4],n9,m[2]", "x[9-11]", "n[0099-0101]"):
        assert slurm.hostnames(text) == lab.run("scontrol", "show", "hostnames", text).split()


TELL = """
import os, socket
from megatron_ext.parallel import slurm
slurm.adopt(os.environ)
print(*(os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")), socket.gethostname(),
      os.environ.get("CUDA_VISIBLE_DEVICES", "-"))
"""


def test_tasks_find_themselves_and_their_gpus(lab):
    done = lab.on_login_node("srun", "-N2", "--nodelist=vn2,vn3", "--ntasks-per-node=2", "--gpus-per-node=2", sys.executable, "-c", TELL)
    told = sorted(line.split() for line in done.stdout.splitlines())
    assert [line[:5] + line[6:] for line in told] == [[str(rank), str(rank % 2), "4", "2", "vn2", f"vn{2 + rank // 2}", "0,1"] for rank in range(4)], done.stderr
    assert len({line[5] for line in told}) == 1


@pytest.fixture(scope="module")
def probe(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp(f"probe{'x' * 100}") / "probe.py"  # a traceback of more than the 1 KiB that Slurm sends at once
    file.write_text(PROBE)
    return file


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_the_first_failure_is_told_once_and_first(lab, probe, tmp_path, launcher):
    """Under srun every other rank is ended by Slurm too; torchrun adds a table of its own after it."""
    run = tmp_path / "run"
    program = [sys.executable, probe, "raise_1", f"run.dir={run}"]
    if launcher == "torchrun":
        agent = (f'exec {sys.executable} -m torch.distributed.run --nnodes=2 --node-rank=$SLURM_NODEID --nproc-per-node=1 --master-addr=vn1 '
                 f'--master-port=$((20000 + SLURM_JOB_ID)) --max-restarts=0 "$@"')
        program = ["bash", "-c", agent, "torchrun", *program[1:]]
    done = lab.on_login_node("srun", "--nodelist=vn1,vn2", "-N2", "--ntasks-per-node=1", "--kill-on-bad-exit=1", *program)
    said = re.sub(r"(?m)^srun: .*\n|^slurmstepd.*\n", "", done.stderr)
    assert done.returncode != 0 and said.startswith("error: rank 1 of 2 (vn2) failed first:\nTraceback"), done.stderr
    assert done.stderr.count("KeyError: 'the true cause") == 1 and "closed by peer" not in done.stderr, done.stderr
    (life,) = (run / "failures").iterdir()
    assert re.fullmatch(r"\d+\.0", life.name) and (life / "code").read_text() == "1\n"
