"""First contact with a cluster: does what is installed here compute right over these nodes and GPUs? One line for each check, in plain words.

    sbatch slurm/acceptance.sbatch                                              on a cluster; one task a GPU
    python slurm/acceptance.py --ranks 2                                        on this machine, over gloo where there is no GPU

The checks (acceptance_checks.py) run in order in all ranks: environment, devices, collectives, bandwidth, kernels, parity of layouts against one
rank, checkpoint and resume. Each ends with good or bad and, if bad, what to do. One that hangs is ended and said to hang.

Exit code: 0 all good, 1 something is bad, 2 bad input.
"""
import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from megatron_ext.contact.node_check import Parser

NAMES = ("environment", "devices", "collectives", "bandwidth", "kernels", "parity", "checkpoint")


def options_of(argv: Sequence[str]) -> argparse.Namespace:
    """The options, checked; ends with 2 for bad ones."""
    made = Parser(prog="acceptance", description="Does this installation compute right on this cluster?", allow_abbrev=False)
    made.add_argument("--ranks", type=int, help="started here, on this machine; not under srun or torchrun")
    made.add_argument("--dir", type=Path, default=Path("outputs/acceptance"), help="on a file system that all nodes share; checkpoints are written there")
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    made.add_argument("--checks", nargs="+", choices=NAMES, default=NAMES, help="only these")
    made.add_argument("--gpus", type=int, help="GPUs that each node must have")
    made.add_argument("--pair-floor", type=float, help="GB/s that every pair of ranks across nodes must reach")
    made.add_argument("--kernel-tests", action="store_true", help="also the tests of all kernels, on one rank of each node (minutes)")
    made.add_argument("--limit", type=float, default=300.0, help="seconds that one check may take")
    made.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    made.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = made.parse_args(argv)
    for name in ("ranks", "limit"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            made.error(f"argument --{name}: {value} is not above 0")
    if options.dir.exists() and not options.dir.is_dir():
        made.error(f"argument --dir: {options.dir} is a file; name a directory")
    return options


def main(argv: Sequence[str]) -> int:
    from megatron_ext.config.schema import Config, LaunchConfig, RunConfig
    from megatron_ext.parallel.job import PARENT, start
    from megatron_ext.parallel.launch import check_machine, guarded, in_ranks, launched_ranks

    options = options_of(argv)
    launched = launched_ranks(os.environ)
    if launched is not None and options.ranks not in (None, launched):
        print(f"error: argument --ranks: {options.ranks}, but the launcher started {launched}; leave it out", file=sys.stderr)
        return 2
    ranks = launched or options.ranks or 1
    config = Config(launch=LaunchConfig(ranks=ranks, device=options.device), run=RunConfig(dir=str(options.dir)))
    if launched is not None or ranks == 1:
        code = guarded(lambda: in_ranks(config, [], lambda: rank(options)), [f"run.dir={options.dir}"])
        return 0 if PARENT in os.environ and code in (0, 1) else code  # our own parent reads the result; another launcher wants the code

    def started() -> int:
        check_machine(config)
        with tempfile.TemporaryDirectory(prefix="acceptance_") as folder:
            result = Path(folder) / "result.json"
            code = start([sys.executable, "-m", "megatron_ext.contact.acceptance", *argv, "--result", str(result)], config)
            good = not code and result.is_file() and json.loads(result.read_text("utf-8"))
            return code or (0 if good else 1)

    return guarded(started)


def rank(options: argparse.Namespace) -> int:
    """One rank."""
    import torch.distributed as dist

    from megatron_ext import platform
    from megatron_ext.contact.acceptance_checks import Checks
    from megatron_ext.contact.course import Course
    from megatron_ext.contact.session import Session, node_name

    platform.quiet()
    me, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "0"))
    try:
        session = Session(me, ranks, host, port, seconds=options.limit)
    except RuntimeError as error:
        if me == 0:  # it cannot listen
            raise
        print(f"BAD   rendezvous   {node_name()} does not reach rank 0 at {host}:{port} within {options.limit:g} s ({str(error).splitlines()[0]}); what to do: look "
              "whether that node is up, and that MASTER_ADDR is its name in a network that all nodes share", file=sys.stderr, flush=True)
        return 1
    here = platform.choose(options.device)  # megatron-core comes in with the first model

    def connect() -> None:
        dist.init_process_group(here.backend, store=session.another(), rank=me, world_size=ranks, timeout=timedelta(seconds=2 * options.limit + 60))

    checks = Checks(options, here, session)
    return Course(options, session, checks.listed(connect)).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
