"""Is every node of this job fit for the run? One task a GPU (or a node); minutes before the run instead of hours into it.

    srun python -m megatron_ext.contact.node_check --dir RUN_DIR --gpus 8      each task finds itself in Slurm's environment (torchrun's too)
    python -m megatron_ext.contact.node_check --ranks 2 --dir DIR              without a launcher: starts its ranks on this machine

Each rank looks at its node by itself (GPUs through NVML, GEMM speed and sums, the run directory) and reports; then all meet (all-reduce, pairs).
Rank 0 judges, names nodes that fall short, and leaves node_check.json and node_check.bad (the nodes to leave out, as Slurm takes them) in DIR.
A rank that never comes, or hangs, is named too: nothing here waits without an end.

Exit code: 0 good, 1 bad, 2 bad input.
"""
import argparse
import json
import os
import platform as python_platform
import secrets
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from megatron_ext.contact.findings import Limits
from megatron_ext.files import write_whole

WORD_SECONDS = 10.0  # that a file system may take to show another node's file


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"error: {message}\n")


def options_of(argv: Sequence[str]) -> argparse.Namespace:
    """The options, checked; ends with 2 for bad ones."""
    made = Parser(prog="node_check", description="Is every node of this job fit for the run?", allow_abbrev=False)
    made.add_argument("--ranks", type=int, help="started here, on this machine; not under srun or torchrun")
    made.add_argument("--dir", type=Path, default=Path("outputs/node_check"), help="the run directory: written and read back, and where the verdict is left")
    made.add_argument("--gpus", type=int, help="GPUs that each node must have")
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    made.add_argument("--gemm-share", type=float, default=Limits.gemm_share, help="GEMM speed at least this share of the other nodes' median")
    made.add_argument("--gemm-floor", type=float, help="and at least so many TFLOP/s")
    made.add_argument("--pair-share", type=float, default=Limits.pair_share, help="bandwidth of a pair of ranks at least this share of the others'")
    made.add_argument("--pair-floor", type=float, help="and across nodes at least so many GB/s")
    made.add_argument("--disk-floor", type=float, help="MB/s that a node must write to the run directory")
    made.add_argument("--free", type=float, help="GiB that must be free there")
    made.add_argument("--message", type=int, help="MiB of a message between ranks; default 64 on GPUs, 1 on CPUs")
    made.add_argument("--file", type=int, default=64, help="MiB that each node writes")
    made.add_argument("--seconds", type=float, help="of matrix products; default 3 on GPUs, 0.3 on CPUs")
    made.add_argument("--limit", type=float, default=60.0, help="seconds that one exchange between ranks may take")
    made.add_argument("--timeout", type=float, default=300.0, help="seconds in which every rank must have reported")
    made.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    made.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = made.parse_args(argv)
    if options.dir.exists() and not options.dir.is_dir():
        made.error(f"argument --dir: {options.dir} is a file; name a directory")
    for name in ("gemm_share", "pair_share"):
        if not 0 <= getattr(options, name) <= 1:
            made.error(f"argument --{name.replace('_', '-')}: {getattr(options, name)} is not between 0 and 1")
    for name in ("ranks", "message", "file", "seconds", "limit", "timeout"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            made.error(f"argument --{name}: {value} is not above 0")
    if options.gpus is not None and options.gpus < 0:
        made.error(f"argument --gpus: {options.gpus} is below 0")
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
        with tempfile.TemporaryDirectory(prefix="node_check_") as folder:
            result = Path(folder) / "result.json"
            code = start([sys.executable, "-m", "megatron_ext.contact.node_check", *argv, "--result", str(result)], config)
            good = not code and result.is_file() and json.loads(result.read_text("utf-8"))["good"]
            return code or (0 if good else 1)

    return guarded(started)


def rank(options: argparse.Namespace) -> int:
    """One rank, from its own look at the node to the common verdict."""
    from megatron_ext.contact.session import Session, node_name

    me, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "0"))
    try:
        session = Session(me, ranks, host, port, seconds=options.timeout)
    except RuntimeError as error:
        if me == 0:  # it cannot listen
            raise
        print(f"node check: {node_name()} does not reach rank 0 at {host}:{port} within {options.timeout:g} s ({str(error).splitlines()[0]}): its node or the "
              "network between is down, or MASTER_ADDR names the wrong interface", file=sys.stderr, flush=True)
        return 1
    return _Check(options, session).run()


