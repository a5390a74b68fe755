"""Patches of megatron-core that hold on every device."""
from contextlib import contextmanager

from megatron_ext.platform.patch import Patch


@contextmanager
def default_group(group):
    """Inside, a collective that names no group is one over `group`.

    megatron-core aligns the parameter groups of an optimizer over the whole world, without an argument to say otherwise; a layout that
    spans part of the world would wait there for ranks that never come.
    """
    import torch.distributed as dist

    gather, size = dist.all_gather_object, dist.get_world_size
    dist.all_gather_object = lambda objects, item, group_=None: gather(objects, item, group=group_ or group)
    dist.get_world_size = lambda group_=None: size(group_ or group)
    try:
        yield
    finally:
        dist.all_gather_object, dist.get_world_size = gather, size


def _apply_adam():
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    from kernels.adamw import AdamW

    optimizer.Adam = distrib_optimizer.Adam = AdamW
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
    if hasattr(distrib_optimizer, "USING_TE_OPTIMIZER"):
        distrib_optimizer.USING_TE_OPTIMIZER = False


def _probe_adam():
    from megatron.core.optimizer import distrib_optimizer

    from kernels.adamw import AdamW

    assert distrib_optimizer.Adam is AdamW and distrib_optimizer.USING_APEX_OPTIMIZER


def _apply_no_globals():
    from megatron.core import parallel_state

    parallel_state.set_pipeline_model_parallel_world_size(1)


def _probe_no_globals():
    from megatron.core import parallel_state

    assert parallel_state.get_pipeline_model_parallel_world_size() == 1


def _apply_memory_buffer():
    from megatron.core import parallel_state

    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()


def _probe_memory_buffer():
    import torch
    from megatron.core import parallel_state

    assert parallel_state.get_global_memory_buffer().get_tensor([2], torch.float32, "probe").numel() == 2


PATCHES = (
    Patch("adam", "only an Adam that keeps `step` in the parameter group can be checkpointed by the distributed optimizer, and without "
          "Apex or Transformer Engine megatron-core takes torch's, which does not", _apply_adam, _probe_adam),
    Patch("no-global-pipeline", "layouts are values here and megatron-core's parallel_state stays empty, but finalize_model_grads (0.19) "
          "asks it for the pipeline size before it looks for routers to reduce", _apply_no_globals, _probe_no_globals),
    Patch("memory-buffer", "sequence-parallel layers gather into a scratch buffer that only initialize_model_parallel makes; it knows of no "
          "layout", _apply_memory_buffer, _probe_memory_buffer),
)
