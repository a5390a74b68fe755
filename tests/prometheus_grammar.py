"""A strict reader of Prometheus' text format 0.0.4, written from its description
(https://prometheus.io/docs/instrumenting/exposition_formats, "Text format details"), and what node_exporter's textfile collector asks beyond it."""
import re

_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_LABEL = r"[a-zA-Z_][a-zA-Z0-9_]*"
_SAMPLE = re.compile(rf"({_NAME})(?:\{{(.*)\}})? (\S+)")
_PAIR = re.compile(rf'({_LABEL})="((?:[^"\\\n]|\\\\|\\"|\\n)*)"(,|$)')
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?|NaN|[+-]Inf")
KINDS = ("counter", "gauge", "histogram", "summary", "untyped")


def _plain(text: str) -> str:
    return re.sub(r"\\(.)", lambda found: "\n" if found[1] == "n" else found[1], text)


def read(text: str) -> dict[str, dict]:
    """name -> {"help", "type", "samples": {labels as a frozenset of pairs: value}}. Raises AssertionError for what the format does not allow."""
    assert text.endswith("\n"), "the last line must end with a line feed"
    found: dict[str, dict] = {}
    current = None
    for line in text[:-1].split("\n"):
        assert line == line.strip() and line, line
        if line.startswith("#"):
            word, name, rest = re.fullmatch(rf"# (HELP|TYPE) ({_NAME}) (.*)", line).groups()
            if word == "HELP":
                assert name not in found, f"{name}: the samples of a name must stand together"
                assert re.fullmatch(r"(?:[^\\]|\\\\|\\n)*", rest), line
                current, found[name] = name, {"help": _plain(rest), "type": None, "samples": {}}
            else:
                assert name == current and found[name]["type"] is None and not found[name]["samples"] and rest in KINDS, line
                found[name]["type"] = rest
            continue
        name, labels, value = _SAMPLE.fullmatch(line).groups()  # three parts: a time stamp, which node_exporter refuses, has no place
        assert name == current and found[name]["type"], line
        assert _NUMBER.fullmatch(value), line
        pairs, at = [], 0
        while labels and at < len(labels):
            pair = _PAIR.match(labels, at)
            assert pair and not pair[1].startswith("__") and (pair[3] or pair.end() == len(labels)), line
            pairs.append((pair[1], _plain(pair[2])))
            at = pair.end()
        assert len(dict(pairs)) == len(pairs) and frozenset(pairs) not in found[name]["samples"], line
        found[name]["samples"][frozenset(pairs)] = float(value)
    return found
