"""A job as an sbatch script that stands alone: it can be read, kept, changed and submitted by hand. No torch.

Everything that comes from the configuration is quoted by shlex; nothing of it is evaluated. The part that is the same in all scripts is `body.sh`.
"""
import shlex
import sys
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path

from megatron_ext.config.cluster import tasks_per_node
from megatron_ext.config.schema import ClusterConfig, Config
from megatron_ext.contact import hook
from megatron_ext.submit import placement
from megatron_ext.submit.job import Job, Run

# Of the shell that submitted: a job that is submitted from inside a job, or from a rank, must not take them for its own.
FOREIGN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "MEGATRON_EXT_PARENT", "MEGATRON_EXT_FAILURES")
IGNORING = 'trap "" USR1 TERM; export PET_NODE_RANK="$SLURM_NODEID" PET_SIGNALS_TO_HANDLE=SIGINT; exec "$@"'


def script(job: Job) -> str:
    """The whole script."""
    again = f"sbatch {shlex.quote(str(job.script))}"
    parts = [["#!/bin/bash", f"# {job.name}: rendered by `python -m megatron_ext submit`; submit it again with: {again}"]]
    parts += [[f"# {line}" for line in placement.lines(job.config)]]
    parts += [[f"#SBATCH {option}" for option in options(job)]]
    parts += [settings(job), _runs(job), _command(job)]
    body = files("megatron_ext.submit").joinpath("body.sh").read_text(encoding="utf-8")
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n\n" + body


def submission(jobs: Sequence[Job]) -> str:
    """The scripts of a chain, submitted by hand: the same dependencies as a shell script."""
    lines = ["#!/bin/bash", "# The chain of stages: each starts when the runs that it reads have ended well, and is dropped when they cannot any more.",
             "set -euo pipefail"]
    for number, job in enumerate(jobs):
        after = ":".join(f"${{job_{[one.name for one in jobs].index(name)}%%;*}}" for name in job.after)
        held = f'--dependency="afterok:{after}" --kill-on-invalid-dep=yes ' if after else ""
        lines += [f"job_{number}=$(sbatch --parsable {held}{shlex.quote(str(job.script))})", f'echo {shlex.quote(job.name)} "${{job_{number}%%;*}}"']
    return "\n".join(lines) + "\n"


# ---- what Slurm reads ---------------------------------------------------------------------------------------------------------------

def options(job: Job) -> list[str]:
    """The options of sbatch, each quoted as its parser reads them."""
    cluster, tasks = job.cluster, tasks_per_node(job.cluster)
    a_task_a_node = cluster.launcher == "torchrun"
    ranged = cluster.min_nodes not in (None, cluster.nodes)
    values = {
        "job-name": job.name,
        "nodes": f"{cluster.min_nodes}-{cluster.nodes}" if ranged else cluster.nodes,
        # Tasks a node would be multiplied into a number of tasks at the first start, and a job that is requeued would wait for as many nodes again.
        "mincpus": cluster.cpus_per_task * tasks if ranged else None,
        "ntasks-per-node": None if ranged else 1 if a_task_a_node else tasks,
        "cpus-per-task": None if ranged else cluster.cpus_per_task * (tasks if a_task_a_node else 1),
        "gpus-per-node": ":".join([*([cluster.gpu_type] if cluster.gpu_type else []), str(cluster.gpus_per_node)]) if cluster.gpus_per_node else None,
        "mem": cluster.memory,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "time": cluster.time,
        "constraint": cluster.constraint,
        "exclude": cluster.exclude,
        "reservation": cluster.reservation,
        "comment": cluster.comment,
        "array": _indices(job) if job.array else None,
        "chdir": Path.cwd(),
        "output": _pattern(job),
        "open-mode": "append",
        "signal": f"B:USR1@{cluster.signal_lead}",
        "mail-type": "NONE",
    }
    flags = ["--requeue" if cluster.requeue else "--no-requeue", *(["--exclusive"] if cluster.exclusive else []), *cluster.options]
    return [f"--{name}={shlex.quote(str(value))}" for name, value in values.items() if value is not None] + [shlex.quote(flag) for flag in flags]


def _indices(job: Job) -> str:
    limit = job.cluster.array_limit
    return f"0-{len(job.runs) - 1}" + (f"%{limit}" if limit else "")


def _pattern(job: Job) -> str:
    folder = str(job.folder).replace("%", "%%")
    return f"{folder}/{'slurm-%A_%a.log' if job.array else 'slurm-%j.log'}"


# ---- what the script reads ----------------------------------------------------------------------------------------------------------

def settings(job: Job) -> list[str]:
    cluster = job.cluster
    lines = [
        f"max_restarts={cluster.max_restarts}",
        f"max_failures={cluster.max_failures}",
        f"fits=({' '.join(map(str, job.nodes))})",
        f"deaf_at_first={'yes' if cluster.launcher == 'torchrun' else ''}",
        f"requeue={'yes' if cluster.requeue else ''}",
        f"requeue_on_failure={'yes' if cluster.requeue and cluster.requeue_on_failure else ''}",
        f"unset {' '.join(FOREIGN)}",
    ]
    if cluster.modules:
        lines += ["type module >/dev/null 2>&1 || . /etc/profile.d/modules.sh 2>/dev/null || . /etc/profile.d/lmod.sh",
                  f"module load {shlex.join(cluster.modules)} || exit 2"]
    lines += [f"source {shlex.quote(file)} || exit 2" for file in cluster.source]
    for entry in cluster.env:
        name, _, value = entry.partition("=")
        lines.append(f"export {name}={shlex.quote(value)}")
    lines += [f"export OMP_NUM_THREADS={job.config.launch.threads or cluster.cpus_per_task}", "export PYTHONUNBUFFERED=1"]
    return lines


