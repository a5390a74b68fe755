"""What a checkpoint directory is, read and checked with the standard library alone (no torch: `check`, `doctor` and the writer process use it).

    checkpoints/step_00000100/
        manifest.json      the record, and size and sha256 of every other file; written last, so its presence means: complete
        common.json        what is the same on all ranks (optimizer hyper-parameters, ...), see encode.py
        shard_00000.json   what rank 0 wrote: its objects, and for each tensor dtype, global shape and chunks of shard_00000.bin
        shard_00000.bin    raw little-endian tensor bytes, each chunk C-contiguous and 64-byte aligned

Nothing is pickled, so nothing that is read can name a function to call. `hash` in the manifest is the sha256 of its other fields
in canonical JSON; a child names it as `parent` in its record, which makes a run's ancestry a hash chain.
"""
import contextlib
import hashlib
import json
import math
import os
import re
from pathlib import Path

from megatron_ext.errors import UserError
from megatron_ext.files import write_whole

FORMAT = "megatron_ext.checkpoint"
VERSION = 1
MANIFEST, COMMON = "manifest.json", "common.json"
CHAIN = "chain.json"  # in the directory of a main job: its stages that are done, in order
BEST = "best.json"  # in a checkpoints directory: which one the validations chose
KEY = "checkpoint.load"
ALIGNMENT = 64  # bytes: widest vector load, and any dtype can be viewed at an aligned offset
BLOCK = 8 << 20  # bytes read, hashed and written at a time
_STEP = re.compile(r"step_(\d{8,12})")
_TEMPORARY = re.compile(r"(step_\d{8,12})\.tmp-[A-Za-z0-9-]+")
_SHARD = re.compile(r"shard_(\d{5,7})\.(json|bin)")
_SHA256 = re.compile(r"[0-9a-f]{64}")
ITEM_BYTES = {
    "float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "int64": 8, "int32": 4, "int16": 2,
    "int8": 1, "uint8": 1, "bool": 1, "complex64": 8, "complex128": 16,
}  # fmt: skip


class Damaged(UserError):
    """A checkpoint whose bytes are not those that were written. What cannot be read, or does not fit the run, is none."""


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def shard_name(rank: int, kind: str) -> str:
    return f"shard_{rank:05d}.{kind}"


def canonical(value: object) -> bytes:
    """The one JSON text of `value`. Raises TypeError or ValueError for what JSON cannot hold exactly (NaN, objects)."""
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def seal(fields: dict) -> bytes:
    """The manifest's bytes: `fields` with their own hash."""
    return canonical({**fields, "hash": hashlib.sha256(canonical(fields)).hexdigest()})


def hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def steps(directory: Path) -> list[Path]:
    """Complete checkpoints of a checkpoints directory, oldest first by the time they were written: a run that went back to an
    earlier step continues from what it wrote last, not from the highest number of the branch it left."""
    if not directory.is_dir():
        return []
    found = [(_written(path), path.name, path) for path in directory.iterdir() if _STEP.fullmatch(path.name) and (path / MANIFEST).is_file()]
    return [path for _, _, path in sorted(one for one in found if one[0] is not None)]


def leftovers(directory: Path) -> list[Path]:
    """What saves that died left behind."""
    return [path for path in directory.iterdir() if _TEMPORARY.fullmatch(path.name)] if directory.is_dir() else []


def final_name(temporary: Path) -> Path:
    match = _TEMPORARY.fullmatch(temporary.name)
    assert match, temporary
    return temporary.parent / match[1]


def find(load: str | None, run_checkpoints: Path, *, key: str = KEY, best: bool = False) -> Path | None:
    """The checkpoint that `checkpoint.load` means: None -> None; "auto" -> this run's newest, if any; else a checkpoint directory,
    a checkpoints directory or a run directory (their newest, or with `best` the one that its validations chose, where they did).
    Raises UserError where a named directory holds none; `key` is what it calls it."""
    if load is None:
        return None
    if load == "auto":
        found = steps(Path(run_checkpoints))
        return found[-1] if found else None
    path = Path(load)
    if not path.is_dir():
        raise UserError(key, load, "no such directory; give a checkpoint (…/checkpoints/step_00000100), a run directory, or auto")
    if (path / MANIFEST).is_file():
        return path
    if _TEMPORARY.fullmatch(path.name) or _STEP.fullmatch(path.name):
        raise UserError(key, load, f"has no {MANIFEST}: the save did not finish{alternative(path)}")
    for directory in (path, path / "checkpoints", *_of_chain(path)):
        if found := steps(directory):
            return best and best_of(directory) or found[-1]
    raise UserError(key, load, "holds no complete checkpoint; give a checkpoint (…/checkpoints/step_00000100), a run directory, or auto")


