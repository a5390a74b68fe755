"""Rules of `collect`: each action's input and output, endpoints, annotators. No torch."""
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from megatron_ext.config.curating import curate_files_exist, uses_are_known
from megatron_ext.config.layouts import Rule, ranks_fit
from megatron_ext.config.schema import Config
from megatron_ext.errors import UserError

ACTIONS = ("build", "augment", "serve", "export", "status")
_NAME = re.compile(r"[\w][\w .@-]{0,39}")


def input_is_there(config: Config) -> Iterator[UserError]:
    if config.input is None:
        yield UserError("input", "null", "name what is read: a file, or a directory of collected data")
    elif not Path(config.input).exists():
        yield UserError("input", config.input, "is not there")


def input_is_a_directory(config: Config) -> Iterator[UserError]:
    if config.input is not None and Path(config.input).exists() and not Path(config.input).is_dir():
        yield UserError("input", config.input, "is a file; name the directory that holds tasks.jsonl")


def output_is_given(config: Config) -> Iterator[UserError]:
    if config.output is None:
        yield UserError("output", "null", "name the directory to write")
    elif next((part for part in (Path(config.output), *Path(config.output).parents) if part.exists() and not part.is_dir()), None):
        yield UserError("output", config.output, "is a file, or lies below one; name a directory")


def somebody_replies(config: Config) -> Iterator[UserError]:
    collect, load = config.collect, config.checkpoint.load
    if (collect.endpoint is None) == (load is None):
        if load is None:
            yield UserError("collect.endpoint", "null", "name who replies: an address such as https://host/v1, or checkpoint.load=RUN for a model of "
                                                        "our own")
        else:
            yield UserError("collect.endpoint", collect.endpoint, "and checkpoint.load are both given: one of them replies")
    if collect.endpoint is None:
        return
    try:
        parts = urlsplit(collect.endpoint)
        right = parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.query and not parts.fragment and parts.port != 0
    except ValueError:
        right = False
    if not right:
        yield UserError("collect.endpoint", collect.endpoint, "must be the address before /chat/completions, such as https://host/v1 or "
                                                              "http://127.0.0.1:8000/v1")
    elif parts.username or parts.password:
        yield UserError("collect.endpoint", "***", "holds a user or a password, which would be written into manifests: export a key and name its "
                                                   "variable by collect.key_env")
    if collect.model is None:
        yield UserError("collect.model", "null", "name the model as the endpoint calls it")


def prices_are_known(config: Config) -> Iterator[UserError]:
    collect = config.collect
    if collect.max_cost is not None and not (collect.price_in or collect.price_out):
        yield UserError("collect.max_cost", collect.max_cost, "needs the prices of a million tokens: collect.price_in and collect.price_out")


def annotators_are_named(config: Config) -> Iterator[UserError]:
    collect = config.collect
    if not collect.annotators:
        yield UserError("collect.annotators", "[]", "name who orders answers, such as collect.annotators=[kim,lee]; each gets a link of their own")
    for name in collect.annotators:
        if not _NAME.fullmatch(name):
            yield UserError("collect.annotators", name, "is no name: letters, digits, spaces, _ . @ -, at most 40")
    if len(set(collect.annotators)) < len(collect.annotators):
        yield UserError("collect.annotators", "[" + ",".join(collect.annotators) + "]", "names somebody twice")
    for name in collect.renew:
        if name not in collect.annotators:
            yield UserError("collect.renew", name, f"is not among collect.annotators=[{','.join(collect.annotators)}]")
    if collect.votes > max(len(collect.annotators), 1):
        yield UserError("collect.votes", collect.votes, f"asks for more people than collect.annotators has ({len(collect.annotators)})")


def targets_are_numbers(config: Config) -> Iterator[UserError]:
    for entry in config.collect.targets:
        domain, _, number = entry.rpartition(":")
        if not number.isdecimal() or not domain.strip() or int(number) < 1:
            yield UserError("collect.targets", entry, "must be DOMAIN:NUMBER, such as education:10000")


RIGHTS: tuple[Rule, ...] = (curate_files_exist, uses_are_known)  # what was removed, what licences forbid: of all that makes or shows records
COLLECT: dict[str, tuple[Rule, ...]] = {
    "build": (input_is_there, output_is_given, *RIGHTS),
    "augment": (input_is_there, output_is_given, somebody_replies, prices_are_known, ranks_fit, *RIGHTS),
    "serve": (input_is_there, input_is_a_directory, annotators_are_named, targets_are_numbers, *RIGHTS),
    "export": (input_is_there, input_is_a_directory, *RIGHTS),
    "status": (input_is_there, input_is_a_directory, targets_are_numbers),
}
