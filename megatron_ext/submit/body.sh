# ---- the same in all scripts --------------------------------------------------------------------------------------------------------
# A life of this job ends with
#    0     done
#    2     bad input: said once, never tried again
#    75    unfinished (EX_TEMPFAIL): told to stop by USR1 or TERM, the ranks finished their step and saved. Slurm runs this script again under the
#          same number, and checkpoint.load=auto goes on.
#    else  a crash; tried again from the newest checkpoint, until max_failures lives in a row have made no new one.
set -u
restarts=${SLURM_RESTART_COUNT:-0}
# Slurm takes the bare number of one of an array's points (SLURM_JOB_ID) for the whole array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
mkdir -p "$run_dir" || exit 2

say() { echo "job $job, life $((restarts + 1)), $(date +%FT%T): $*"; }

overdue="COMPLETING TimeLimit"
state() { squeue --noheader --jobs="$job" --format='%T %r'; }

newest() { # complete checkpoint, by its name
    local one last=none
    for one in "$run_dir"/checkpoints/step_*/manifest.json; do
        [[ $one =~ /(step_[0-9]+)/manifest\.json$ ]] && last=${BASH_REMATCH[1]}
    done
    echo "$last"
}

again() { # why, exit code where it is not requeued
    trap '' USR1 TERM
    if [ -z "$requeue" ]; then
        say "$1; not requeued (cluster.requeue=false), the same sbatch goes on from $(newest)"
        exit "$2"
    fi
    if ((restarts >= max_restarts)); then
        say "$1; not requeued: cluster.max_restarts=$max_restarts are used up"
        exit "$2"
    fi
    # A job that somebody cancelled, or that Slurm requeues by itself, is not RUNNING any more.
    local now
    now=$(state)
    case $now in
    RUNNING* | "$overdue") ;;
    *) say "$1; not requeued by this script: the job is ${now:-gone}"; exit "$2" ;;
    esac
    say "$1; requeued, the next life goes on from $(newest)"
    if scontrol requeue "$job"; then
        if declare -F leave_out >/dev/null; then leave_out "$job" "$run_dir"; fi
        exit 0
    fi
    say "Slurm refuses to requeue; the same sbatch goes on"
    exit "$2"
}

lost() { # counts the lives in a row that ended otherwise than they should and made no new checkpoint; prints their number
    local file=$run_dir/slurm-failures was=0 number='' at='' now
    now=$(newest)
    [ -r "$file" ] && read -r number was at <"$file"
    [ "$number" = "$job" ] && [ "$at" = "$now" ] || was=0
    echo "$job $((was + 1)) $now" >"$file"
    echo $((was + 1))
}

crashed() { # why, exit code
    local number
    number=$(lost)
    if ((number >= max_failures)); then
        say "$1; number $number in a row without a checkpoint after $(newest), not requeued (cluster.max_failures=$max_failures)"
        exit "$2"
    fi
    again "$1" "$2"
}

# srun and torchrun do not pass on what the first rank to end had to say; it leaves its exit code here (megatron_ext/parallel/failures.py).
# Ranks that saved and left say 0 to torchrun, which would take 75 for a crash.
told=$run_dir/failures/$SLURM_JOB_ID.$restarts/code
step=''
asked=''
repeating=''
stop() {
    if [ "$1" = TERM ] && [ "$(state)" = "$overdue" ]; then
        # This script is ended within KillWait, as are the ranks: no time to wait for them.
        [ -z "$step" ] || kill -USR1 "$step" 2>/dev/null
        crashed "the time limit was reached before the ranks had saved and left (a longer cluster.signal_lead gives them time)" 75
    fi
    asked=$1
    say "$1: telling the ranks to finish the step, save and stop"
    [ -n "$step" ] && kill -USR1 "$step" 2>/dev/null
    # Under torchrun, ranks that are still starting do not hear it; one that has heard it does not mind.
    if [ -n "$step" ] && [ -n "$deaf_at_first" ] && [ -z "$repeating" ]; then
        repeating=yes
        (trap - USR1 TERM; while sleep 10 && [ ! -e "$told" ] && kill -USR1 "$step" 2>/dev/null; do :; done) &
    fi
}
trap 'stop USR1' USR1
trap 'stop TERM' TERM

if ((restarts > max_restarts)); then
    say "not started: cluster.max_restarts=$max_restarts are used up"
    exit 1
fi
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts[0]}
# Ranks that srun starts choose their port by themselves (megatron_ext/parallel/slurm.py); torchrun is told one by the same rule: by the job's number, so
# that jobs that share a node differ, below the ports that the system gives out. One that somebody listens on is left out.
port=$((16384 + SLURM_JOB_ID % 1300 * 12 + 5 * restarts % 12))
while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done
say "${#hosts[@]} nodes (${hosts[0]} first), newest checkpoint: $(newest)"

nodes=0
for number in "${fits[@]}"; do ((number <= ${#hosts[@]})) && nodes=$number; done
if [ "$nodes" = 0 ]; then say "the layout fits ${fits[*]} nodes, not ${#hosts[@]}"; exit 2; fi
if [ "$nodes" -lt "${#hosts[@]}" ]; then say "the layout fits $nodes of the ${#hosts[@]} nodes; the others are idle"; fi

check
before
code=$?
if [ "$code" = 0 ] && [ -z "$asked" ]; then
    launch
    step=$!
    [ -z "$asked" ] || stop "$asked" # it came between the two
    # A signal ends `wait` early; the step's own exit code is what the last one says.
    wait "$step"
    while kill -0 "$step" 2>/dev/null; do wait "$step"; done
    wait "$step"
    code=$?
    [ -s "$told" ] && code=$(<"$told")
fi
# A node whose daemon has died goes on with this script while the job runs anew elsewhere (srun then says 0). That life is not this one's to end.
current=$(scontrol --oneliner show job "$job" 2>/dev/null | grep -o ' Restarts=[0-9]*')
if [ "${current:- Restarts=$restarts}" != " Restarts=$restarts" ]; then
    say "ended with exit code $code; the job has begun anew without it"
    exit "$code"
fi
case $code in
0) [ -n "$step" ] || again "told to stop before the ranks were started" 75
   say "done"; exit 0 ;;
2) say "bad input; not tried again"; exit 2 ;;
75) again "unfinished" 75 ;;
*) [ -z "$asked" ] || again "told to stop by $asked, ended with exit code $code" 75
   if [ -z "$requeue_on_failure" ]; then
       say "ended with exit code $code; not requeued (cluster.requeue_on_failure=false)"
       exit "$code"
   fi
   crashed "ended with exit code $code" "$code" ;;
esac
