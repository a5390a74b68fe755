# ---- a node check before the run, for a batch script: to be sourced, or pasted (`python -m megatron_ext.contact.hook` prints it) -----------
#
#   check_nodes "$run_dir" 3 srun --kill-on-bad-exit=0 python -m megatron_ext.contact.node_check --dir "$run_dir" --gpus 8
#
# goes on where the nodes are good. Where one falls short the job is requeued without it, at most that many lives of the job; else the script
# ends with 1. A script that requeues by itself calls `leave_out JOB DIR` right after `scontrol requeue`.

# Slurm changes the excluded nodes of pending jobs alone, so the job is requeued first. It cannot start again in between: it is still
# completing, and a requeued job waits for its credential to expire (two minutes by default).
leave_out() { # job, run directory: excludes what the last node check named, beside what was excluded before
    local bad before after shown try
    [ -s "$2/node_check.bad" ] || return 0
    bad=$(cat "$2/node_check.bad")
    [[ $bad =~ ^[A-Za-z0-9_.,-]+$ ]] || { echo "node check: $2/node_check.bad holds no list of nodes; nothing is excluded" >&2; return 1; }
    rm -f "$2/node_check.bad"
    for try in 1 2 3 4 5 6 7 8 9 10; do
        shown=" $(scontrol show job --oneliner "$1" 2>/dev/null) "
        before=$(sed -n 's/.* ExcNodeList=\([^ ]*\) .*/\1/p' <<<"$shown")
        [ "$before" = "(null)" ] && before=
        after=${before:+$before,}$bad
        if scontrol update JobId="$1" ExcNodeList="$after" 2>/dev/null; then
            echo "node check: job $1 will not run on $after again"
            return 0
        fi
        sleep 1
    done
    echo "node check: Slurm did not take ExcNodeList=$after for job $1; by hand: scontrol update JobId=$1 ExcNodeList=$after" >&2
    return 1
}

check_nodes() { # run directory, lives of the job, command...
    local dir=$1 lives=$2 status=0 job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    job=${job:-$SLURM_JOB_ID}
    shift 2
    rm -f "$dir/node_check.bad"
    "$@" || status=$?
    [ "$status" = 0 ] && return 0
    if [ ! -s "$dir/node_check.bad" ]; then
        echo "node check: ended with $status and names no node to leave out; the job ends" >&2
        exit "$status"
    fi
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "$lives" ]; then
        echo "node check: $(cat "$dir/node_check.bad") fall short, and $lives lives are used up; the job ends" >&2
        exit "$status"
    fi
    trap '' USR1 TERM # requeueing sends TERM; what comes behind it has to be done
    scontrol requeue "$job" || exit "$status"
    leave_out "$job" "$dir"
    exit 0
}
