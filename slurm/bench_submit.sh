#!/bin/bash
# Submits every benchmark: an array (one op an index, one GPU each), the collectives over whole nodes, and the merge of what they wrote.
#
#   slurm/bench_submit.sh [--partition=... --account=... any flags of sbatch]
#
# Environment: BENCH_OUTPUT (default benchmarks/results/slurm-<date>-<time>), BENCH_ARGS ("--quick"), BENCH_NODES and BENCH_GPUS (nodes and GPUs
# a node of the collectives: 1 and 8; BENCH_GPUS=0 asks for no GPU anywhere and runs two tasks a node), PYTHON. Prints the job numbers.
# The merge runs after the others have ended, well or not: one op that fails must not keep the results of the rest; its own exit code tells.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHON=${PYTHON:-.venv/bin/python} BENCH_OUTPUT=${BENCH_OUTPUT:-benchmarks/results/slurm-$(date +%Y%m%d-%H%M%S)} BENCH_ARGS=${BENCH_ARGS:-}
nodes=${BENCH_NODES:-1} gpus=${BENCH_GPUS:-8}
count=$("$PYTHON" benchmarks/run_all.py --list | wc -l)
one=(--gpus-per-node=1) all=(--gpus-per-node="$gpus" --ntasks-per-node="$gpus")
if [ "$gpus" = 0 ]; then one=(--gpus-per-node=0) all=(--gpus-per-node=0 --ntasks-per-node=2); fi
mkdir -p "$BENCH_OUTPUT"
array=$(sbatch --parsable "${one[@]}" --array="0-$((count - 1))" --output="$BENCH_OUTPUT/%a.log" "$@" slurm/bench.sbatch)
after=afterany:${array%%;*}
echo "ops          $array (0-$((count - 1)))"
if [ "$gpus" != 1 ] || [ "$nodes" -gt 1 ]; then
    ranks=$(BENCH_STEP=collectives sbatch --parsable --job-name=bench-collectives --nodes="$nodes" "${all[@]}" --output="$BENCH_OUTPUT/collectives.log" "$@" \
        slurm/bench.sbatch)
    after=$after:${ranks%%;*}
    echo "collectives  $ranks"
fi
merge=$(BENCH_STEP=merge sbatch --parsable --job-name=bench-merge --gpus-per-node=0 --time=00:10:00 --dependency="$after" \
    --output="$BENCH_OUTPUT/merge.log" "$@" slurm/bench.sbatch)
echo "merge        $merge -> $BENCH_OUTPUT/summary.md"
