"""Process groups of a layout, as megatron-core's `ProcessGroupCollection`. megatron-core's `parallel_state` is left alone.

Only the members of a group take part in making it, so that layouts on disjoint ranks can be built at the same time.
"""
from dataclasses import fields

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_ext.parallel.layout import Layout
from megatron_ext.platform.process_groups import new_group

# Which axes of the [PP, DP, CP, TP] grid a group spans.
AXES = {
    "tp": "tp", "cp": "cp", "pp": "pp", "dp": "dp", "mp": "pp tp", "tp_cp": "cp tp", "dp_cp": "dp cp", "tp_dp_cp": "dp cp tp",
    # Experts are not spread here (no expert parallelism yet): their groups are those of the dense model.
    "expt_tp": "tp", "ep": "", "tp_ep": "tp", "tp_ep_pp": "pp tp", "expt_dp": "dp cp",
    "intra_dp_cp": "dp cp", "intra_expt_dp": "dp cp", "inter_dist_opt": "", "intra_dist_opt": "pp dp cp tp",
    # 0.19 only. One communicator for both directions of the distributed optimizer, one expert and one weight-sharding instance.
    "dp_cp_gtp_remat": "dp cp", "expt_dp_gtp_remat": "dp cp", "tp_ep_pp_with_egtp_remat": "pp tp",
}
ORDER = ("pp", "dp", "cp", "tp")


def build_groups(layout: Layout, timeout: float | None = None) -> ProcessGroupCollection:
    """The groups that this rank belongs to. Collective over `layout.ranks`. `timeout`: seconds that a collective may take.

    Embedding groups hold the first and the last pipeline stage (tied weights), position embeddings the first; they are None on the
    stages between, as megatron-core expects.
    """
    grid, me = layout.grid, dist.get_rank()
    where = dict(zip(ORDER, (int(i[0]) for i in (grid == me).nonzero())))
    known = {f.name for f in fields(ProcessGroupCollection)}
    made: dict[tuple, dist.ProcessGroup] = {}

    def group(ranks, kind=""):
        # Gradients travel beside activations: a communicator of their own lets the two overlap.
        key = (tuple(int(r) for r in ranks), kind)
        if key not in made:
            made[key] = new_group(*key, timeout)
        return made[key]

    collection = ProcessGroupCollection()
    for name, axes in AXES.items():
        if name in known:
            index = tuple(slice(None) if axis in axes.split() else where[axis] for axis in ORDER)
            setattr(collection, name, group(grid[index].reshape(-1), "data" if "dp" in axes else ""))
    pipeline = grid[:, where["dp"], where["cp"], where["tp"]]
    ends = sorted({int(pipeline[0]), int(pipeline[-1])})
    collection.embd = group(ends, "embedding") if me in ends else None
    collection.pos_embd = group(ends[:1], "embedding") if me == ends[0] else None
    return collection
