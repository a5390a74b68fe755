"""The files beside the weights: tokenizer, chat template, settings of generation, licence. They are kept in the run directory of an imported checkpoint,
used when it generates, and given back when it is exported.

    RUN/tokenizer.json          what every command reads
    RUN/hugging_face/           the files as they were
"""
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_ext.checkpoint.manifest import hash_file
from megatron_ext.convert.origin import licence_files
from megatron_ext.errors import UserError

FOLDER = "hugging_face"
GENERATION = "generation_config.json"
TOKENIZER = "tokenizer.json"
FILES = (
    "config.json", GENERATION, TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "tekken.json",
)


def copy(source: Path, run_dir: Path) -> dict[str, str]:
    """Copies what a directory holds beside its weights; the files' sha256 by name."""
    folder = run_dir / FOLDER
    folder.mkdir()
    files = [source / name for name in FILES if (source / name).is_file()] + licence_files(source)
    for file in files:
        shutil.copyfile(file, folder / file.name)
    return {file.name: hash_file(folder / file.name) for file in sorted(files)}


def tokenizer(directory: Path) -> bytes | None:
    """The `tokenizer.json` of a directory, or one made of the `vocab.json` and `merges.txt` of a byte-level BPE (OPT has these alone); None where it
    has neither. Raises UserError: files that cannot be read as such."""
    if (directory / TOKENIZER).is_file():
        return (directory / TOKENIZER).read_bytes()
    if (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
        return _byte_level(directory)
    return None


def _byte_level(directory: Path) -> bytes:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    try:
        inner = tokenizers.Tokenizer(models.BPE.from_file(str(directory / "vocab.json"), str(directory / "merges.txt")))
    except Exception as error:  # noqa: BLE001 the library raises no other
        raise UserError("hf", directory, f"its vocab.json and merges.txt are no byte-level BPE: {str(error).splitlines()[0][:200]}") from None
    said = _tokenizer_settings(directory)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(said.get("add_prefix_space", False)), use_regex=True)
    inner.decoder = decoders.ByteLevel()
    special = {text for key, value in said.items() if key.endswith("_token") and (text := _text(value))}
    known = [text for text in sorted(special) if inner.token_to_id(text) is not None]
    inner.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in known])
    begin = _text(said.get("bos_token"))
    if said.get("add_bos_token") and begin and inner.token_to_id(begin) is not None:
        inner.post_processor = processors.TemplateProcessing(single=f"{begin} $A", pair=f"{begin} $A {begin} $B",
                                                             special_tokens=[(begin, inner.token_to_id(begin))])
    return inner.to_str().encode()


def _tokenizer_settings(directory: Path) -> dict:
    """What the files beside a tokenizer.json say, the special tokens among it."""
    return _json(directory / "tokenizer_config.json") | _json(directory / "special_tokens_map.json")


def _text(token: object) -> str | None:
    """How a special token is written: files hold the text, or a table with it."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _json(path: Path) -> dict:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError("hf", path, f"cannot be read ({str(error)[:80]})") from None
    return found if isinstance(found, dict) else {}


def ends(directory: Path) -> tuple[int, ...]:
    """The tokens that end a completion, as the settings of generation say, or else the configuration."""
    for name in (GENERATION, "config.json"):
        found = _json(directory / name).get("eos_token_id")
        ids = found if isinstance(found, Sequence) else [found]
        if all(type(one) is int for one in ids) and ids:
            return tuple(ids)
    return ()


def end_text(directory: Path) -> str | None:
    """How the end of a document is written, where a file of the tokenizer says so."""
    return _text(_tokenizer_settings(directory).get("eos_token"))


def begin_text(directory: Path) -> str | None:
    """How the beginning of a text is written, where a file of the tokenizer says so."""
    return _text(_tokenizer_settings(directory).get("bos_token"))
