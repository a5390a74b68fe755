#!/usr/bin/env bash
# A real Slurm on this one machine: munged, slurmctld and NODES virtual nodes, to try the cluster path on a laptop and to test it.
#
#   sudo slurm/lab/start.sh              then: export SLURM_CONF=/tmp/megatron-ext-slurm/etc/slurm.conf; sinfo; sbatch ...
#   sudo slurm/lab/stop.sh vn2           crashes one node; start.sh brings it back
#   sudo slurm/lab/stop.sh               ends everything and removes the folder
#
# Environment: LAB (folder, default /tmp/megatron-ext-slurm), NODES (4), CPUS (4) and GPUS (4) a node, PORT (of the controller, the NODES after it;
# default: the first free ones from 14800), INSTALL (yes; no: missing packages are not installed), SLURMD_TIMEOUT (10: seconds until a silent node is
# taken for down).
# Exit status: 0 every node is up; 3 it cannot be started here, with the reason; 1 it failed.
#
# It listens on 127.0.0.1 only and writes nothing outside LAB, but for Debian's packages where they are missing. No systemd, no cgroups.
# Each daemon has a UTS and a mount namespace of its own: `hostname` on a node says vn1, and /etc/hosts there (alone) knows the nodes.
# Starting again is harmless: what runs stays, what is missing is started. Tried on Debian 12 (Slurm 22.05).
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
. "$here/lab.sh"
NODES=${NODES:-4} CPUS=${CPUS:-4} GPUS=${GPUS:-4} PORT=${PORT:-} INSTALL=${INSTALL:-yes}
MEMORY=4000  # MB a node says it has; nothing is limited
began=$SECONDS

cannot() { echo "slurm lab: cannot be started here: $*" >&2; exit 3; }
fail() { echo "slurm lab: error: $*" >&2; exit 1; }
retry() { # SECONDS COMMAND...
    local end=$((SECONDS + $1)); shift
    until "$@" >/dev/null 2>&1; do [ $SECONDS -lt $end ] || return 1; sleep 0.1; done
}
listens() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
free() { local i; for ((i = 0; i <= NODES; i++)); do ! listens $(($1 + i)) || return 1; done; }

# ---- whether it can be ---------------------------------------------------------------------------------------------------------
[ "$(uname)" = Linux ] || cannot "needs Linux"
[ "$(id -u)" = 0 ] || cannot "needs root"
unshare --uts --mount true 2>/dev/null || cannot "unshare --uts --mount is not permitted (CAP_SYS_ADMIN)"

missing=()
for tool in slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client munged:munge; do
    command -v "${tool%:*}" >/dev/null || missing+=("${tool#*:}")
