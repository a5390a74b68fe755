"""`run`: the main job, on the embedded data unless told otherwise."""
from megatron_ext.cli import recipe
from megatron_ext.cli.options import Options
from megatron_ext.config.schema import Config
from megatron_ext.parallel import launch


def run(config: Config, options: Options) -> int:
    """The exit code of the step that failed, or 0. Raises UserError."""
    from megatron_ext.pipeline import Job, StepFailed

    launch.check_machine(config)
    try:
        Job(config, options.overrides, tuple(recipe.read()["prompts"])).run()
    except StepFailed as failed:
        return failed.code
    return 0
