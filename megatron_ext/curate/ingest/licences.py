"""What the licences of text sources forbid. A help to people, not legal advice: it keeps what a catalogue says from being lost on the way to a model.

Uses: `commercial` (the model earns money), `redistribute` (text or model is given to others), `adapt` (works made from it; a model is taken for one here).
"""
import fnmatch
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

USES = ("commercial", "redistribute", "adapt")
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Licence:
    """`patterns`: names by which a catalogue may call it, lower case, as of fnmatch. `asks`: what has to be done in any case."""

    name: str
    patterns: tuple[str, ...]
    forbids: tuple[str, ...] = ()
    asks: str = ""


SOURCE = "name the source"
LICENCES = (
    Licence("KOGL type 1", ("kogl-1", "kogl type 1", "공공누리 1유형", "공공누리 제1유형"), (), SOURCE),
    Licence("KOGL type 2", ("kogl-2", "kogl type 2", "공공누리 2유형", "공공누리 제2유형"), ("commercial",), SOURCE),
    Licence("KOGL type 3", ("kogl-3", "kogl type 3", "공공누리 3유형", "공공누리 제3유형"), ("adapt",), SOURCE),
    Licence("KOGL type 4", ("kogl-4", "kogl type 4", "공공누리 4유형", "공공누리 제4유형"), ("commercial", "adapt"), SOURCE),
    Licence("CC BY-NC-ND", ("cc-by-nc-nd*", "cc by-nc-nd*"), ("commercial", "adapt"), SOURCE),
    Licence("CC BY-NC", ("cc-by-nc*", "cc by-nc*"), ("commercial",), SOURCE),
    Licence("CC BY-ND", ("cc-by-nd*", "cc by-nd*"), ("adapt",), SOURCE),
    Licence("CC BY-SA", ("cc-by-sa*", "cc by-sa*"), (), "name the source; what is made from it goes under the same licence"),
    Licence("CC BY", ("cc-by*", "cc by*"), (), SOURCE),
    Licence("AI Hub", ("aihub*", "ai-hub*", "ai hub*"), ("redistribute",), "name NIA and AI Hub; no export abroad without their consent"),
    Licence("NIKL", ("nikl*", "모두의 말뭉치*"), ("redistribute",), "the corpus agreement of the National Institute of Korean Language"),
    Licence("no copyright", ("no-copyright", "no copyright", "public-domain", "public domain", "cc0*", "pd"), ()),
    Licence("open", ("mit", "apache-2.0", "bsd*", "odc-by*", "odbl*", "psf*", "isc"), (), "keep its notice"),
    Licence("own", ("own", "internal", "proprietary"), ("redistribute",), "the owner decides"),
)


@functools.lru_cache(maxsize=4096)
def licence(name: str) -> Licence | None:
    """The licence that a catalogue means; None for one that is not known here."""
    word = " ".join(name.lower().split())
    return next((one for one in LICENCES if any(fnmatch.fnmatch(word, pattern) for pattern in one.patterns)), None)


def forbidden(source: Mapping) -> tuple[str, ...]:
    """What may not be done with a source (as the manifest has it: `licence`, and `forbids` where its catalogue says so itself)."""
    said = source.get("forbids")
    if said is not None:
        return tuple(said)
    known = licence(str(source.get("licence") or UNKNOWN))
    return known.forbids if known else ()


def is_known(source: Mapping) -> bool:
    """Whether a catalogue says what may be done with a source, by a licence that is known here or by itself."""
    return licence(str(source.get("licence") or UNKNOWN)) is not None or source.get("forbids") is not None


def warnings(sources: Iterable[Mapping], uses: Iterable[str] = USES) -> list[str]:
    """Sentences about sources that stand in the way of the uses, or of which nothing is known."""
    found, uses = [], tuple(uses)
    for source in sources:
        name, word = source["name"], str(source.get("licence") or UNKNOWN)
        against = [use for use in forbidden(source) if use in uses]
        own = {use: one.name for one in LICENCES if one.name in source.get("licences", ()) for use in one.forbids if use in uses and use not in against}
        if own:
            found.append(f"{name}: documents of it name licences of their own ({', '.join(sorted(set(own.values())))}), which forbid: {', '.join(own)}")
        if against:
            found.append(f"{name}: its licence ({word}) forbids: {', '.join(against)}")
        elif not source.get("licence_known", is_known(source)):
            found.append(f"{name}: nothing is known of its licence ({word}); find out before the model is used or given away")
    return found
