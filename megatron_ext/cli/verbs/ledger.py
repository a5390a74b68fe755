"""`ledger seen` and `ledger remove`: which runs saw a document, and that it must not come in again. No torch."""
import json
from pathlib import Path
from typing import Any

from megatron_ext.chain import key_of
from megatron_ext.cli.options import Options
from megatron_ext.config.schema import Config
from megatron_ext.errors import UserError

FOLDER = "outputs"  # where runs are looked for unless run.dir says


def ledger(config: Config, options: Options) -> int:
    """Raises UserError: no action, no document, or one that cannot be told; no list to write to."""
    if options.action is None:
        raise UserError("ledger", "", "say what: ledger seen --document X, or ledger remove --document X curate.removals=FILE")
    if not options.documents:
        raise UserError("--document", "", "name a document: a file, SOURCE:PATH[#POSITION], its id or its sha256 (repeatable)")
    if options.action == "remove" and config.curate.removals is None:
        raise UserError("curate.removals", "null", "name the list to write: ledger remove --document X curate.removals=FILE; builds read it under the same key")
    from megatron_ext.curate import ledger as look_up
    from megatron_ext.curate.privacy.hidden import Hidden

    folder = Path(config.run.dir if any(key_of(word) == "run.dir" for word in options.overrides) else FOLDER)
    asked, hidden = look_up.Wanted(), Hidden(("privacy",), config.curate.privacy)
    for text in options.documents:
        asked |= look_up.wanted(text, hidden)
    runs = list(look_up.runs_in(folder))
    places = [(place, found) for place in look_up.directories(runs, config.output) if (found := look_up.held(place, asked)) is not None]
    asked |= look_up.Wanted(ids=frozenset(entry["id"] for _, found in places for entry in found.entries))
    copied = look_up.Copied.of([place for place, _ in places], asked)
    if options.action == "remove":  # a copy of it that was dropped would come back, and one that stays in its place says what it says
        asked |= look_up.Wanted(ids=copied.stay | (copied.shared if options.shared else frozenset()))
        places = [(place, look_up.held(place, asked)) for place, _ in places]
    held = [found for _, found in places if found.entries]
    entries = {json.dumps(entry, sort_keys=True): entry for entry in (*(one for found in held for one in found.entries), *copied.entries)}
    asked |= look_up.Wanted(ids=frozenset(entry["id"] for entry in entries.values()))
    seen = look_up.look(runs, asked if options.action == "remove" else asked | look_up.Wanted(ids=copied.stay))
    added = None
    if options.action == "remove":
        from megatron_ext.curate import removals

        # What no build holds now is removed by what it was named by: a later input may bring it.
        plain = [{"id": one} for one in sorted(asked.ids - {entry["id"] for entry in entries.values()})]
        plain += [{name: one} for name, ones in (("sha256", asked.raw), ("text_sha256", asked.texts)) for one in sorted(ones)]
        added = removals.add(config.curate.removals, [*entries.values(), *plain])
    _tell(config, options, folder, held, copied, seen, added)
    return 0


def _tell(config: Config, options: Options, folder: Path, held: list, copied: Any, seen: list, added: int | None) -> None:
    if options.json:
        print(json.dumps({
            "documents": [{"directory": str(found.directory), "splits": found.numbers, "entries": list(found.entries)} for found in held],
            "copies": list(copied.entries), "stay": sorted(copied.stay), "shared": sorted(copied.shared), "unknown": copied.unknown,
            "runs": [{"run": str(one.run), "stage": one.stage, "step": one.step, "seen": one.seen, "samples": one.samples, "reasons": one.reasons,
                      "unknown": one.unknown} for one in seen], "added": added}))
        return
    for found in held:
        print(f"{found.directory} holds {len(found.entries)} of them: " + ", ".join(f"{len(numbers)} in {split}" for split, numbers in found.numbers.items()))
    if copied.stay and options.action == "seen":
        print(f"builds dropped it as a copy: {', '.join(sorted(copied.stay))} stayed in its place, and the runs below are told with that")
    if copied.entries:
        print(f"{len(copied.entries)} documents that builds dropped as copies "
              + ("belong to it: ledger remove takes them too" if added is None else "go with it: with it gone they would come back"))
    if copied.shared:
        print(f"{len(copied.shared)} documents hold paragraphs of it, and lost them to it"
              + ("" if added is None else "; they are removed" if options.shared else "; they get them back in the next build. --shared removes these documents as well"))
    for line in copied.unknown:
        print(f"warning: {line}")
    if not held:
        print(f"no prepared directory of the runs in {folder} holds any of them")
    for one in seen:
        print(one.sentence())
    if not seen:
        print(f"no runs in {folder}; run.dir=FOLDER names another")
    if added is not None:
        print(f"{added} entries added to {config.curate.removals}. The next build leaves out these documents, copies of them and what names them as its origin: "
              f"prepare ... curate.removals={config.curate.removals}, to a new output")
        if held:
            print("Until then remove: " + ", ".join(str(found.directory) for found in held) + "; and what was trained on them: "
                  + (", ".join(str(one.run) for one in seen if one.seen) or "nothing"))
