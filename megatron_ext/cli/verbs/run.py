"""`run`: the main job, on the embedded data unless told otherwise."""
import importlib

from megatron_ext.cli import recipe
from megatron_ext.cli.options import Options
from megatron_ext.config.schema import Config
from megatron_ext.parallel import launch

REPORT = "rlhf.chain_report:write"  # the front door is the one place that may name rooms above


def run(config: Config, options: Options) -> int:
    """The exit code of the step that failed, or 0. Raises UserError."""
    from megatron_ext.pipeline import Job, StepFailed

    def report(finished):
        module, function = REPORT.split(":")
        return getattr(importlib.import_module(module), function)(finished)

    launch.check_machine(config)
    try:
        Job(config, options.overrides, tuple(recipe.read()["prompts"]), report).run()
    except StepFailed as failed:
        return failed.code
    return 0
