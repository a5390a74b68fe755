"""Slurm's commands as small shell scripts on PATH: they print what a test says a cluster has, and write down what they are told."""
from dataclasses import dataclass
from pathlib import Path

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
*) echo "scontrol: unknown $*" >&2; exit 1 ;;
esac''',
    "sinfo": '''for word; do case $word in --partition=*) cat "$FAKE/nodes_${word#--partition=}" ;; esac; done''',
    "sbatch": '''n=$(($(cat "$FAKE/number") + 1))
if [ -e "$FAKE/refuse_$n" ]; then cat "$FAKE/refuse_$n" >&2; exit 1; fi
echo "$n" >"$FAKE/number"
{ printf 'sbatch'; printf ' %s' "$@"; echo; } >>"$FAKE/log"
echo "$n;fake"''',
    "scancel": 'echo "scancel $*" >>"$FAKE/log"',
    "squeue": 'cat "$FAKE/state" 2>/dev/null || echo RUNNING',
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