def _of_chain(path: Path) -> list[Path]:
    """The checkpoints of a main job's stages (pipeline.py), the last one first; not the reward model's, which says nothing."""
    try:
        stages = list(json.loads((path / CHAIN).read_bytes()))
    except (OSError, ValueError):
        return []
    return [path / stage / "checkpoints" for stage in reversed(stages) if re.fullmatch("[a-z_]+", stage) and stage != "reward"]


def name_best(directory: Path, step: int, why: dict) -> None:
    """Writes which checkpoint of a directory is the best; a crash leaves the old word or the new one."""
    write_whole(Path(directory) / BEST, canonical({"checkpoint": step_name(step), **why}))
    sync_directory(Path(directory))


def best_of(directory: Path) -> Path | None:
    """The checkpoint that `name_best` named, where it is complete."""
    try:
        name = json.loads((Path(directory) / BEST).read_bytes())["checkpoint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    known = isinstance(name, str) and _STEP.fullmatch(name)
    return Path(directory) / name if known and (Path(directory) / name / MANIFEST).is_file() else None


def alternative(path: Path) -> str:
    """The end of a message about a bad checkpoint: which other one there is."""
    others = [other for other in steps(Path(path).absolute().parent) if other.name != Path(path).name]
    return f"; the newest other checkpoint is {others[-1]}" if others else "; there is no other checkpoint beside it"


def damaged(path: Path, file: str, what: str, *, kind: type[UserError] = UserError) -> UserError:
    return kind(KEY, path, f"{file} {what}{alternative(path)}")


def set_aside(path: Path) -> Path:
    """Renames a damaged checkpoint to a name that nothing looks for and nothing removes; the new one. Raises OSError."""
    number, aside = 1, path.with_name(f"{path.name}.damaged")
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.damaged-{number}")
    os.rename(path, aside)
    sync_directory(path.parent)
    return aside


def read_manifest(path: Path) -> dict:
    """The validated manifest of a checkpoint. Raises UserError when it is absent or of another format version, Damaged when it was altered."""
    path = Path(path)
    try:
        content = (path / MANIFEST).read_bytes()
    except OSError as error:
        raise damaged(path, MANIFEST, f"cannot be read ({error.strerror})") from None
    try:
        fields = parse_json(path, MANIFEST, content)
    except UserError as error:
        raise Damaged(*error.__reduce__()[1]) from None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise damaged(path, MANIFEST, "is not a checkpoint manifest of this project", kind=Damaged)
    stated = fields.pop("hash", None)
    try:
        sealed = seal(fields)
    except (ValueError, RecursionError):
        sealed = b""
    if (version := fields.get("version")) != VERSION:  # sealed: another program's; else one that was damaged just there
        kind = UserError if sealed == content else Damaged
        raise damaged(path, MANIFEST, f"has format version {version!r}; this program reads {VERSION}", kind=kind)
    if sealed != content:
        raise damaged(path, MANIFEST, "is damaged: its content does not match its own hash", kind=Damaged)
    fields["hash"] = stated
    files, record = fields.get("files"), fields.get("record")
    if not isinstance(record, dict) or not isinstance(files, dict) or COMMON not in files:
        raise damaged(path, MANIFEST, "lacks its record or its list of files")
    for name, entry in files.items():
        if name != COMMON and not _SHARD.fullmatch(name):  # no separators, no dots: nothing outside the directory
            raise damaged(path, MANIFEST, f"lists a file that no checkpoint has: {name[:80]!r}")
        if not (isinstance(entry, dict) and _natural(entry.get("size")) and _SHA256.fullmatch(str(entry.get("sha256")))):
            raise damaged(path, MANIFEST, f"has a bad entry for {name}")
    for name in files:
        if (match := _SHARD.fullmatch(name)) and shard_name(int(match[1]), {"json": "bin", "bin": "json"}[match[2]]) not in files:
            raise damaged(path, MANIFEST, f"lists {name} without its other half")
    return fields


def read_record(path: Path) -> dict:
    """What the save said about the run: step, consumed samples, layout, configuration, `sharding`, … Raises UserError."""
    return read_manifest(path)["record"]


def checkpoint_hash(path: Path) -> str:
    return read_manifest(path)["hash"]


def parse_json(path: Path, name: str, content: bytes) -> object:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise damaged(path, name, f"is not JSON ({str(error)[:80]})") from None


def verify_file(path: Path, name: str, entry: dict) -> None:
    """Raises Damaged unless the file is a plain file of the stated size and hash."""
    file = Path(path) / name
    if file.is_symlink() or not file.is_file():
        raise damaged(path, name, "is missing or not a plain file", kind=Damaged)
    if (size := file.stat().st_size) != entry["size"]:
        raise damaged(path, name, f"has {size} bytes, its manifest says {entry['size']}", kind=Damaged)
    if hash_file(file) != entry["sha256"]:
        raise damaged(path, name, "is damaged: its sha256 differs from the manifest's", kind=Damaged)


def verify(path: Path) -> None:
    """Hashes every file of a checkpoint. Raises UserError naming the first that differs."""
    for name, entry in sorted(read_manifest(path)["files"].items()):
        verify_file(path, name, entry)


def read_shard(path: Path, name: str, content: bytes) -> dict:
    """A validated `shard_*.json`: {file, sha256, size, index: {tensors: {key: {dtype, shape, chunks: [[offset, shape, byte], …]}}, objects}}.

    Raises UserError: every chunk lies inside its global tensor and inside its file, so that a hostile index cannot make the reader
    touch anything but the file it describes.
    """
    shard = parse_json(path, name, content)
    try:
        size, tensors, objects = shard["size"], shard["index"]["tensors"], shard["index"]["objects"]
        if shard["file"] != name.replace(".json", ".bin") or not _natural(size) or not isinstance(objects, dict):
            raise ValueError("wrong file, size or objects")
        for key, tensor in tensors.items():
            item, shape = ITEM_BYTES[tensor["dtype"]], tensor["shape"]
            if not _naturals(shape):
                raise ValueError(f"shape of {key[:80]}")
            for offset, extent, byte in tensor["chunks"]:
                inside = _naturals(offset) and _naturals(extent) and len(offset) == len(extent) == len(shape)
                inside = inside and all(o + e <= s for o, e, s in zip(offset, extent, shape))
                if not (inside and _natural(byte) and byte % ALIGNMENT == 0 and byte + math.prod(extent) * item <= size):
                    raise ValueError(f"chunk of {key[:80]}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(path, name, f"is not a valid index ({str(error)[:120]})") from None
    return shard


def covered(path: Path, shards: list[dict]) -> None:
    """Every global tensor is described alike by all ranks, and its chunks add up to it. Raises UserError."""
    left: dict[str, int] = {}
    seen: dict[str, tuple] = {}
    for shard in shards:
        for key, tensor in shard["index"]["tensors"].items():
            kind = (tensor["dtype"], tensor["shape"])
            if seen.setdefault(key, kind) != kind:
                raise damaged(path, shard["file"], f"describes {key[:80]} differently from another rank's")
            left.setdefault(key, math.prod(tensor["shape"]))
            left[key] -= sum(math.prod(extent) for _, extent, _ in tensor["chunks"])
    if wrong := [key for key, rest in left.items() if rest]:
        raise damaged(path, "the index", f"does not cover {wrong[0][:80]} exactly once ({len(wrong)} such tensors)")


def sync_directory(path: Path) -> None:
    """Makes names in a directory durable: without it a rename or a new file may be lost in a power cut although its data is not."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _written(path: Path) -> float | None:
    """Seconds since the epoch; None where it has just been removed by the writer that keeps the newest few."""
    try:
        return float(json.loads((path / MANIFEST).read_bytes())["written"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError):
        with contextlib.suppress(FileNotFoundError):
            return (path / MANIFEST).stat().st_mtime  # damaged: still found, so that loading can say so
        return None


def _natural(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _naturals(values: object) -> bool:
    return isinstance(values, list) and len(values) <= 16 and all(map(_natural, values))
