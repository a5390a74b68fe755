"""Two lanes for `pytest -n 2 --dist loadgroup --no-loadscope-reorder` (.ci/test): what starts ranks, one after the other, and beside it what is one process and waits for no clock.

Two tests with ranks at once spin against each other on two cores and run into their limits; one such test leaves a third of the machine idle. So the files
named here run in the other worker, which gives way (nice 19), file by file. A test in them that starts ranks or looks at a clock has
`@pytest.mark.xdist_group("ranks")`. A file that is not named is in the lane of the ranks: slower, never wrong. Without xdist there are no lanes.
"""
import os

import pytest

RANKS = "ranks"
NAMES = """
    adamw adamw_triton attention autocast backend bias_gelu checks dynamic_shapes fp8 fp8_linear fused gae geglu grad_norm half_products layer_norm
    linear_cross_entropy linear_cross_entropy_memory linear_cross_entropy_registered rms_norm rope swiglu wgrad_accumulate
    chat_files chat_records chat_templates chat_tokens data_order data_read data_samples data_tokenizer
    config_compose config_rlhf config_validate presets schedule static_check
    encoder encoder_decoder evaluate generate generate_text last_layer models observe_flops
    convert convert_adapters convert_families convert_megatron convert_refusals harness_eval plan plan_cli plan_trace record scaling
    rlhf_advantages rlhf_kl rlhf_policy_losses rlhf_preferences rlhf_report start_up
"""
BESIDE = frozenset(f"test_{name}.py" for name in NAMES.split())


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config, items) -> None:
    if not hasattr(config, "workerinput"):
        return
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem if item.path.name in BESIDE else RANKS))


def pytest_runtest_setup(item) -> None:
    group = item.get_closest_marker("xdist_group")
    if hasattr(item.config, "workerinput") and group.args[0] != RANKS:
        os.setpriority(os.PRIO_PROCESS, 0, 19)  # for good: the lane of the ranks is one piece of work, given out first (its files come first: --no-loadscope-reorder)
