"""Weights & Biases: written to disk by default where it is installed (`log.wandb=auto`), streamed or off by config, never required.

wandb is imported when the first run starts. That it is missing then is the user's to mend; anything that goes wrong with it later is
warned of once and does not touch the training.
"""
import dataclasses
import os
import warnings
from pathlib import Path

from megatron_ext.config.schema import LogConfig
from megatron_ext.errors import UserError


class Tracker:
    """Sends metrics to wandb, or does nothing (`log.wandb=disabled`), so that the loop needs no `if`.

    Args:
        log: mode and project. run_dir: wandb's files go there; its name is the run's name.
        config: a dataclass or dictionary, shown with the run. run_id: the same id continues the same run after a resume.

    Raises:
        UserError: wandb is asked for and not installed, or the mode is unknown.
    """

    def __init__(self, log: LogConfig, *, run_dir: Path, config: object = None, run_id: str | None = None):
        self._run, self._warned = None, False
        if log.wandb not in ("auto", "disabled", "offline", "online"):
            raise UserError("log.wandb", log.wandb, "must be auto, disabled, offline or online")
        if log.wandb == "disabled" or log.wandb == "auto" and os.environ.get("WANDB_MODE") == "disabled":
            return
        try:
            import wandb
        except ImportError:
            if log.wandb == "auto":
                return
            raise UserError("log.wandb", log.wandb, "wandb is not installed; install it with: pip install wandb") from None
        shown = dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config
        try:
            Path(run_dir).mkdir(parents=True, exist_ok=True)
            self._run = wandb.init(project=log.wandb_project, name=Path(run_dir).name, dir=str(run_dir), config=shown,
                                   mode="online" if log.wandb == "online" else "offline", settings=wandb.Settings(silent=log.wandb != "online"),
                                   id=run_id, resume="allow" if run_id else None)
        except Exception as error:  # noqa: BLE001 - no network, no key, a full disk: not a reason to lose a run
            self._warn(error)

    def log(self, step: int, **fields: object) -> None:
        if self._run is not None:
            try:
                self._run.log(fields, step=step)
            except Exception as error:  # noqa: BLE001
                self._warn(error)

    def close(self, *, exit_code: int = 0) -> None:
        run, self._run = self._run, None
        if run is not None:
            try:
                run.finish(exit_code=exit_code)
            except Exception as error:  # noqa: BLE001
                self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"wandb: {error!r}; tracking may be incomplete, the run goes on", RuntimeWarning, stacklevel=3)