class _Check:
    def __init__(self, options: argparse.Namespace, session):
        self.options, self.session = options, session
        self.facts: list = []
        self.found: dict = {}

    def run(self) -> int:
        from megatron_ext.contact import gpus

        options, session = self.options, self.session
        first, left, came = session.rank == 0, None, session.ranks
        if first:
            self.word = secrets.token_hex(8)
            session.tell("word", self.word)
            left = self._leave_word()
        try:
            found = gpus.read_gpus()  # of all ranks before any of them begins to use one: what is in use then is not ours
            session.post("here", True)
            if first:
                came = session.ranks - session.collect("here", options.timeout).count(None)
                session.tell("begin", True)
            session.hear("begin", 2 * options.timeout)
            session.post("facts", self._local(found))
            if first:
                self.facts = session.collect("facts", options.timeout, count=came)
                nodes = [f["node"] if f else None for f in self.facts]
                session.tell("plan", nodes if None not in nodes else None)
            plan = session.hear("plan", 2 * options.timeout)
        finally:
            if first and left is not None:
                left.unlink(missing_ok=True)
        if plan is not None and session.ranks > 1:
            self._network(plan)
        return self._end(network=plan is not None and session.ranks > 1)

    # ---- alone

    def _local(self, found: list[dict]) -> dict:
        from megatron_ext.contact.session import node_name

        local = int(os.environ.get("LOCAL_RANK", "0"))
        facts: dict = {"node": node_name(), "local": local, "gpus": found, **self._choose_device()}
        facts["gemm"] = self._gemm(facts)
        if local == 0:
            facts["disk"] = self._disk()
        return facts

    def _choose_device(self) -> dict:
        import torch

        from megatron_ext import platform
        from megatron_ext.errors import UserError

        try:
            self.platform = platform.choose(self.options.device)
        except UserError:  # no GPU where one was asked for: `_gemm` says it
            self.platform = platform.choose("cpu")
        self.device = self.platform.device
        found: dict = {"cuda": 0, "versions": {"Python": python_platform.python_version(), "torch": torch.__version__}}
        if self.platform.is_cuda:
            found["versions"]["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
            uuid = str(getattr(torch.cuda.get_device_properties(self.device), "uuid", ""))
            found |= {"cuda": torch.cuda.device_count(), "device_uuid": uuid or None}
        return found

    def _gemm(self, facts: dict) -> dict:
        from megatron_ext.contact import gemm
        from megatron_ext.observe.gpu import GpuMonitor

        if self.options.device == "cuda" and self.device.type != "cuda":
            return {"error": "torch sees no GPU here"}
        monitor = GpuMonitor(self.device.index) if self.device.type == "cuda" else None

        def during() -> None:
            if monitor is not None:
                time.sleep(0.2)  # clocks and reasons lag behind the load
                read = monitor.read()
                facts["load"] = {**read, "throttle": [reason for reason in str(read.get("gpu_throttle", "")).split(", ") if reason]}

        try:
            return gemm.measure(self.device, seconds=self.options.seconds, during=during)
        except RuntimeError as error:  # of CUDA, and out of memory
            return {"error": str(error).splitlines()[0]}
        finally:
            if monitor is not None:
                monitor.close()

    def _disk(self) -> dict:
        from megatron_ext.contact import disk

        try:
            found = disk.measure(self.options.dir, self.options.file << 20)
            word = str(self.session.hear("word", self.options.timeout))
            return {**found, "shared": disk.sees_word(self.options.dir, word, seconds=WORD_SECONDS)}
        except OSError as error:
            return {"error": error.strerror or str(error)}

    def _leave_word(self) -> Path | None:
        from megatron_ext.contact import disk

        try:
            return disk.leave_word(self.options.dir, self.word)
        except OSError:  # `_disk` says it
            return None

    # ---- together

    def _network(self, nodes: list[str]) -> None:
        import torch.distributed as dist

        from megatron_ext.contact import network
        from megatron_ext.contact.guard import Guard

        options, session = self.options, self.session
        size = (options.message or (64 if self.device.type == "cuda" else 1)) << 20
        guard = Guard(self._late)
        try:
            with guard.expects("the meeting of all ranks", options.limit + 60):  # NCCL's first communicator of many ranks takes its time
                dist.init_process_group(self.platform.backend, store=session.another(), rank=session.rank,
                                        world_size=session.ranks, timeout=timedelta(seconds=2 * options.limit + 120))
                dist.barrier()
            network.measure(nodes, self.device, guard, self.found, size=size, limit=options.limit)
            session.post("network", self.found)
            dist.destroy_process_group()
        except (RuntimeError, OSError) as error:  # what torch raises for a peer that is gone
            session.post("network", {**self.found, "error": str(error).splitlines()[0]})
            if guard.fired:
                time.sleep(2 * options.timeout)  # its thread is ending this process
        finally:
            guard.close()

    def _late(self, waiting) -> None:
        """In the guard's thread: the main one hangs in a collective for good."""
        if self.session.post("network", {**self.found, "stuck": waiting.facts()}):
            code = 1
            try:
                code = self._end(network=True)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(0 if "MEGATRON_EXT_PARENT" in os.environ else code)

    def _end(self, *, network: bool) -> int:
        session, options = self.session, self.options
        if session.rank == 0:
            from megatron_ext.contact.session import expected_tasks
            from megatron_ext.contact.verdict import judge

            limits = Limits(options.gpus, options.gemm_share, options.gemm_floor, options.pair_share, options.pair_floor, options.disk_floor, options.free)
            # Who has not come by then hangs: no step of the others takes longer than the limit, and they may be one step behind.
            met = session.collect("network", 2 * options.limit + 5) if network else None
            verdict = judge(self.facts, met, limits, expected=expected_tasks())
            print(json.dumps(verdict.json()) if options.json else verdict.text(), flush=True)
            self._leave_verdict(verdict)
            session.tell("good", verdict.good)
        good = session.hear("good", 4 * options.timeout + 4 * options.limit)
        session.leave()
        return 0 if good else 1

    def _leave_verdict(self, verdict) -> None:
        if self.options.result is not None:
            write_whole(self.options.result, json.dumps({"good": verdict.good}))
        try:
            write_whole(self.options.dir / "node_check.json", json.dumps(verdict.json(), indent=1) + "\n")
            bad = self.options.dir / "node_check.bad"
            if verdict.exclude:
                write_whole(bad, ",".join(verdict.exclude) + "\n")
            else:
                bad.unlink(missing_ok=True)
        except OSError as error:
            print(f"node check: the verdict cannot be left in {self.options.dir}: {error.strerror}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
