#!/usr/bin/env bash
# Runs a command as on the lab's login node: slurm/lab/login.sh srun -N2 hostname
# Outside, sbatch and the like work with SLURM_CONF alone; srun and salloc listen for their tasks on the address of this machine's name, which
# here is 127.0.0.1.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lab.sh"
runs slurmctld && recorded slurmctld || { echo "slurm lab: error: none runs in $LAB; slurm/lab/start.sh" >&2; exit 1; }
export SLURM_CONF=$LAB/etc/slurm.conf
exec nsenter --target "$pid" --uts --mount sh -c 'cd "$1" && shift && exec "$@"' sh "$PWD" "$@"
