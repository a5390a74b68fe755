"""Compiles every Triton kernel, in every configuration of the tile table, for GPUs that are not here, and says what it costs.

    python -m kernels.static_check              compares with docs/kernels.md; exit 1 where a kernel spills, loads narrowly or got worse
    python -m kernels.static_check --write      measures anew and writes docs/kernels.md
    python -m kernels.static_check --op swiglu  one op

Needs only Triton's wheel, which carries ptxas and cuobjdump. TRITON_INTERPRET must not be set: the decorator would make interpreted functions.
A kernel is refused when it spills (STACK or LOCAL above 0), when it asks for more shared memory than a program may have, when it is bound by memory and has no 16-byte load, or when it takes more registers
(in steps of 8, the granularity at which they are handed out) or shared memory than the table says. Figures depend on the version of Triton: with another
one than the table's, only spills and load widths are judged.
"""
import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that one program may have (CUDA programming guide, compute capabilities)
TABLE = Path(__file__).parent.parent / "docs" / "kernels.md"
WIDE = re.compile(r"ld\.global[.\w:]*\.v4\.[bfu]32|ld\.global[.\w:]*\.v8\.[bfu](?:16|32)|ld\.global[.\w:]*\.v2\.[bfu]64|ld\.global[.\w:]*\.v4\.[bfu]64"
                  r"|cp\.async\.c[ga]\.shared\.global[^;]*, 0x10|cp\.async\.bulk")


@dataclass(frozen=True)
class Cost:
    """What a compiled kernel takes of a streaming multiprocessor: registers a thread, spilled bytes a thread, shared bytes, 16-byte loads."""

    registers: int
    spilled: int
    shared: int
    wide_loads: int


def modules() -> list[str]:
    """The ops: every module of `kernels` that has `launches`."""
    found = []
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem not in ("static_check", "jit") and re.search(r"^def launches\(", path.read_text(), re.MULTILINE):
            found.append(path.stem)
    return found


