"""Patches of megatron-core that hold on every device."""
import sys
from contextlib import contextmanager
from importlib.machinery import PathFinder
from types import ModuleType

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


APEX_GEMM = "fused_weight_gradient_mlp_cuda"


def _apply_wgrad():
    from megatron.core.tensor_parallel import layers

    from kernels.wgrad_accumulate import wgrad_accumulate_

    def accumulate(x, dy, main_grad):
        wgrad_accumulate_(main_grad, dy, x)

    stand_in = ModuleType(APEX_GEMM, "Stands for Apex's extension, which megatron-core imports by this name: kernels/wgrad_accumulate.py")
    stand_in.wgrad_gemm_accum_fp32 = stand_in.wgrad_gemm_accum_fp16 = accumulate
    sys.modules[APEX_GEMM] = layers.fused_weight_gradient_mlp_cuda = stand_in
    layers._grad_accum_fusion_available = True


def _probe_wgrad():
    import torch
    from megatron.core.tensor_parallel import layers

    assert layers._grad_accum_fusion_available
    main_grad, x, dy = (torch.ones(shape, device=torch.cuda.current_device()) for shape in ((4, 3), (2, 3), (2, 4)))
    layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(x, dy, main_grad)
    assert bool((main_grad == 3).all())


PATCHES = (
    Patch("adam", "only an Adam that keeps `step` in the parameter group can be checkpointed by the distributed optimizer, and without "
          "Apex or Transformer Engine megatron-core takes torch's, which does not", _apply_adam, _probe_adam),
    Patch("no-global-pipeline", "layouts are values here and megatron-core's parallel_state stays empty, but finalize_model_grads (0.19) "
          "asks it for the pipeline size before it looks for routers to reduce", _apply_no_globals, _probe_no_globals),
    Patch("memory-buffer", "sequence-parallel layers gather into a scratch buffer that only initialize_model_parallel makes; it knows of no "
          "layout", _apply_memory_buffer, _probe_memory_buffer),
    # Where Apex's extension is found, megatron-core has what it needs.
    *((Patch("weight-gradient", "gradient_accumulation_fusion adds weight gradients straight into the main gradient with a GEMM of Apex's, and "
             "refuses to start without it", _apply_wgrad, _probe_wgrad),) if PathFinder.find_spec(APEX_GEMM) is None else ()),
)
