"""What a cluster is asked for: numbers that follow from `cluster`, and what is wrong with it before anybody is asked. No torch.

Whether the cluster has what is asked for is looked at by `submit/limits.py`.
"""
import re
from collections.abc import Iterator
from dataclasses import replace

from megatron_ext.config import stages
from megatron_ext.config.placement import layout_key, placed
from megatron_ext.config.schema import ClusterConfig, Config
from megatron_ext.errors import UserError
from megatron_ext.redact import is_secret_key, redact_text

ENDLESS = ("unlimited", "infinite")
_TIME = re.compile(r"(?:(?P<days>\d+)-(?P<hours>\d+)(?::(?P<minutes>\d+)(?::(?P<seconds>\d+))?)?|(?:(?:(?P<h>\d+):)?(?P<m>\d+):)?(?P<last>\d+))$")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*$")
_OURS = ("array", "chdir", "cpus-per-task", "dependency", "error", "export-file", "gpus-per-node", "job-name", "kill-on-invalid-dep", "mail-type",
         "no-requeue", "nodes", "ntasks", "ntasks-per-node", "open-mode", "output", "parsable", "partition", "requeue", "signal", "time", "wait", "wrap")


def seconds(text: str) -> float:
    """A time limit as Slurm writes it, in seconds: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]], UNLIMITED.

    Raises ValueError.
    """
    if text.strip().lower() in ENDLESS:
        return float("inf")
    found = _TIME.match(text.strip())
    if found is None:
        raise ValueError(text)
    part = {name: int(value or 0) for name, value in found.groupdict().items()}
    if found["days"] is not None:
        return 86400 * part["days"] + 3600 * part["hours"] + 60 * part["minutes"] + part["seconds"]
    if found["m"] is None:
        return 60 * part["last"]
    return 3600 * part["h"] + 60 * part["m"] + part["last"]


def tasks_per_node(cluster: ClusterConfig) -> int:
    """Ranks a node."""
    return cluster.tasks_per_node or cluster.gpus_per_node or 1


def on_nodes(config: Config, nodes: int | None = None) -> Config:
    """`config` with as many ranks as `nodes` nodes hold; None = all of cluster.nodes."""
    ranks = (nodes or config.cluster.nodes) * tasks_per_node(config.cluster)
    return replace(config, launch=replace(config.launch, ranks=ranks))


# ---- rules, as `validate.py` says what a rule is -----------------------------------------------------------------------------------

def times_fit(config: Config) -> Iterator[UserError]:
    cluster = config.cluster
    try:
        limit = seconds(cluster.time)
    except ValueError:
        yield UserError("cluster.time", cluster.time, "is no time of Slurm's: minutes, hours:minutes:seconds or days-hours[:minutes[:seconds]], "
                                                      "such as 1-12")
        return
    if limit <= 0:
        yield UserError("cluster.time", cluster.time, "leaves no time to run")
    elif cluster.signal_lead >= limit:
        yield UserError("cluster.signal_lead", cluster.signal_lead, f"seconds before the end, of a job of {limit:g} seconds: leaves no time to train")


def nodes_fit(config: Config) -> Iterator[UserError]:
    cluster = config.cluster
    if cluster.min_nodes is not None and cluster.min_nodes > cluster.nodes:
        yield UserError("cluster.min_nodes", cluster.min_nodes, f"must be at most cluster.nodes={cluster.nodes}")
    if cluster.gpus_per_node and cluster.tasks_per_node not in (None, cluster.gpus_per_node):
        yield UserError("cluster.tasks_per_node", cluster.tasks_per_node, f"must be cluster.gpus_per_node={cluster.gpus_per_node}, one rank a GPU, "
                                                                          "or null")
    if cluster.gpu_type is not None and not cluster.gpus_per_node:
        yield UserError("cluster.gpu_type", cluster.gpu_type, "asks for no GPU without cluster.gpus_per_node")


def texts_are_lines(config: Config) -> Iterator[UserError]:
    for name, value in vars(config.cluster).items():
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and (not text.strip() or not text.isprintable()):
                yield UserError(f"cluster.{name}", repr(text), "must be one line of visible text; leave it out for the site's default")


def log_can_be_named(config: Config) -> Iterator[UserError]:
    if "\\" in config.run.dir or not config.run.dir.isprintable():
        yield UserError("run.dir", repr(config.run.dir), "the job's log lies there, and in the name of a log Slurm takes no backslash or invisible character")


def options_are_not_ours(config: Config) -> Iterator[UserError]:
    for option in config.cluster.options:
        name = option.partition("=")[0].removeprefix("--")
        if not re.match(r"--[a-z][a-z-]*(=|$)", option):
            yield UserError("cluster.options", option, "is no long option of sbatch, such as --switches=1")
        elif name in _OURS:
            yield UserError("cluster.options", option, "is set from the other keys of cluster")


def environment_is_named(config: Config) -> Iterator[UserError]:
    for entry in config.cluster.env:
        name, equals, _ = entry.partition("=")
        if not equals or not _NAME.match(name):
            yield UserError("cluster.env", redact_text(entry), "must be NAME=VALUE, such as NCCL_DEBUG=INFO")


def nothing_is_secret(config: Config) -> Iterator[UserError]:
    """The script and config.yaml can be read by others, and are kept."""
    for name, value in vars(config.cluster).items():
        for text in value if isinstance(value, tuple) else (value,):
            if not isinstance(text, str):
                continue
            variable = text.partition("=")[0] if name == "env" else None
            if redact_text(text) != text or variable is not None and is_secret_key(variable, environment=True):
                yield UserError(f"cluster.{name}", variable or redact_text(text),
                                "looks like a secret, and would stand in the script: export it before `submit`, sbatch passes the environment on")


def container_is_whole(config: Config) -> Iterator[UserError]:
    cluster = config.cluster
    if cluster.container == "none":
        for name in ("image", "mounts"):
            if value := getattr(cluster, name):
                shown = value if isinstance(value, str) else ",".join(value)
                yield UserError(f"cluster.{name}", shown, "needs cluster.container=pyxis or apptainer")
    elif cluster.image is None:
        yield UserError("cluster.image", "null", f"name the image that cluster.container={cluster.container} starts")
    for mount in cluster.mounts:
        source, _, rest = mount.partition(":")
        target, _, mode = rest.partition(":")
        if not source.startswith("/") or (rest and not target.startswith("/")) or mode not in ("", "ro", "rw") or "," in mount:
            yield UserError("cluster.mounts", mount, "must be SOURCE, SOURCE:TARGET or SOURCE:TARGET:ro, with absolute paths")


def tensor_parallel_stays(config: Config) -> Iterator[UserError]:
    """Tensor parallelism talks in every layer: its groups belong inside a node. Asked of every model on the ranks."""
    tasks = tasks_per_node(config.cluster)
    if config.cluster.cross_node_tp:
        return
    for role in stages.models(config):
        tp = placed(config, role).parallel.tp
        if tasks % tp:
            right = ", ".join(str(n) for n in range(1, tasks + 1) if tasks % n == 0)
            yield UserError(f"{layout_key(role)}.tp", tp, f"groups of tensor parallelism would reach over nodes of {tasks} ranks; what stays "
                                                          f"within: {right}. cluster.cross_node_tp=true allows it")


CLUSTER = (times_fit, nodes_fit, texts_are_lines, log_can_be_named, options_are_not_ours, environment_is_named, nothing_is_secret, container_is_whole, tensor_parallel_stays)