done
if [ ${#missing[@]} -gt 0 ]; then
    [ "$INSTALL" = yes ] || cannot "${missing[*]}: not installed (slurm/lab/start.sh installs Debian's packages)"
    command -v apt-get >/dev/null || cannot "${missing[*]}: not installed, and there is no apt-get"
    log=$(mktemp)
    # The packages' init scripts would start daemons of their own; policy-rc.d is how Debian is told not to.
    policy=/usr/sbin/policy-rc.d
    if [ ! -e $policy ]; then trap 'rm -f "$policy"' EXIT; printf '#!/bin/sh\nexit 101\n' >$policy; chmod 755 $policy; fi
    status=0
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -q && apt-get install -y -q --no-install-recommends "${missing[@]}"; } >"$log" 2>&1 </dev/null || status=$?
    if [ -n "$(trap -p EXIT)" ]; then rm -f $policy; trap - EXIT; fi
    if [ $status != 0 ]; then tail -20 "$log" >&2; rm -f "$log"; fail "apt-get could not install ${missing[*]}"; fi
    rm -f "$log"
    echo "slurm lab: installed ${missing[*]}"
fi

mkdir -p "$LAB"
[ -O "$LAB" ] && [ ! -L "$LAB" ] || fail "LAB=$LAB belongs to somebody else"
LAB=$(cd "$LAB" && pwd)
exec 9>"$LAB/lock"; flock 9  # two starts at once take turns
mkdir -p "$LAB"/{etc,run,log,state,spool,dev,munge}
chmod 755 "$LAB" "$LAB/run"; chmod 700 "$LAB/munge"

# ---- configuration -------------------------------------------------------------------------------------------------------------
if [ -z "$PORT" ] && [ -s "$LAB/etc/slurm.conf" ]; then PORT=$(sed -n 's/^SlurmctldPort=//p' "$LAB/etc/slurm.conf"); fi
if [ -z "$PORT" ]; then PORT=14800; until free "$PORT"; do PORT=$((PORT + 100)); done; fi
nodes=(); for ((i = 1; i <= NODES; i++)); do nodes+=("$PREFIX$i"); done
export SLURM_CONF=$LAB/etc/slurm.conf
[ -s "$LAB/munge/key" ] || (umask 077; head -c 1024 /dev/urandom >"$LAB/munge/key")
: >"$LAB/etc/plugstack.conf"
version=$(slurmd -V | grep -oE '[0-9]+\.[0-9]+' | head -n 1)
if [ "${version/./}" -ge 2405 ]; then echo "CgroupPlugin=disabled" >"$LAB/etc/cgroup.conf"; fi  # before, nothing asks for cgroups with the plugins below

gres() { # slurmd counts a GPU only where File= is a character device: copies of /dev/null
    echo "AutoDetect=off"
    local device i
    for ((i = 0; i < GPUS; i++)); do
        device=$LAB/dev/nvidia$i
        [ -c "$device" ] || mknod "$device" c 1 3 || fail "mknod is not permitted; GPUS=0 starts nodes without fake GPUs"
        echo "Name=gpu File=$device"
    done
}

configuration() {
    cat <<CONF
ClusterName=lab
SlurmctldHost=${PREFIX}ctl(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it may start again (120 by default)
AuthInfo=socket=$LAB/run/munge.socket,cred_expire=10
# listen on what the host's own name resolves to, 127.0.0.1, instead of every address
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation=$LAB/state
SlurmdSpoolDir=$LAB/spool/%n
SlurmctldPidFile=$LAB/run/slurmctld.pid
SlurmdPidFile=$LAB/run/slurmd.%n.pid
SlurmctldLogFile=$LAB/log/slurmctld.log
SlurmdLogFile=$LAB/log/slurmd.%n.log
PlugStackConfig=$LAB/etc/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$LAB/log/jobs.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
SlurmctldTimeout=10
SlurmdTimeout=${SLURMD_TIMEOUT:-10}
InactiveLimit=0
KillWait=5
MinJobAge=3600
MessageTimeout=10
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=1
CONF
    local each="CPUs=$CPUS Boards=1 SocketsPerBoard=1 CoresPerSocket=$CPUS ThreadsPerCore=1 RealMemory=$MEMORY" i
    if [ "$GPUS" -gt 0 ]; then echo "GresTypes=gpu"; each+=" Gres=gpu:$GPUS"; fi
    for ((i = 1; i <= NODES; i++)); do echo "NodeName=$PREFIX$i NodeHostname=$PREFIX$i NodeAddr=127.0.0.1 Port=$((PORT + i)) $each"; done
    local all; all=$(IFS=,; echo "${nodes[*]}")
    echo "PartitionName=lab Nodes=$all Default=YES MaxTime=INFINITE DefaultTime=60 State=UP"
    echo "PartitionName=short Nodes=${PREFIX}1 MaxTime=5 State=UP"  # something to ask too much of
}

gres >"$LAB/etc/gres.conf.new"
configuration >"$LAB/etc/slurm.conf.new"
for file in gres.conf slurm.conf; do
    if cmp -s "$LAB/etc/$file" "$LAB/etc/$file.new"; then rm "$LAB/etc/$file.new"; continue; fi
    if runs slurmctld; then rm "$LAB"/etc/*.new; fail "the lab of $LAB runs with other settings; slurm/lab/stop.sh first"; fi
    mv "$LAB/etc/$file.new" "$LAB/etc/$file"
done
echo "127.0.0.1 localhost ${nodes[*]} ${PREFIX}ctl" >"$LAB/etc/hosts"
grep -v '^127\.0\.0\.1[[:space:]].*\blocalhost\b' /etc/hosts >>"$LAB/etc/hosts" || true

# ---- daemons -------------------------------------------------------------------------------------------------------------------
launch() { # NAME HOST COMMAND...: starts it in namespaces of its own, unless it runs
    local name=$1 host=$2; shift 2
    ! runs "$name" || return 0
    crash "$name" || true  # what a daemon that died has left of its node
    # setsid: it outlives this terminal. The record is complete when the daemon's name appears.
    setsid unshare --uts --mount bash -c '
        hostname "$1" && mount --bind "$2/etc/hosts" /etc/hosts || exit 1
        record=$2/run/$3.daemon; shift 3
        . "$LAB_FUNCTIONS"
        echo "$$ $(start_time $$) $(readlink /proc/$$/ns/uts)" >"$record.new" && mv "$record.new" "$record"
        exec "$@"' bash "$host" "$LAB" "$name" "$@" </dev/null >>"$LAB/log/$name.out" 2>&1 9>&- &
    retry 5 test -s "$LAB/run/$name.daemon" || { tail -5 "$LAB/log/$name.out" >&2; fail "$name did not start"; }
}
LAB_FUNCTIONS=$(cd "$here" && pwd)/lab.sh
export LAB_FUNCTIONS LAB

# --force: munged refuses a socket that only root can reach, and only root uses this one.
launch munged ${PREFIX}ctl munged -F --force --socket="$LAB/run/munge.socket" --key-file="$LAB/munge/key" --log-file="$LAB/munge/munged.log" \
    --pid-file="$LAB/munge/munged.pid" --seed-file="$LAB/munge/seed" --origin=127.0.0.1
retry 5 munge -S "$LAB/run/munge.socket" -n || { tail -5 "$LAB/log/munged.out" >&2; fail "munged does not answer"; }
launch slurmctld ${PREFIX}ctl slurmctld -D -f "$SLURM_CONF"
for node in "${nodes[@]}"; do
    mkdir -p "$LAB/spool/$node"
    launch "slurmd.$node" "$node" slurmd -D -N "$node" -f "$SLURM_CONF"
done

# ---- until every node is up ----------------------------------------------------------------------------------------------------
# A controller that comes back says "idle" before the nodes have answered.
for ((i = 0; i <= NODES; i++)); do
    retry 10 listens $((PORT + i)) || { tail -n 3 "$LAB"/log/* >&2; fail "nothing listens on port $((PORT + i))"; }
done
up() { [ "$(timeout 5 sinfo -h -p lab -N -o %T | grep -cxE 'idle|mixed|allocated|completing')" = "$NODES" ]; }
if ! retry 15 up; then
    timeout 5 scontrol update nodename="$(IFS=,; echo "${nodes[*]}")" state=resume >/dev/null 2>&1 || true  # down or drained in a former life
    retry 30 up || { timeout 5 sinfo -R >&2; tail -20 "$LAB/log/slurmctld.log" >&2; fail "the nodes did not come up"; }
fi
echo "slurm lab: $NODES nodes are up after $((SECONDS - began)) s; export SLURM_CONF=$SLURM_CONF"
