"""Two lanes for `pytest -n 2 --no-loadscope-reorder` (.ci/test): what starts ranks, one after the other, and beside it what is one process and waits for no clock.

Two tests with ranks at once spin against each other on two cores and run into their limits; one such test leaves a third of the machine idle. So the files
named here run in the other worker, which gives way (nice 19), file by file. A file that is not named is in the lane of the ranks: slower, never
wrong. Without -n there are no lanes.
"""
import contextlib
import functools
import os

RANKS = "ranks"
NAMES = """
    adamw adamw_triton attention autocast backend bias_gelu checks dynamic_shapes fp8 fp8_linear fused gae geglu grad_norm half_products layer_norm
    linear_cross_entropy linear_cross_entropy_memory linear_cross_entropy_registered rms_norm rope swiglu wgrad_accumulate
    chat_files chat_records chat_templates chat_tokens data_order data_read data_samples data_tokenizer
    collect_agreement collect_augment collect_build collect_ci collect_desk collect_endpoint collect_export collect_log collect_rights
    curate_build curate_decontaminate curate_duplicates curate_hostile curate_ingest curate_language_model curate_privacy curate_privacy_corpus curate_privacy_left
    curate_quality_rules curate_taxonomy
    config_compose config_rlhf config_validate presets schedule static_check
    encoder encoder_decoder evaluate generate generate_text last_layer models observe_flops
    convert convert_adapters convert_families convert_megatron convert_refusals plan plan_cli plan_trace record scaling
    rlhf_advantages rlhf_kl rlhf_policy_losses rlhf_preferences rlhf_report setup start_up
"""
BESIDE = frozenset(f"test_{name}.py" for name in NAMES.split())


ALONE = (  # tests of those files that start ranks, or look at a clock
    "test_gae.py::test_splitting_the_batch_over_ranks_changes_nothing", "test_grad_norm.py::test_the_ranks_agree_on_the_norm",
    "test_plan_trace.py::test_a_rank_of_530_billion_parameters_on_2240_is_planned_and_run_in_under_a_minute",
)


def lane(nodeid: str) -> str:
    """What of this test goes to one worker, in its order: the ranks, or the file."""
    path, _, test = nodeid.partition("::")
    file = path.rsplit("/", 1)[-1]
    return RANKS if file not in BESIDE or f"{file}::{test}" in ALONE else file


def pytest_xdist_make_scheduler(config, log):
    """xdist's own groups are marks, which xdist 3.8 reads in vain under pytest 9.2: every test was a group of its own, and no one said so."""
    from xdist.scheduler.loadscope import LoadScopeScheduling

    class Lanes(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return lane(nodeid)

    return Lanes(config, log)


def pytest_runtest_setup(item) -> None:
    if hasattr(item.config, "workerinput") and lane(item.nodeid) != RANKS:
        _give_way()  # for good: the lane of the ranks is one piece, given out first (--no-loadscope-reorder)


@functools.cache
def _give_way() -> None:
    """One thread, too: two that wait for one another, of which the ranks let one run now and then, spin away ten times the work."""
    import torch

    os.setpriority(os.PRIO_PROCESS, 0, 19)
    os.environ["OMP_NUM_THREADS"] = "1"  # of what is started or loaded from now on
    torch.set_num_threads(1)
    with contextlib.suppress(ImportError):  # NumPy's OpenBLAS
        import threadpoolctl

        threadpoolctl.threadpool_limits(1)
