# What start.sh, stop.sh and login.sh share. Sourced, not run. LAB is the folder of the lab: everything it has lies there.
LAB=${LAB:-${TMPDIR:-/tmp}/megatron-ext-slurm}
PREFIX=vn  # the nodes are vn1, vn2, ...

# A daemon is recorded as "pid, start time, UTS namespace" in run/NAME.daemon, so that no other process is ever taken for it.
# Everything on a virtual node lives in its UTS namespace: that is how a node, with the jobs on it, can be ended whole.
start_time() { local stat; stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1; set -- ${stat##*) }; [ "$1" != Z ] && echo "${20}"; }

recorded() { [ -s "$LAB/run/$1.daemon" ] && read -r pid started namespace <"$LAB/run/$1.daemon"; }  # sets pid, started, namespace

runs() { local pid started namespace; recorded "$1" && [ "$(start_time "$pid")" = "$started" ]; }

members() { # processes of the namespace $1, such as uts:[4026532193]; never those of our own
    [ "$1" != "$(readlink /proc/self/ns/uts)" ] || return 0
    local pattern=${1//[/\\[}; pattern=${pattern//]/\\]}
    find /proc/[0-9]*/ns/uts -maxdepth 0 -lname "$pattern" 2>/dev/null | cut -d/ -f3
}

crash() { # ends a daemon and everything in its namespace at once
    local pid started namespace member
    recorded "$1" || return 1
    for _ in 1 2; do # what was being forked meanwhile
        for member in $(members "$namespace"); do kill -KILL "$member" 2>/dev/null; done
    done
    rm -f "$LAB/run/$1.daemon"
}

daemons() { # of a kind, such as slurmd. or slurmctld
    local file
    for file in "$LAB/run/$1"*.daemon; do [ ! -e "$file" ] || basename "$file" .daemon; done
}
