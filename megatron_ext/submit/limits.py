"""Whether the cluster has what is asked for: partition, nodes, cores, GPUs, time, account. Asked of Slurm, before submission. No torch."""
import getpass
import os
from collections.abc import Iterator

from megatron_ext.config.build import nearest
from megatron_ext.config.cluster import seconds, tasks_per_node
from megatron_ext.config.schema import ClusterConfig
from megatron_ext.errors import UserError
from megatron_ext.submit import slurm
from megatron_ext.submit.job import Job
from megatron_ext.submit.slurm import Nodes, Partition

ENFORCED = {"associations", "limits", "qos", "safe", "all", "wckeys"}  # values of AccountingStorageEnforce that ask for an account


def beyond(job: Job) -> tuple[list[UserError], list[str]]:
    """What the cluster does not have, and what it has not now. Raises UserError where Slurm is not there or does not answer."""
    if names := slurm.missing():
        raise UserError("PATH", ", ".join(names), "not found: submit from a login node of the cluster; --dry-run prints the script without Slurm")
    cluster, settings, notes = job.cluster, slurm.settings(), []
    known = slurm.partitions()
    try:
        partition = _chosen(cluster, known)
    except UserError as error:
        return [error], notes
    errors = [*_limits(cluster, partition), *_nodes(cluster, partition, slurm.nodes(partition.name), notes), *_account(cluster, partition, settings)]
    if job.array and len(job.runs) > (most := int(settings.get("MaxArraySize", "1001"))):
        errors.append(UserError("--sweep", len(job.runs), f"points are more than the {most} that an array may have here (MaxArraySize)"))
    return errors, notes


def _chosen(cluster: ClusterConfig, known: list[Partition]) -> Partition:
    names = [one.name for one in known]
    if cluster.partition is None:
        found = next((one for one in known if one.default), None)
        if found is None:
            raise UserError("cluster.partition", "null", f"this cluster has no default; it has {', '.join(names) or 'none that you may see'}")
        return found
    found = next((one for one in known if one.name == cluster.partition), None)
    if found is None:
        close = nearest(cluster.partition, names, count=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError("cluster.partition", cluster.partition, f"unknown here; {hint}this cluster has {', '.join(names) or 'none that you may see'}")
    return found


def _limits(cluster: ClusterConfig, partition: Partition) -> Iterator[UserError]:
    where = f"partition {partition.name}"
    if not partition.up:
        yield UserError("cluster.partition", partition.name, "takes no jobs now (its state is not UP)")
    fewest = cluster.min_nodes or cluster.nodes
    if fewest > partition.max_nodes:
        yield UserError("cluster.nodes", fewest, f"{where} gives a job at most {partition.max_nodes:g} nodes")
    if cluster.nodes < partition.min_nodes:
        yield UserError("cluster.nodes", cluster.nodes, f"{where} gives a job at least {partition.min_nodes} nodes")
    if seconds(cluster.time) > partition.max_time:
        yield UserError("cluster.time", cluster.time, f"is more than the {_clock(partition.max_time)} of {where}; ask for that, a job that is requeued "
                                                      "goes on")


def _nodes(cluster: ClusterConfig, partition: Partition, kinds: list[Nodes], notes: list[str]) -> Iterator[UserError]:
    """The first thing that too few nodes have."""
    where, wanted = f"partition {partition.name}", cluster.min_nodes or cluster.nodes
    cores = cluster.cpus_per_task * tasks_per_node(cluster)

    def count(fits) -> int:
        return sum(kind.count for kind in kinds if fits(kind))

    def gpus(kind: Nodes) -> int:
        return sum(kind.gpus.values()) if cluster.gpu_type is None else kind.gpus.get(cluster.gpu_type, 0)

    plain = cluster.constraint if cluster.constraint and not set("&|*[]()") & set(cluster.constraint) else None
    tests = [
        ("cluster.nodes", wanted, "nodes", lambda kind: True),
        ("cluster.constraint", plain, f"nodes with the feature {plain}", lambda kind: plain is None or plain in kind.features),
        ("cluster.gpus_per_node", cluster.gpus_per_node, f"nodes with {cluster.gpus_per_node} {cluster.gpu_type or ''} GPUs".replace("  ", " "),
         lambda kind: gpus(kind) >= cluster.gpus_per_node),
        ("cluster.cpus_per_task", cluster.cpus_per_task, f"nodes with {cores} cores ({tasks_per_node(cluster)} tasks of {cluster.cpus_per_task})",
         lambda kind: kind.cpus >= cores),
    ]
    fits = []
    for key, value, what, test in tests:
        fits.append(test)
        have = count(lambda kind: all(one(kind) for one in fits))
        if have < wanted:
            best = ""
            if key == "cluster.gpus_per_node" and (most := max(map(gpus, kinds), default=0)) < cluster.gpus_per_node:
                best = f"; its nodes have at most {most}"
            if key == "cluster.cpus_per_task" and (most := max((kind.cpus for kind in kinds), default=0)) < cores:
                best = f"; its nodes have at most {most} cores"
            yield UserError(key, value, f"{where} has {have} {what}, and {wanted} are asked for{best}")
            return
    up = count(lambda kind: kind.usable and all(one(kind) for one in fits))
    if up < wanted:
        notes.append(f"only {up} of the nodes of {where} that fit are up now: the job waits for {wanted}")


def _account(cluster: ClusterConfig, partition: Partition, settings: dict[str, str]) -> Iterator[UserError]:
    user, where = getpass.getuser(), f"partition {partition.name}"
    known = slurm.accounts(user)
    account = cluster.account or (known[1] if known else None)
    if account is None and partition.accounts is not None:
        yield UserError("cluster.account", "null", f"{where} is for {', '.join(partition.accounts)}: name one")
    elif account is not None and (partition.accounts is not None and account not in partition.accounts or account in partition.denied):
        whom = f"; it is for {', '.join(partition.accounts)}" if partition.accounts is not None else ""
        yield UserError("cluster.account", account, f"may not use {where}{whom}")
    elif known is not None and os.geteuid() and ENFORCED & set(settings.get("AccountingStorageEnforce", "").lower().split(",")):  # root needs none
        allowed = list(dict.fromkeys(name for name, only in known[0] if only in ("", partition.name)))
        if account is None or account not in allowed:
            yours = f"yours for {where}: {', '.join(allowed)}" if allowed else f"{user} has none for {where}"
            yield UserError("cluster.account", account or "null", f"this cluster charges every job to an account; {yours}")
    if cluster.qos is not None and partition.qos is not None and cluster.qos not in partition.qos:
        yield UserError("cluster.qos", cluster.qos, f"{where} takes {', '.join(partition.qos)}")


def _clock(length: float) -> str:
    days, rest = divmod(int(length), 86400)
    return (f"{days} days " if days else "") + f"{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
