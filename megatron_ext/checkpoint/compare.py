"""Whether two checkpoints hold the same numbers, bit for bit, whatever layouts wrote them: how bit-identical resume is proven.

    python -m megatron_ext.checkpoint.compare A B [--tensors-only]

One process, no process groups. Exit code 0: identical; 1: they differ; 2: one of them cannot be read.
"""
import argparse
import sys
from pathlib import Path

import torch

from megatron_ext.checkpoint.encode import differences, encode
from megatron_ext.checkpoint.manifest import find, verify
from megatron_ext.checkpoint.read import Stored
from megatron_ext.errors import UserError


def compare(a: Path, b: Path, *, tensors_only: bool = False) -> list[str]:
    """One line for each tensor, object or common value that differs, with the largest absolute difference; empty: identical.

    Files are verified first. The records (times, layouts, configurations) are not compared. Raises UserError.
    """
    verify(a)
    verify(b)
    with Stored(a) as left, Stored(b) as right:
        lines = _names("tensor", set(left.tensors), set(right.tensors))
        for key in sorted(left.tensors.keys() & right.tensors.keys()):
            lines += _tensors(key, left.whole(key), right.whole(key))
        if tensors_only:
            return lines
        lines += _names("object", left.objects(), right.objects())
        for key in sorted(left.objects() & right.objects()):
            lines += differences(encode(left.object(key)), encode(right.object(key)), key)
        return lines + differences(encode(left.common()), encode(right.common()), "common")


def _names(kind: str, left: set[str], right: set[str]) -> list[str]:
    return [f"{kind} {key}: only in the {'first' if key in left else 'second'}" for key in sorted(left ^ right)]


def _tensors(key: str, a: torch.Tensor, b: torch.Tensor) -> list[str]:
    if a.dtype != b.dtype or a.shape != b.shape:
        return [f"tensor {key}: {a.dtype} {list(a.shape)} / {b.dtype} {list(b.shape)}"]
    if a.numel() == 0 or torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)):
        return []
    difference = (a.double() - b.double()).abs()
    return [f"tensor {key}: {int((difference != 0).sum())} of {a.numel()} differ, largest difference {difference.max().item():.3e}"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m megatron_ext.checkpoint.compare", description="Compare two checkpoints bit for bit.")
    parser.add_argument("a", metavar="A")
    parser.add_argument("b", metavar="B")
    parser.add_argument("--tensors-only", action="store_true", help="leave out the optimizer's hyper-parameters and other small state")
    options = parser.parse_args(arguments)
    try:
        a, b = (find(name, Path(name)) for name in (options.a, options.b))
        lines = compare(a, b, tensors_only=options.tensors_only)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    for line in lines[:20]:
        print(line)
    print(f"{a} and {b}: {f'{len(lines)} differences' if lines else 'identical'}")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
