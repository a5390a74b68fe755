# ---- the same in all scripts of curation ---------------------------------------------------------------------------------------------
# An element of an array does tasks of one phase, each whole or not at all; what is done is not done again by the next life.
#    0     done
#    2     bad input: said once, never tried again
#    else  stopped before its time limit, or a crash: queued again under the same number
set -u
restarts=${SLURM_RESTART_COUNT:-0}
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

overdue="COMPLETING TimeLimit"
state() { squeue --noheader --jobs="$job" --format='%T %r'; }

say() { echo "job $job, life $((restarts + 1)), $(date +%FT%T): $*"; }

again() { # why, exit code where it is not requeued, lives
    trap '' USR1 TERM
    if [ -z "$requeue" ] || ((restarts >= $3)); then
        say "$1; not requeued, the same command goes on from what is done"
        exit "$2"
    fi
    # An element that somebody cancelled, or that Slurm requeues by itself, is not RUNNING any more.
    local now
    now=$(state)
    case $now in
    RUNNING* | "$overdue") ;;
    *) say "$1; not requeued by this script: the element is ${now:-gone}"; exit "$2" ;;
    esac
    say "$1; requeued"
    scontrol requeue "$job" && exit 0
    exit "$2"
}

asked=''
step=''
stop() {
    asked=$1
    [ -z "$step" ] || kill -TERM "$step" 2>/dev/null
}
trap 'stop USR1' USR1
trap 'stop TERM' TERM

launch &
step=$!
[ -z "$asked" ] || stop "$asked" # it came before
wait "$step"
while kill -0 "$step" 2>/dev/null; do wait "$step"; done
wait "$step"
code=$?
case $code in
0) say "done"; exit 0 ;;
2) say "bad input; not tried again"; exit 2 ;;
*) [ -z "$asked" ] || again "told to stop by $asked" 75 "$max_restarts"
   [ -n "$requeue_on_failure" ] || exit "$code"
   again "ended with exit code $code" "$code" "$((max_failures - 1))" ;;
esac