def cost(launch, sm: int) -> Cost:
    """Compiles one `jit.Launch` for compute capability `sm` (80, 90, 100)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants = dict(launch.signature), dict(launch.constants)
    names = [*launch.kernel.arg_names]
    missing = [n for n in names if n not in signature and n not in constants]
    assert not missing, f"{launch.op} {launch.variant}: no type for {missing}"
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n, t in signature.items() if t.startswith("*") or n in launch.multiples_of_16}
    types = {n: "constexpr" if n in constants else signature[n] for n in names}
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, **launch.options}
    compiled = triton.compile(ASTSource(launch.kernel, types, constants, aligned), target=GPUTarget("cuda", sm, 32), options=options)
    asm = compiled.asm
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(asm["cubin"])
        cubin.flush()
        said = subprocess.run([tools / "cuobjdump", "--dump-resource-usage", cubin.name], check=True, capture_output=True, text=True).stdout

    def figure(name: str) -> int:
        return int(re.search(rf"{name}:(\d+)", said)[1])

    # Triton asks for its shared memory at launch: the cubin knows of the static part alone.
    return Cost(figure("REG"), figure("STACK") + figure("LOCAL"), max(figure("SHARED"), compiled.metadata.shared), len(WIDE.findall(asm["ptx"])))


def measure(op: str, only: int | None = None) -> dict[tuple[str, str, int], tuple[Cost, bool]]:
    """(op, variant, sm) -> (cost, bound by memory) of everything that module `op` launches."""
    launches = importlib.import_module(f"kernels.{op}").launches()
    return {(launch.op, launch.variant, sm): (cost(launch, sm), launch.memory_bound)
            for launch in launches for sm in ARCHITECTURES if only in (None, sm) and sm >= launch.since}


def read_table(path: Path = TABLE) -> tuple[str, dict[tuple[str, str, int], Cost]]:
    """The Triton version and the rows of docs/kernels.md."""
    text = path.read_text()
    version = re.search(r"Triton (\d[\w.]*)", text)[1]
    rows = re.findall(r"^\| (\S+) \| ([^|]+?) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", text, re.MULTILINE)
    return version, {(op, variant, int(sm)): Cost(*map(int, rest)) for op, variant, sm, *rest in rows}


def table_text(found: dict[tuple[str, str, int], tuple[Cost, bool]], version: str) -> str:
    """docs/kernels.md."""
    lines = [
        "# What the compiled kernels cost", "",
        f"Written by `python -m kernels.static_check --write` with Triton {version}; checked by `tests/test_static_check.py`. No GPU is needed: Triton's",
        "wheel carries NVIDIA's assembler. Spilled: bytes a thread in local memory (STACK + LOCAL). Shared: bytes a program. 16-byte loads: in the PTX.", "",
        "| op | configuration | sm | registers | spilled | shared | 16-byte loads |", "|---|---|---|---|---|---|---|",
    ]
    lines += [f"| {op} | {variant} | {sm} | {c.registers} | {c.spilled} | {c.shared} | {c.wide_loads} |" for (op, variant, sm), (c, _) in sorted(found.items())]
    return "\n".join(lines) + "\n"


def complaints(found: dict[tuple[str, str, int], tuple[Cost, bool]], known: dict[tuple[str, str, int], Cost], same_version: bool) -> list[str]:
    """One sentence for each kernel that is not as it should be."""
    said = []
    for key, (now, memory_bound) in sorted(found.items()):
        name = f"{key[0]} {key[1]} sm_{key[2]}"
        if now.spilled:
            said.append(f"{name}: spills {now.spilled} bytes a thread")
        if now.shared > SHARED_LIMIT[key[2]]:
            said.append(f"{name}: {now.shared} bytes of shared memory; a program may have {SHARED_LIMIT[key[2]]}")
        if memory_bound and not now.wide_loads:
            said.append(f"{name}: bound by memory, and loads nothing 16 bytes at a time")
        before = known.get(key)
        if before is None:
            said.append(f"{name}: not in {TABLE.name}; run python -m kernels.static_check --write")
        elif same_version:
            if -(-now.registers // 8) > -(-before.registers // 8):
                said.append(f"{name}: {now.registers} registers, {before.registers} in the table")
            if now.shared > before.shared:
                said.append(f"{name}: {now.shared} bytes of shared memory, {before.shared} in the table")
            if memory_bound and now.wide_loads < before.wide_loads:
                said.append(f"{name}: {now.wide_loads} 16-byte loads, {before.wide_loads} in the table")
    return said


def gone(found: dict[tuple[str, str, int], tuple[Cost, bool]], known: dict[tuple[str, str, int], Cost]) -> list[str]:
    """One sentence for each row of the table that nothing launches any more: coverage must not shrink unseen."""
    return [f"{op} {variant} sm_{sm}: in {TABLE.name}, and not launched any more" for op, variant, sm in sorted(known.keys() - found.keys())]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--op", action="append", help="only this module of kernels (repeatable)")
    parser.add_argument("--sm", type=int, choices=ARCHITECTURES, help="only this compute capability")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("error: TRITON_INTERPRET=1: interpreted kernels cannot be compiled; unset it", file=sys.stderr)
        return 2
    try:
        import triton
    except ImportError as error:
        print(f"error: {error}; install it with: pip install 'triton>=3.4,<4'", file=sys.stderr)
        return 2
    ops = options.op or modules()
    if unknown := sorted(set(ops) - set(modules())):
        print(f"error: --op {unknown[0]}: no such op; there are {', '.join(modules())}", file=sys.stderr)
        return 2
    if options.write and (options.op or options.sm):
        print("error: --write measures everything; leave --op and --sm out", file=sys.stderr)
        return 2
    found = {}
    with ProcessPoolExecutor(max_workers=min(len(ops), os.cpu_count() or 1)) as pool:
        for part in pool.map(measure, ops, [options.sm] * len(ops)):
            found |= part
    if options.write:
        TABLE.write_text(table_text(found, triton.__version__))
        version, known = triton.__version__, {key: c for key, (c, _) in found.items()}
    else:
        version, known = read_table()
    said = complaints(found, known, version == triton.__version__)
    if not (options.op or options.sm):
        said += gone(found, known)
    for line in said:
        print(line)
    print(f"{len(found)} compiled kernels, Triton {triton.__version__}: " + (f"{len(said)} complaints" if said else "no spills, no regressions"))
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
