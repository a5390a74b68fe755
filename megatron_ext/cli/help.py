"""The help pages. The keys of a verb, their defaults and meanings are read from `schema.py` itself: one place says them."""
import importlib.metadata

from megatron_ext.cli.options import FLAGS, TAKES, VALUES, VERBS


def version() -> str:
    """The installed version, or what a checkout that is not installed can say."""
    try:
        return importlib.metadata.version("megatron-ext")
    except importlib.metadata.PackageNotFoundError:
        return "(checkout, not installed)"


def overview() -> str:
    """The page of `--help`."""
    verbs = "\n".join(f"  {verb:<10}{text}" for verb, text in VERBS.items())
    return f"""python -m megatron_ext VERB [key=value ...] [group=preset ...] [--options]

{verbs}

Each verb has its own page: python -m megatron_ext VERB --help
Start here:  python -m megatron_ext run"""


def verb_page(verb: str) -> str:
    """The page of `VERB --help`."""
    lines = [f"python -m megatron_ext {verb} [key=value ...]", "", f"  {VERBS[verb]}"]
    if TAKES[verb]:
        lines += ["", *(f"  {name:<16}{(FLAGS | VALUES)[name]}" for name in TAKES[verb])]
    return "\n".join(lines)
