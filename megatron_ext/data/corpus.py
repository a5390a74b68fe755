"""The embedded default corpus: the source code and documentation strings of the installed Python's standard library.

Real text that is on every machine (some 10 MB, about 600 files), read where Python keeps it, one document a file. Left out are
tests, what is generated on the machine (`_sysconfigdata_*`, `config-*`: build paths), bundled wheels, `site-packages`, `lib2to3`, which newer Pythons
do not have, and the generated character tables of `encodings` (1.3 MB of hexadecimal numbers, nearly the same in
80 files: they would stand on both sides of the split and make every model look better than it is). The order is that of the relative paths, so one Python gives one corpus; another patch release gives another one,
which is why reports state its hash.
"""
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

_LEFT_OUT_DIRECTORIES = frozenset({
    "__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "ensurepip", "_bundled", "lib-dynload",
})


_TABLE = b"Python Character Mapping Codec"  # how the generator of these files opens their documentation string


def stdlib_files(root: Path | None = None) -> list[Path]:
    """Paths of the corpus, sorted by their relative POSIX path.

    Args:
        root: the library's directory; None = the running Python's (inside a virtual environment: the base installation's).
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    kept = [path for path in root.rglob("*.py") if path.is_file() and not _left_out(path.relative_to(root).parts)]
    return sorted(kept, key=lambda path: path.relative_to(root).as_posix())


def stdlib_documents(root: Path | None = None, *, read: Callable[[int], None] = lambda size: None) -> Iterator[str]:
    """The text of each file that holds any and is UTF-8 (all of them in CPython's own distributions). `read` hears of the bytes taken."""
    for path in stdlib_files(root):
        content = path.read_bytes()
        read(len(content))
        if path.parent.name == "encodings" and _TABLE in content[:200]:
            continue
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            continue  # a distributor's file in another encoding: no loss of the user's data, the hash states what was taken
        if text:
            yield text


def _left_out(parts: tuple[str, ...]) -> bool:
    directories, name = parts[:-1], parts[-1]
    return (
        any(part in _LEFT_OUT_DIRECTORIES or part.startswith("config-") for part in directories) or name.startswith("_sysconfigdata")
    )
