"""Slurm's commands as small shell scripts on PATH: they print what a test says a cluster has, and write down what they are told."""
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from megatron_ext.submit import plan
from megatron_ext.submit.job import Job

CPU = ("cluster=slurm_cpu", "train.steps=20", "optim.warmup_steps=5", "checkpoint.every=5")
GPU = ("cluster=slurm_gpu", "cluster.partition=gpu", "cluster.account=nlp", "model=llama3_8b", "precision=bf16", "train.global_batch_size=384",
       "train.micro_batch_size=1")

PARTITIONS = """\
PartitionName=lab AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL AllocNodes=ALL Default=YES QoS=N/A DefaultTime=NONE MaxNodes=UNLIMITED \
MaxTime=UNLIMITED MinNodes=0 State=UP TotalCPUs=16 TotalNodes=4
PartitionName=gpu AllowGroups=ALL AllowAccounts=nlp,vision AllowQos=normal,long Default=NO DefaultTime=NONE MaxNodes=8 MaxTime=2-00:00:00 MinNodes=0 \
State=UP TotalCPUs=1024 TotalNodes=10
PartitionName=old AllowGroups=ALL AllowAccounts=ALL DenyAccounts=guests AllowQos=ALL Default=NO MaxNodes=4 MaxTime=08:00:00 MinNodes=2 State=DOWN
"""
NODES = {
    "lab": "3|4|4000|(null)|idle|(null)\n1|4|4000|(null)|down*|(null)\n",
    "gpu": "6|128|1000000|gpu:h100:8(S:0-1),nvme:1|mixed|ib,h100\n2|64|500000|gpu:a100:4|idle|ib\n2|128|1000000|gpu:h100:8|drained|ib,h100\n",
    "old": "4|8|32000|gpu:2|idle|(null)\n",
}
COMMANDS = {
    "scontrol": '''case "$*" in
"--oneliner show partition") cat "$FAKE/partitions" ;;
"show config") cat "$FAKE/config" ;;
"show hostnames "*) printf '%s\\n' "$3" | tr , '\\n' ;;
requeue*) echo "scontrol $*" >>"$FAKE/log"; exit "$(cat "$FAKE/requeue_code" 2>/dev/null || echo 0)" ;;
"show job --oneliner "*) echo "JobId=$4 ReqNodeList=(null) ExcNodeList=n7 Features=(null)" ;;
update*) echo "scontrol $*" >>"$FAKE/log" ;;
*) echo "scontrol: unknown $*" >&2; exit 1 ;;
esac''',
    "sinfo": '''for word; do case $word in --partition=*) cat "$FAKE/nodes_${word#--partition=}" ;; esac; done''',
    "sbatch": '''n=$(($(cat "$FAKE/number") + 1))
if [ -e "$FAKE/refuse_$n" ]; then cat "$FAKE/refuse_$n" >&2; exit 1; fi
echo "$n" >"$FAKE/number"
{ printf 'sbatch'; printf ' %s' "$@"; echo; } >>"$FAKE/log"
echo "$n;fake"''',
    "scancel": 'echo "scancel $*" >>"$FAKE/log"',
    "squeue": 'cat "$FAKE/state" 2>/dev/null || echo RUNNING None',
    "srun": '''{ printf 'srun'; printf ' %q' "$@"; echo; } >>"$FAKE/log"
exec bash "$FAKE/step"''',
}


@dataclass(frozen=True)
class FakeSlurm:
    """folder: what the commands read, and `log`, what they were told. bin: where they are."""

    folder: Path
    bin: Path

    @classmethod
    def make(cls, root: Path) -> "FakeSlurm":
        found = cls(root / "fake", root / "bin")
        found.folder.mkdir()
        found.bin.mkdir()
        for name, body in COMMANDS.items():
            (found.bin / name).write_text(f"#!/bin/bash\nFAKE={found.folder}\n{body}\n")
            (found.bin / name).chmod(0o755)
        found.say(partitions=PARTITIONS, config="Configuration data\nMaxArraySize            = 1001\nAccountingStorageEnforce = none\n", number="100\n", log="",
                  **{f"nodes_{name}": text for name, text in NODES.items()})
        return found

    def say(self, **files: str) -> None:
        for name, text in files.items():
            (self.folder / name).write_text(text)

    def log(self) -> list[str]:
        return (self.folder / "log").read_text().splitlines()

    def users(self, accounts: str, default: str = "") -> None:
        """Adds sacctmgr. accounts: lines of account|partition."""
        self.say(accounts=accounts, default=default)
        (self.bin / "sacctmgr").write_text(f'#!/bin/bash\ncase "$*" in *associations*) cat {self.folder}/accounts ;; *) cat {self.folder}/default ;; esac\n')
        (self.bin / "sacctmgr").chmod(0o755)


def jobs(*words: str, sweep: tuple[str, ...] = ()) -> tuple[Job, ...]:
    """What `submit WORDS --sweep SWEEP` would submit."""
    return plan.jobs(SimpleNamespace(overrides=words, sweeps=sweep))


def without(words: tuple[str, ...], given: tuple[str, ...]) -> list[str]:
    """`words`, but for the keys that `given` set."""
    keys = {word.partition("=")[0] for word in given}
    return [word for word in words if word.partition("=")[0] not in keys]


def sbatch_options(text: str) -> dict[str, str]:
    """The #SBATCH lines as sbatch reads them: up to the first line that is a command."""
    found = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            break
        if line.startswith("#SBATCH "):
            (word,) = shlex.split(line.removeprefix("#SBATCH "))
            name, _, value = word.removeprefix("--").partition("=")
            assert name not in found
            found[name] = value
    return found


def shell(text: str, *, tail: str, **environment: str) -> str:
    """What bash prints when it reads the settings of a script (all before the common part), then `tail`."""
    head = text.partition("# ---- the same in all scripts")[0]
    done = subprocess.run(["bash", "-c", head + tail], capture_output=True, text=True, check=True, timeout=20,
                          env={"PATH": os.environ["PATH"], **environment})
    return done.stdout


def life(fake: FakeSlurm, script: Path, step: str, *, signals: Sequence[str] = (), **environment: str) -> tuple[int, str, list[str]]:
    """Runs a script as Slurm would, with `step` in the place of what srun starts.

    Args:
        signals: sent to the script one after the other, each once the step has made $FAKE/there anew.

    Returns:
        The exit code, what was printed, and what Slurm was told (but for srun).
    """
    there = fake.folder / "there"
    there.unlink(missing_ok=True)
    fake.say(step=f"FAKE={fake.folder}\n{step}", log="")
    slurm = {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "n1,n2", "SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "0"}
    process = subprocess.Popen(["bash", str(script)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env={"PATH": os.environ["PATH"], **slurm, **environment})
    for name in signals:
        while not there.exists() and process.poll() is None:
            time.sleep(0.01)
        there.unlink(missing_ok=True)
        process.send_signal(getattr(signal, name))
    said = process.communicate(timeout=120)[0]
    return process.returncode, said, [line for line in fake.log() if not line.startswith("srun")]
