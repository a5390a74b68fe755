"""Arrays and what is known of them in one file: numpy's .npz without pickle. So are kept what is learnt or indexed once: an n-gram model, domains, evaluation sets."""
import contextlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from megatron_ext.errors import UserError


def save(path: str | Path, about: Mapping, arrays: Mapping[str, np.ndarray], *, format: str, compressed: bool = False) -> None:
    """about: JSON; `format` goes into it. The same arrays give the same bytes."""
    header = json.dumps({**about, "format": format}, sort_keys=True, ensure_ascii=False).encode()
    with open(path, "wb") as file:
        (np.savez_compressed if compressed else np.savez)(file, about=np.frombuffer(header, dtype=np.uint8), **arrays)


@contextlib.contextmanager
def opened(path: str | Path, *, format: str, key: str, kind: str, command: str) -> Iterator[tuple[dict, Mapping[str, np.ndarray]]]:
    """(about, the arrays by name, read when asked for).

    Args:
        kind: what it should be, such as "domain model". command: that writes one.

    Raises:
        UserError: not there, not of this format; whatever is wrong inside, also what the caller finds (ValueError, KeyError, TypeError, IndexError).
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(file["about"].tobytes())
            if about["format"] != format:
                raise UserError(key, path, f"is of format {about['format']}; this version reads {format}: write it anew with {command}")
            yield about, file
    except OSError as error:
        raise UserError(key, path, f"cannot be read ({error.strerror}); write one with {command}") from error
    except (ValueError, KeyError, TypeError, EOFError, IndexError, zipfile.BadZipFile) as error:
        raise UserError(key, path, f"is no {kind} ({type(error).__name__}); write one with {command}") from error
