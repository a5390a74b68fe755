#!/usr/bin/env bash
# Ends the lab that start.sh started: cancels its jobs, ends its daemons and whatever jobs have left on the nodes, removes LAB.
#
#   slurm/lab/stop.sh            everything; nothing is left but Debian's packages
#   slurm/lab/stop.sh vn2 ...    these nodes crash: SIGKILL to the daemon and every process on them, at once; start.sh brings them back
#
# Environment: LAB (default /tmp/megatron-ext-slurm). Only processes that start.sh has recorded, and those in their namespaces, are touched.
set -uo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lab.sh"
export SLURM_CONF=$LAB/etc/slurm.conf
[ -d "$LAB/run" ] || { echo "slurm lab: there is none in $LAB"; exit 0; }

if [ $# -gt 0 ]; then
    for node in "$@"; do
        runs "slurmd.$node" && crash "slurmd.$node" || { echo "slurm lab: error: no node $node runs in $LAB" >&2; exit 1; }
        echo "slurm lab: $node crashed"
    done
    exit 0
fi

if runs slurmctld; then # in good order first, so that jobs can clean up
    timeout 5 squeue -h -o %A 2>/dev/null | sort -u | xargs -r timeout 10 scancel 2>/dev/null
    for _ in $(seq 40); do [ -n "$(timeout 5 squeue -h 2>/dev/null)" ] || break; sleep 0.25; done
fi
for name in $(daemons slurmd.) $(daemons slurmctld) $(daemons munged); do
    if runs "$name" && recorded "$name"; then
        kill -TERM "$pid"
        for _ in $(seq 40); do runs "$name" || break; sleep 0.1; done
    fi
    crash "$name"
done
rm -rf "$LAB"
echo "slurm lab: stopped"
