"""Patches of megatron-core that hold on every device."""
from megatron_ext.platform.patch import Patch


def _apply_adam():
    import megatron.core.optimizer as optimizer
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


PATCHES = (
    Patch("adam", "only an Adam that keeps `step` in the parameter group can be checkpointed by the distributed optimizer, and without "
          "Apex or Transformer Engine megatron-core takes torch's, which does not", _apply_adam, _probe_adam),
    Patch("no-global-pipeline", "layouts are values here and megatron-core's parallel_state stays empty, but finalize_model_grads (0.19) "
          "asks it for the pipeline size before it looks for routers to reduce", _apply_no_globals, _probe_no_globals),
)
