"""Where imported weights come from and what their licence says: written into the checkpoint's record, whose hash every later checkpoint's chain
goes back to, and told when weights leave again.

The licence is what the directory says: the front matter of its README.md (a model card), files such as LICENSE and USE_POLICY.md. Where it says nothing,
that is recorded. Nothing here is legal advice; it keeps what was said from being lost.
"""
import fnmatch
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ext.checkpoint.manifest import hash_file
from megatron_ext.curate.ingest import licences
from megatron_ext.errors import UserError

if TYPE_CHECKING:
    from megatron_ext.convert.family import Family
    from megatron_ext.convert.settings import Settings

CARD = "README.md"
LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "COPYING*")
# Licences (as model cards name them, by pattern) that forbid a use, and which.
RESTRICTED = (
    ("*-nc*", "non-commercial use only"),
    ("opt-175b", "Meta's OPT-175B licence: non-commercial research only, no redistribution outside of it"),
    ("llama2|llama3|llama3.1|llama3.2|llama3.3|llama4", "Meta's community licence: it has to be given along, 'Built with Llama' said, its use policy kept"),
    ("gemma", "Google's Gemma terms: their use restrictions have to be passed on"),
    ("*rail*", "a RAIL licence: its use restrictions have to be passed on"),
    ("mrl|mnpl*|mistral-research*", "Mistral's research licence: non-commercial use only"),
    ("qwen-research|tongyi-qianwen-research", "Qwen's research licence: non-commercial use only"),
    ("tongyi-qianwen|qwen", "Qwen's licence: products with over 100 million monthly users need another one"),
    ("deepseek", "DeepSeek's licence: its use restrictions have to be passed on"),
    ("apple-amlr|apple-ascl", "Apple's licence: research only"),
)
NONE = "unknown"


def read(directory: Path, family: "Family", settings: "Settings") -> dict:
    """What a directory says of itself: {"name", "licence", "card": {...}, "licence_files": {name: sha256}}. Raises UserError: a card that is not text."""
    card = _card(directory / CARD)
    words = [card.get(key) for key in ("license_name", "license")]
    licence = next((word.strip().lower() for word in words if isinstance(word, str) and word.strip() and word.strip().lower() != "other"), None)
    name = next((word for word in (card.get("model_name"), card.get("model_id"), settings.get("_name_or_path")) if isinstance(word, str) and word), None)
    kept = {key: card[key] for key in ("license", "license_name", "license_link", "commercial", "base_model") if key in card}
    return {
        "format": "hugging_face", "family": family.name, "name": name or directory.absolute().name, "licence": licence or family.licence or NONE,
        "licence_from": CARD if licence else f"the family {family.name}" if family.licence else None, "card": kept,
        "licence_files": {path.name: hash_file(path) for path in licence_files(directory) if path.name != CARD},
    }


def licence_files(directory: Path) -> list[Path]:
    """The licence's texts and the model card."""
    return sorted({path for pattern in (*LICENCE_FILES, CARD) for path in Path(directory).glob(pattern) if path.is_file()})


def warnings(origin: Mapping) -> list[str]:
    """What has to be said before weights of an origin are given away; empty where nothing is known that forbids a use."""
    if origin.get("format") != "hugging_face":
        return []  # of one's own training
    licence, name = str(origin.get("licence", NONE)), origin.get("name")
    said = [f"{name}: {text} ({licence})" for patterns, text in RESTRICTED if any(fnmatch.fnmatch(licence, pattern) for pattern in patterns.split("|"))][:1]
    if not said and origin.get("card", {}).get("commercial") is False:
        said = [f"{name}: its model card says that commercial use is not allowed"]
    if not said and licence == NONE:
        said = [f"{name}: its directory says nothing of a licence; find out before the weights are given away"]
    return said


def front_matter(origin: Mapping) -> str:
    """A model card that carries the licence on: exported weights are still its weights, or made from them."""
    card = origin.get("card", {})
    lines = ["---"]
    if origin.get("licence") not in (None, NONE) or "license" in card:
        lines.append(f"license: {_quoted(card.get('license', origin.get('licence')))}")
    lines += [f"{key}: {_quoted(card[key])}" for key in ("license_name", "license_link") if isinstance(card.get(key), str)]
    if card.get("commercial") is False:
        lines.append("commercial: false")
    lines += [f"base_model: {_quoted(origin['name'])}", "---", "", f"Exported by megatron_ext; made from {origin['name']}.", ""]
    lines += [f"- {line}" for line in warnings(origin)]
    return "\n".join(lines).rstrip() + "\n"


def data_warnings(curation: Sequence[Mapping]) -> list[str]:
    """What the licences of the texts that a model was trained on forbid, and what is not known of them."""
    return list(dict.fromkeys(line for one in curation for line in licences.warnings(one["sources"])))


def data_card(curation: Sequence[Mapping]) -> str:
    """The part of a model card that names the texts: source, owner, licence, what has to be done and what is forbidden."""
    if not curation:
        return ""
    lines = ["", "## Trained on", "", "| source | owner | licence | asks | forbids | documents |", "|---|---|---|---|---|---|"]
    for one in curation:
        for source in one["sources"]:
            cells = (source["name"], source.get("owner"), source.get("licence"), source.get("asks"), ", ".join(source.get("forbids", ())), source.get("documents_out"))
            lines.append("| " + " | ".join(str(cell or "").replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    lines += ["", *(f"- {line}" for line in data_warnings(curation))]
    lines += ["", *(f"Manifest {one['manifest_sha256']}" for one in curation)]
    return "\n".join(lines).rstrip() + "\n"


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _card(path: Path) -> dict:
    """The front matter of a model card: YAML between two lines of three dashes."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("hf", path, f"cannot be read ({error}), and may say under what licence the weights are") from None
    parts: Sequence[str] = text.split("---\n", 2) if text.startswith("---\n") else ()
    if len(parts) < 3:
        return {}
    import yaml

    try:
        found = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _quoted(value: object) -> str:
    return json.dumps(str(value), ensure_ascii=False)