def _runs(job: Job) -> list[str]:
    if not job.array:
        return [*_run(job.runs[0])]
    lines = ['case "$SLURM_ARRAY_TASK_ID" in']
    for index, run in enumerate(job.runs):
        lines += [f"{index})", *(f"    {line}" for line in _run(run)), "    ;;"]
    return [*lines, '*) echo "no point $SLURM_ARRAY_TASK_ID in this sweep" >&2; exit 2 ;;', "esac"]


def _run(run: Run) -> list[str]:
    return [f"run_dir={shlex.quote(str(run.directory))}", "words=(", *(f"    {shlex.quote(word)}" for word in run.words), ")"]


def _command(job: Job) -> list[str]:
    """`before` (one process) and `launch` (all ranks, in the background), as shell functions."""
    cluster, tasks, config = job.cluster, tasks_per_node(job.cluster), job.config
    python = cluster.python or (sys.executable if cluster.container == "none" else "python")
    pyxis, inside = container(cluster, config, job)
    one = ["srun", "--nodes=1", "--ntasks=1", "--ntasks-per-node=1", f"--cpus-per-task={cluster.cpus_per_task * tasks}", *pyxis]
    lines = ["before() {"]
    lines += ["    " + shlex.join([*one, *inside, python, "-m", "megatron_ext", *command]) + " || return" for command in job.before] or ["    :"]
    lines += ["}", "", *_node_check(job, [*pyxis], [*inside, python, "-m", "megatron_ext.contact.node_check"]), "launch() {"]
    a_task_a_node = cluster.launcher == "torchrun"
    each = 1 if a_task_a_node else tasks
    # With a range of nodes Slurm's own count of tasks is that of the smallest number.
    lines += [f'    srun --nodes="$nodes" --relative=0 --ntasks=$((nodes * {each})) --ntasks-per-node={each} \\']
    ranks = [f"--cpus-per-task={cluster.cpus_per_task * (tasks if a_task_a_node else 1)}", "--distribution=block", "--kill-on-bad-exit=1", *pyxis]
    program = [*inside, python, "-m"]
    if a_task_a_node:
        # torchrun would die of USR1, and end its ranks at TERM; Slurm gives both to every process of a task, and the ranks alone have to hear them.
        lines += ["        " + shlex.join([*ranks, "bash", "-c", IGNORING, "torchrun", *program, "megatron_ext.parallel.torchrun"]) + " \\",
                  f'        --nnodes="$nodes" --nproc-per-node={tasks} --master-addr="$MASTER_ADDR" --master-port="$port" \\',
                  '        --max-restarts=0 -m megatron_ext train "${words[@]}" &']
    else:
        lines += ["        " + shlex.join([*ranks, *program, "megatron_ext", "train"]) + ' "${words[@]}" &']
    return [*lines, "}"]


def _node_check(job: Job, pyxis: list[str], program: list[str]) -> list[str]:
    """`check`: a node that falls short ends this life, and the next one does without it (megatron_ext/contact/hook.sh)."""
    cluster, tasks = job.cluster, tasks_per_node(job.cluster)
    if not cluster.node_check:
        return ["check() {", "    :", "}", ""]
    gpus = ["--gpus", str(cluster.gpus_per_node)] if cluster.gpus_per_node else ["--device", "cpu"]
    ranks = [f"--ntasks-per-node={tasks}", f"--cpus-per-task={cluster.cpus_per_task}", "--distribution=block", "--kill-on-bad-exit=0", *pyxis]
    return [*hook.text().rstrip().splitlines(), "", "check() {",
            f'    check_nodes "$run_dir" {cluster.max_restarts if cluster.requeue else 0} \\',
            f'        srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks=$((SLURM_JOB_NUM_NODES * {tasks})) {shlex.join(ranks)} \\',
            f'        {shlex.join([*program, *gpus])} --dir "$run_dir"', "}", ""]


def container(cluster: ClusterConfig, config: Config, job: Job) -> tuple[list[str], list[str]]:
    """Options of srun, and what stands before the program."""
    if cluster.container == "none":
        return [], []
    mounts = list(_mounts(cluster, job))
    if cluster.container == "pyxis":
        return [f"--container-image={cluster.image}", f"--container-mounts={','.join(mounts)}", f"--container-workdir={Path.cwd()}"], []
    gpus = ["--nv"] if cluster.gpus_per_node else []
    return [], ["apptainer", "exec", *gpus, *(f"--bind={mount}" for mount in mounts), f"--pwd={Path.cwd()}", cluster.image]


def _mounts(cluster: ClusterConfig, job: Job) -> Iterable[str]:
    given = [mount.split(":") for mount in cluster.mounts]
    yield from (":".join([source, *(rest or [source])]) for source, *rest in given)
    for path in dict.fromkeys([Path.cwd(), *(run.directory for run in job.runs)]):
        if not any(path.is_relative_to(rest[0] if rest else source) for source, *rest in given) and not (
                path != Path.cwd() and path.is_relative_to(Path.cwd())):
            yield f"{path}:{path}"
