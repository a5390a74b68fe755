"""`samples.md`: what the policy answered before and after, side by side, out of `samples.jsonl`.

A line of samples.jsonl is {"step", "prompt", "response", "reward", "kl", "stop"}; the lowest step is before, the greatest after. Answers are put into
an HTML table as `<pre>`, everything escaped: what a model wrote cannot become markup of the page.
"""
import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.observe.lines import read_lines

SHOWN = 40  # prompts on the page
LONGEST = 4000  # characters of a text on the page


@dataclass(frozen=True)
class Pair:
    """A prompt that was answered twice. before, after: lines of samples.jsonl."""

    prompt: str
    before: dict
    after: dict

    @property
    def gain(self) -> float | None:
        """Reward after less reward before; None where one has none."""
        rewards = [one.get("reward") for one in (self.before, self.after)]
        if not all(isinstance(reward, (int, float)) and math.isfinite(reward) for reward in rewards):
            return None
        return rewards[1] - rewards[0]


def read_pairs(path: Path) -> list[Pair]:
    """In the order of the first answers; prompts that were answered once only are left out. A step that was done twice counts as it was last."""
    found: dict[int, dict[str, dict]] = {}
    for line in read_lines(path):
        if isinstance(line.get("step"), int) and isinstance(line.get("prompt"), str):
            found.setdefault(line["step"], {})[line["prompt"]] = line
    if len(found) < 2:
        return []
    before, after = found[min(found)], found[max(found)]
    return [Pair(prompt, one, after[prompt]) for prompt, one in before.items() if prompt in after]


def page(pairs: Sequence[Pair], title: str) -> str:
    """The Markdown of samples.md."""
    parts = [f"# {title}", f"{len(pairs):,} held-out prompts, answered at step {pairs[0].before['step']:,} and at step {pairs[0].after['step']:,}."
             + (f" The first {SHOWN} of them:" if len(pairs) > SHOWN else "")]
    return "\n\n".join([*parts, *(side_by_side(pair, number) for number, pair in enumerate(pairs[:SHOWN], 1))]) + "\n"


def side_by_side(pair: Pair, number: int) -> str:
    """A prompt with its two answers: an HTML table without an empty line, which would end it in Markdown."""
    gain = "" if pair.gain is None else f", reward {pair.gain:+.3f}"
    heads = "".join(f"<th align=\"left\">{_head(name, one)}</th>" for name, one in (("before", pair.before), ("after", pair.after)))
    cells = "".join(f"<td valign=\"top\"><pre>{_inside(one.get('response'))}</pre></td>" for one in (pair.before, pair.after))
    return f"**{number}**{gain}\n\n<table>\n<tr><td colspan=\"2\"><pre>{_inside(pair.prompt)}</pre></td></tr>\n<tr>{heads}</tr>\n<tr>{cells}</tr>\n</table>"


def _head(name: str, sample: dict) -> str:
    words = [f"{key} {value:.3f}" for key in ("reward", "kl") if isinstance(value := sample.get(key), (int, float))]
    words += [f"ends by {sample['stop']}"] if sample.get("stop") else []
    return html.escape(f"{name}: {', '.join(words)}" if words else name)


def _inside(text: object) -> str:
    text = "" if text is None else str(text)
    if len(text) > LONGEST:
        text = text[:LONGEST] + f" ... ({len(text) - LONGEST:,} characters more)"
    return html.escape(text).replace("\r", "").replace("\n", "&#10;") or "(empty)"
