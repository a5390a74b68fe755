"""Markdown of reports: tables, fenced text, events. Whatever is put in stays what it is: bars, backticks and newlines end nothing."""
from collections.abc import Mapping, Sequence


def event_table(events: Sequence[dict], most: int = 40) -> str:
    """A row an event; of more than `most` the middle is left out."""
    shown = list(events) if len(events) <= most else [*events[: most // 4], None, *events[-(most - most // 4):]]
    rows = ["| time | event | |", "|---|---|---|"]
    for event in shown:
        if event is None:
            rows.append(f"| ... | {len(events) - most} events left out | |")
            continue
        details = ", ".join(f"{k} {value(v)}" for k, v in event.items() if k not in ("time", "kind") and not nested(v))
        rows.append(f"| {cell(str(event.get('time', ''))[:19].replace('T', ' '))} | {cell(event.get('kind', ''))} | {cell(details)} |")
    return "\n".join(rows)


def table(rows: Mapping[str, object]) -> str:
    """Names and values."""
    return "\n".join(["| | |", "|---|---|", *(f"| {cell(name)} | {cell(value(one))} |" for name, one in rows.items())])


def columns(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table of several columns."""
    lines = [head, ["---"] * len(head), *([cell(value(one)) for one in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def nested(found: object) -> bool:
    """A list of lists: no word of an event."""
    return isinstance(found, list) and bool(found) and isinstance(found[0], list)


def value(found: object) -> str:
    """As people read it: thousands apart, six digits."""
    if isinstance(found, bool) or found is None:
        return {True: "yes", False: "no", None: "-"}[found]
    if isinstance(found, int):
        return f"{found:,}"
    if isinstance(found, float):
        return f"{found:.6g}"
    return str(found)


def cell(text: object) -> str:
    """Inside a table."""
    return str(text).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def fenced(text: str, language: str = "text") -> str:
    """A block of text, whatever it holds."""
    fence = "```"
    while fence in text:  # a text may hold fences of its own
        fence += "`"
    return f"{fence}{language}\n{text.rstrip(chr(10))}\n{fence}"
