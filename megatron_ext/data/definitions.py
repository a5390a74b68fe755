"""The functions, methods and classes of the standard library that have a documentation string, read with `ast`: nothing is imported or run.

Two uses: a corpus of documentation alone (`data.corpus=stdlib-docs`, the domain of the `adapt` stage), and the questions and answers of the
stages behind it (`rlhf/data/stdlib_tasks.py`). The order is that of the files and, within a file, of the source, so one Python gives
one sequence of definitions.
"""
import ast
import sysconfig
import textwrap
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.data.corpus import stdlib_files

_DEFINES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)

# Modules that are known, and documented, under another name than their file's.
_KNOWN_AS = {"posixpath": "os.path", "_pyio": "io", "_pydecimal": "decimal", "_pydatetime": "datetime"}


@dataclass(frozen=True)
class Definition:
    """One definition.

    Attributes:
        name: as it is called, such as `os.path.join` or `collections.Counter.most_common`.
        header: its first line, such as `def join(a, *p):`, without decorators and annotations; of a class `class Counter(dict):`.
        documentation: its documentation string without the indentation, not empty.
        body: the source behind the documentation string without the indentation; empty for a class.
    """

    name: str
    header: str
    documentation: str
    body: str

    @property
    def is_class(self) -> bool:
        return self.header.startswith("class ")

    @property
    def call(self) -> str:
        """`os.path.join(a, *p)`; of a class its name."""
        return self.name if self.is_class else self.name + self.header[self.header.index("(") : -1]

    @property
    def module(self) -> str:
        """The first part of the name: `os` of `os.path.join`."""
        return self.name.partition(".")[0]


@dataclass(frozen=True)
class Module:
    """A file: its name, its own documentation string (may be empty), and its definitions."""

    name: str
    documentation: str
    definitions: tuple[Definition, ...]


def stdlib_modules(root: Path | None = None, *, read: Callable[[int], None] = lambda size: None) -> Iterator[Module]:
    """Every file of the corpus that parses.

    Args:
        root: as for `stdlib_files`.
        read: hears of the bytes taken from disk.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    for path in stdlib_files(root):
        content = path.read_bytes()
        read(len(content))
        try:
            text = content.decode("utf-8").replace("\r\n", "\n")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of escape sequences in other people's strings
                tree = ast.parse(text)
        except (UnicodeDecodeError, SyntaxError, ValueError, RecursionError):
            continue  # a file that a distributor put there, for another Python; CPython's own parse
        name = _module_name(path.relative_to(root))
        lines = text.split("\n")  # as the parser counts: `splitlines` would also cut at form feeds
        yield Module(name, _documentation(tree), tuple(_definitions(tree, name, lines)))


def doc_documents(root: Path | None = None, *, read: Callable[[int], None] = lambda size: None) -> Iterator[str]:
    """The corpus of documentation: of each file one document, its own documentation string and each definition's name and string."""
    for module in stdlib_modules(root, read=read):
        parts = [f"{module.name}\n{module.documentation}"] if module.documentation else []
        parts += [f"{found.call}\n{found.documentation}" for found in module.definitions]
        if parts:
            yield "\n\n".join(parts) + "\n"


def _module_name(relative: Path) -> str:
    parts = list(relative.with_suffix("").parts)
    if parts[-1] in ("__init__", "__main__") and len(parts) > 1:
        parts.pop()
    name = ".".join(parts)
    return _KNOWN_AS.get(name, name)


def _documentation(node: ast.AST) -> str:
    return (ast.get_docstring(node) or "").strip()


def _definitions(tree: ast.AST, prefix: str, lines: list[str]) -> Iterator[Definition]:
    """Depth first; what is inside functions is nobody's interface."""
    for node in _statements(tree):
        if isinstance(node, _DEFINES):
            name = f"{prefix}.{node.name}"
            documentation = _documentation(node)
            if documentation:
                yield Definition(name, _header(node), documentation, _body(node, lines))
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node, name, lines)


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """The statements of a body, those under `if` and `try` within, in the source's order."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.If, ast.Try, ast.ExceptHandler)):
            yield from _statements(child)
        elif isinstance(child, ast.stmt):
            yield child


def _header(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases}):" if bases else f"class {node.name}:"
    arguments = node.args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if argument is not None:
            argument.annotation = None
    word = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    return f"{word} {node.name}({ast.unparse(arguments)}):"


def _body(node: ast.AST, lines: list[str]) -> str:
    if isinstance(node, ast.ClassDef) or len(node.body) < 2:
        return ""
    after = node.body[0].end_lineno  # from the line behind the documentation string: comments stay
    return textwrap.dedent("\n".join(lines[after : node.end_lineno])).strip("\n")
