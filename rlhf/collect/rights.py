"""What may go into records: nothing that was removed, and nothing whose licence forbids what the model is for.

Both are curation's (docs/curate.md): the list that `ledger remove` writes (`curate.removals`), and the uses that licences forbid (`curate.uses`,
`curate.forbidden`). Here they hold for what is made of documents: a record names its source, and with it goes what the source may not do.
"""
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.config.schema import Config
from megatron_ext.curate.ingest import licences
from megatron_ext.curate.removals import Removals, entries
from megatron_ext.data.prepared import file_sha256
from megatron_ext.errors import UserError

RIGHTS = ("id", "sha256", "text_sha256", "derived_from", "collection", "file", "licence", "owner", "forbids")  # of a source: what is looked at here
REMOVED, LICENCE = "removed", "licence"  # reasons, as they are counted


@dataclass(frozen=True)
class _Whose:
    """What a licence is told of: a collection (or file), its licence and owner, and what its catalogue says that it forbids."""

    name: str
    licence: str
    owner: str
    forbids: tuple[str, ...] | None

    def described(self) -> dict:
        """As `licences` reads it."""
        found = {"name": self.name, "licence": self.licence, "owner": self.owner}
        return {key: value for key, value in found.items() if value} | ({} if self.forbids is None else {"forbids": list(self.forbids)})


class Gate:
    """Lets records in or not. Attributes: left_out: how many were not, by reason.

    Args:
        config: `curate.removals`, `.uses` and `.forbidden` of it.
    Raises:
        UserError: a list that cannot be read.
    """

    def __init__(self, config: Config):
        self._settings = config.curate
        self._removals = Removals.read(config.curate.removals)
        self._seen: Counter[_Whose] = Counter()
        self.left_out: Counter[str] = Counter()

    def admits(self, source: Mapping) -> bool:
        """Whether a record with this `source` (as records hold it), and with those that are `also` its, may be used; counts it.

        Raises:
            UserError: its licence forbids a use, and `curate.forbidden=refuse`.
        """
        parts = [source, *(one for one in source.get("also") or () if isinstance(one, Mapping))]
        if any(map(self._removed, parts)):
            self.left_out[REMOVED] += 1
            return False
        whose = dict.fromkeys(map(_whose, parts))
        against = [one for one in whose if {*licences.forbidden(one.described())} & {*self._settings.uses}]
        if against and self._settings.forbidden == "leave_out":
            self.left_out[LICENCE] += 1
            return False
        if against and self._settings.forbidden == "refuse":
            said = "; ".join(licences.warnings([one.described() for one in against], self._settings.uses))
            raise UserError("curate.uses", ",".join(self._settings.uses), f"{said}. curate.forbidden=leave_out goes on without, warn with them")
        self._seen.update(whose.keys())
        return True

    def _removed(self, source: Mapping) -> bool:
        if not self._removals:
            return False
        raw = str(source.get("sha256") or "")
        ancestors = [one for one in source.get("derived_from") or () if isinstance(one, str)]
        return self._removals.before(str(source.get("id") or ""), raw, ancestors) or self._removals.covers(str(source.get("text_sha256") or raw))

    def facts(self) -> dict:
        """For the manifest: whose what was used is, under which licence, what is to be known of that; and the list of removals."""
        seen = sorted(self._seen, key=lambda one: (one.name, one.licence, one.owner, one.forbids or ()))
        warned = dict.fromkeys(licences.warnings((whose.described() for whose in seen), self._settings.uses))
        found = {"sources": [whose.described() | {"records": self._seen[whose]} for whose in seen], "warnings": list(warned)}
        if self._settings.uses:
            found |= {"uses": list(self._settings.uses)}
        if (path := self._settings.removals) is not None:
            found |= {"removals": {"file": str(path), "entries": len(entries(path)), "sha256": file_sha256(Path(path))}}
        return found


def _whose(source: Mapping) -> _Whose:
    def text(name: str) -> str:
        return source[name] if isinstance(source.get(name), str) else ""

    forbids = source.get("forbids")
    forbids = tuple(one for one in forbids if isinstance(one, str)) if isinstance(forbids, list) else None
    return _Whose(text("collection") or text("file") or text("id") or "(no source)", text("licence"), text("owner"), forbids)
