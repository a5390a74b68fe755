"""Weights & Biases: written to disk by default where it is installed (`log.wandb=auto`), streamed or off by config, never required.

wandb is imported when the first run starts. That it is missing then is the user's to mend; anything that goes wrong with it later is
warned of once and does not touch the training.

One run across restarts. The id lies in `run.dir`/wandb_id from the first life on. Online, wandb goes on with the run of that id; steps that are done
again are counted on (wandb takes no step twice), and the charts have our own `step` as their axis. Offline, wandb cannot: every life leaves a
folder that *replaces* what was uploaded under its id (wandb issues 3841, 5865; pull request 12110). So each life first repeats what metrics.jsonl
says of the steps before it, and its folder alone is the whole run. To upload it, later and from anywhere that sees the folder:

    wandb sync RUN_DIR/wandb/latest-run

What wandb is given holds no secrets (redact.py), the command line that it keeps included; it does not get what is printed.
"""
import contextlib
import dataclasses
import hashlib
import os
import secrets
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from megatron_ext.config.schema import LogConfig
from megatron_ext.errors import UserError
from megatron_ext.redact import Redactor

ID = "wandb_id"
REPEATED = 10_000  # steps of earlier lives that an offline life repeats, evenly spaced where there are more


class Tracker:
    """Sends metrics to wandb, or does nothing (`log.wandb=disabled`), so that the loop needs no `if`.

    Args:
        log: mode and project. run_dir: wandb's files go there; its name is the run's name.
        config: a dataclass or dictionary, shown with the run.
        history: gives the records of metrics.jsonl before this life's first step; asked offline only.

    Raises:
        UserError: wandb is asked for and not installed, or the mode is unknown.
    """

    def __init__(self, log: LogConfig, *, run_dir: Path, config: object = None, history: Callable[[], Sequence[dict]] = list):
        self._run, self._warned, self._offset, self._last, self._redact = None, False, 0, -1, Redactor()
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
        online = log.wandb == "online"
        try:
            Path(run_dir).mkdir(parents=True, exist_ok=True)
            with self._without_secrets():
                self._run = wandb.init(project=log.wandb_project, name=Path(run_dir).name, dir=str(run_dir), config=self._redact(shown),
                                       mode="online" if online else "offline", settings=wandb.Settings(silent=not online, console="off"),
                                       id=identity(Path(run_dir)), resume="allow" if online else None)
            self._run.define_metric("*", step_metric="step")
            self._last = self._run.step - 1  # online, the run may stand beyond the step that this life begins with
        except Exception as error:  # noqa: BLE001 - no network, no key, a full disk: not a reason to lose a run
            self._warn(error)
        if self._run is not None and not online:
            records = history()
            for record in records[:: -(-len(records) // REPEATED) or 1]:
                self.log(**record)

    def log(self, step: int, **fields: object) -> None:
        if self._run is not None:
            try:
                self._offset = max(self._offset, self._last + 1 - step)
                self._last = step + self._offset
                self._run.log({"step": step, **fields}, step=self._last)
            except Exception as error:  # noqa: BLE001
                self._warn(error)

    def close(self, *, exit_code: int = 0) -> None:
        run, self._run = self._run, None
        if run is not None:
            try:
                run.finish(exit_code=exit_code)
            except Exception as error:  # noqa: BLE001
                self._warn(error)

    @contextlib.contextmanager
    def _without_secrets(self) -> Iterator[None]:
        """wandb copies the words of the command line; they may hold what config.yaml may not."""
        before, sys.argv = sys.argv, [self._redact.text(word) for word in sys.argv]
        try:
            yield
        finally:
            sys.argv = before

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            text = self._redact.text(repr(error))
            warnings.warn(f"wandb: {text}; tracking may be incomplete, the run goes on", RuntimeWarning, stacklevel=3)


def identity(run_dir: Path) -> str:
    """The id of this run in wandb: made once, kept in its directory. A directory that is removed and made again is another run."""
    path = run_dir / ID
    try:
        with contextlib.suppress(FileNotFoundError):
            if (kept := path.read_text(encoding="ascii").strip()).isalnum():
                return kept
        made = secrets.token_hex(6)
        path.write_text(made + "\n", encoding="ascii")
        return made
    except (OSError, UnicodeDecodeError):  # read-only or full: at least the same as long as the directory stays where it is
        return hashlib.sha256(str(run_dir.absolute()).encode()).hexdigest()[:12]
