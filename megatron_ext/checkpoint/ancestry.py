"""Where a checkpoint came from, read back link by link: data -> pretrain -> adapt -> sft -> ppo. No torch.

A record holds the hash of the checkpoint that its run started from (`parent`) and where that was (`parent_path`). A hash covers the record that holds
the next one, so that the chain says what went in, whatever has been moved or overwritten since: where a parent is gone or another one lies in its
place, the chain ends there and says so.
"""
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_ext.checkpoint.manifest import read_manifest
from megatron_ext.errors import UserError

SHOWN = 12  # digits of a hash


def chain(path: Path | str) -> list[dict]:
    """A checkpoint and its ancestors, the youngest first. Only records are read: `verify` looks at the tensors.

    Returns:
        one dict each: `stage`, `step`, `hash`, `path`, `parent` (its hash, None at the origin), `data` (what the record says of it: hashes), `roles`
        (other models that took part: [{"role", "path", "hash"}]), `origin` (of imported weights: what convert/origin.py says, else None).
        Where a parent cannot be read the last dict is {"hash", "path", "broken": why}.

    Raises:
        UserError: `path` itself is no checkpoint, or is damaged.
    """
    path = Path(path).absolute()
    manifest, found = read_manifest(path), []
    while True:
        record = manifest["record"]
        parent, place = record.get("parent"), record.get("parent_path")
        found.append({"stage": record.get("stage"), "step": record.get("step"), "hash": manifest["hash"], "path": str(path), "parent": parent,
                      "data": record.get("data") or {}, "roles": _roles(record), "origin": record.get("origin")})
        if parent is None:
            return found
        manifest, why = _parent(path, parent, place)
        if manifest is None:
            return [*found, {"hash": parent, "path": place, "broken": why}]
        path = manifest.pop("at")


def _parent(child: Path, parent: str, place: str | None) -> tuple[dict | None, str]:
    """(its manifest and where it is, as `at`; or None, and why not)."""
    if place is None:
        return None, "the record does not say where it was"
    why = ""
    # Runs that lie beside each other may have been moved together; the hash says whether what is found is meant.
    for path in (Path(place), child.parents[min(2, len(child.parents) - 1)].joinpath(*Path(place).parts[-3:])):
        try:
            manifest = read_manifest(path)
        except UserError as error:
            why = why or (error.reason if path.exists() else "is not there any more")
            continue
        if manifest["hash"] == parent:
            return manifest | {"at": path}, ""
        why = why or f"is another checkpoint now (hash {manifest['hash'][:SHOWN]})"
    return None, why


def _roles(record: Mapping) -> list[dict]:
    """Models beside the one that was trained: {"reference": {"path", "hash"}, "rewards": [...]} of ppo and its kin as a flat list."""
    roles, found = record.get("roles"), []
    for role, named in (roles.items() if isinstance(roles, Mapping) else ()):
        for one in named if isinstance(named, list) else [named]:
            if isinstance(one, Mapping) and {"path", "hash"} <= one.keys():
                found.append({"role": {"rewards": "reward"}.get(role, role), "path": one["path"], "hash": one["hash"]})
    return found


def described(found: Sequence[Mapping]) -> list[str]:
    """The chain as lines, one a checkpoint."""
    lines = []
    for link in found:
        if "broken" in link:
            lines.append(f"broken: {link['hash'][:SHOWN]}  {link['path'] or 'parent'}: {link['broken']}")
            continue
        data = ", ".join(f"{name} {word}" for name, word in data_words(link["data"]).items())
        lines.append(f"{link['stage'] or '?'} step {link['step']}  {link['hash'][:SHOWN]}  {link['path']}" + (f"  ({data})" if data else ""))
        if link["parent"] is None and link.get("origin"):
            lines.append(f"    imported from {link['origin'].get('name')}, licence {link['origin'].get('licence')}")
        lines += [f"    {one['role']} {one['hash'][:SHOWN]}  {one['path']}" for one in link["roles"] if one["hash"] != link["parent"]]
    return lines


def data_words(data: Mapping) -> dict[str, str]:
    """The hashes among what a record says of its data, cut short: {"sources": "0123456789ab+...", "tokenizer": ...}."""
    found = {}
    for name, value in data.items():
        values = value if isinstance(value, list) else [value]
        if values and all(isinstance(one, str) and len(one) == 64 for one in values):
            found[name] = "+".join(one[:SHOWN] for one in values)
    return found
