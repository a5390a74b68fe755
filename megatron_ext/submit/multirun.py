"""Hydra's own multirun, for scaling studies: each combination of values is a run, started by any of Hydra's launchers.

    python -m megatron_ext.submit.multirun --multirun model=tiny launch.ranks=1 train.global_batch_size=32,64 optim.lr=1e-3,3e-4
    python -m megatron_ext.submit.multirun --multirun hydra/launcher=submitit_slurm hydra.launcher.nodes=2 hydra.launcher.tasks_per_node=8 \\
        hydra.launcher.gpus_per_node=8 hydra.launcher.timeout_min=60 hydra.launcher.partition=gpu model=tiny optim.lr=1e-3,3e-4
    python -m megatron_ext.submit.multirun --multirun +sweep=scaling              (conf/sweep/scaling.yaml: a sweep that is kept in a file)

submitit_slurm comes with `pip install hydra-submitit-launcher`; nothing else here needs it. Values are written in Hydra's grammar. Each run is
the command `train` in hydra.sweep.dir; under submitit_slurm every task of the job is a rank. Such jobs are not told to save before their time
limit and do not queue again; what shall live longer than one job is an array of `submit --sweep`.
"""
import os
import subprocess
import sys
from collections.abc import Sequence

from megatron_ext.config.build import key_types
from megatron_ext.config.overrides import conf_dir
from megatron_ext.errors import UserError


def main(argv: Sequence[str] | None = None) -> None:
    """Hands the words to Hydra; keys that conf/ does not name are in the schema all the same. Raises UserError: run.dir, which each run has its own of."""
    import hydra

    words = list(sys.argv[1:] if argv is None else argv)
    for word in words:
        if word.lstrip("+").startswith("run.dir="):
            raise UserError("run.dir", word.partition("=")[2], "is a folder below hydra.sweep.dir for each run; set that")
    sys.argv[1:] = [f"++{word}" if word.partition("=")[0] in key_types() else word for word in words]
    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(run)()


def run(_: object) -> None:
    """One run, in a process of its own: the next one must find nothing of it. Raises CalledProcessError."""
    from hydra.core.hydra_config import HydraConfig

    found = HydraConfig.get()
    words = [word for word in found.overrides.task if not word.lstrip("+").startswith("sweep=")]  # its values are words of their own
    command = [sys.executable, "-m", "megatron_ext", "train", *words, f"run.dir={found.runtime.output_dir}", "checkpoint.load=auto"]
    subprocess.run(command, check=True, env={**os.environ, "HYDRA_FULL_ERROR": "1"})


if __name__ == "__main__":
    from megatron_ext.parallel.launch import guarded

    sys.exit(guarded(main))
