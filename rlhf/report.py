"""`report.md` of the stages of RLHF: why a stage stopped, what came out of it, plots, samples before and after, and where it came from.

It is made of the pieces of megatron_ext/observe/report.py, and reads config.yaml, metrics.jsonl, events.jsonl, goodput.jsonl and samples.jsonl; any of
them may be missing, cut short, or hold a few records only. What it looks for:

    metrics     the usual names (docs/rlhf.md)
    events      stop(reason, criterion, checkpoint), best(step), samples(step, reward, reward_error, kl_k1), calibration(bins), record_skipped(count),
                reward_failed(function, reason, count)
"""
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_ext.checkpoint.ancestry import SHOWN as DIGITS
from megatron_ext.checkpoint.ancestry import data_words
from megatron_ext.config.compose import load_config
from megatron_ext.config.schema import Config
from megatron_ext.errors import UserError
from megatron_ext.observe import markdown, plots, report
from megatron_ext.observe.report import Picture, Run, Section
from rlhf import plots as own
from rlhf.samples import Pair, page, read_pairs, side_by_side

ENDS = 10  # the first and the last tenth of an iteration's numbers are compared
ON_PAGE = 3  # samples in the report itself


def write_report(run: Path | Run, *, title: str, chain: Sequence[Mapping] = (), sections: Mapping[str, Section] | None = None,
                 bytes_per_token: float | None = None) -> Path:
    """Write report.md, its plots, and samples.md where there are samples into a run's directory.

    Args:
        chain: as `checkpoint.ancestry.chain` gives it, the youngest first.
        sections: heading -> a table of names and values, or Markdown text.
        bytes_per_token: of the validation data of a language model; None = as metrics.jsonl tells.

    Returns:
        The path of the report.
    """
    run = run if isinstance(run, Run) else Run.read(run)
    parts = [f"# {title}", *stage_parts(run, bytes_per_token=bytes_per_token), *report.sections_of(sections or {})]
    if chain:
        parts.append("## Where it comes from\n\n" + chain_table(chain))
    return report.publish(run.directory, [*parts, *report.ending(run)])


def stage_parts(run: Run, *, bytes_per_token: float | None = None, prefix: str = "", level: int = 2) -> list[str]:
    """Verdict, table, plots and samples of a stage, for a page of its own or among others.

    Args:
        prefix: the way from the page to the run's directory. level: of the headings.
    """
    config, pairs = _config(run), read_pairs(run.directory / "samples.jsonl")
    bytes_per_token = bytes_per_token or run.bytes_per_token
    parts = [verdict(run), markdown.table(summary(run, config, pairs, bytes_per_token)),
             report.pictures(run, wanted(run, config, bytes_per_token), level=level, prefix=prefix),
             *report.time_parts(run, level=level, prefix=prefix)]
    if pairs:
        report.publish(run.directory, [page(pairs, "Samples, before and after")], "samples.md")
        parts.append(f"{'#' * level} Samples, before and after\n\n[All {len(pairs):,} of them]({prefix}samples.md).")
        parts += [side_by_side(pair, number) for number, pair in enumerate(pairs[:ON_PAGE], 1)]
    return parts


def verdict(run: Run) -> str:
    """The stop criterion's sentence, and which checkpoint the stage gives on."""
    said = report.verdict(run.events)
    stopped, best = run.last("stop"), run.last("best")
    if not stopped or said != f"Stopped because {stopped.get('reason')}.":
        return said
    if stopped.get("criterion"):
        said = f"{said[:-1]} (criterion: `{stopped['criterion']}`)."
    if stopped.get("checkpoint"):
        said += f" The next stage starts from `{stopped['checkpoint']}`"
        said += f", the best of its validations (step {best['step']:,})." if isinstance(best.get("step"), int) else "."
    return said


def chain_table(chain: Sequence[Mapping]) -> str:
    """The origin first. A parent that could not be read stands there with the reason."""
    rows = []
    for link in reversed(chain):
        if "broken" in link:
            rows.append(("?", None, link["hash"][:DIGITS], None, f"{link.get('path') or 'parent'}: {link['broken']}"))
            continue
        parent = link.get("parent")
        words = [f"{name} {word}" for name, word in data_words(link.get("data") or {}).items()]
        words += [f"{one['role']} {one['hash'][:DIGITS]}" for one in link.get("roles", ()) if one["hash"] != parent]
        rows.append((link.get("stage"), link.get("step"), link["hash"][:DIGITS], parent[:DIGITS] if parent else None, ", ".join(words)))
    return markdown.columns(("stage", "step", "hash", "parent", "data and other models"), rows)


# ---- the table ---------------------------------------------------------------------------------------------------------------------


def kind_of(run: Run) -> str:
    """policy (ppo, grpo, rloo) | pairs (dpo) | reward | text, by what its metrics hold."""
    names = {name for record in run.records for name in record}
    if "kl_k1" in names:
        return "policy"
    if "chosen_reward" in names:
        return "pairs"
    return "reward" if names & {"validation_accuracy", "accuracy"} else "text"


def summary(run: Run, config: Config | None, pairs: Sequence[Pair] = (), bytes_per_token: float | None = None) -> dict[str, object]:
    """Names and values, in the order that people ask for them."""
    kind, out = kind_of(run), report.progress(run)
    if kind == "policy":
        out = {"iterations" if name == "steps" else name: value for name, value in out.items()} | _of_policy(run, config, pairs)
    elif kind == "text":
        out |= report.losses(run, bytes_per_token)
    else:
        out |= _of_pairs(run, config)
    skipped = sum(_whole(event.get("count"), 1) for event in _last_life(run) if event.get("kind") == "record_skipped")
    if skipped:
        out["records skipped or cut"] = f"{skipped:,}"
    return out | report.resources(run)


def _of_policy(run: Run, config: Config | None, pairs: Sequence[Pair]) -> dict[str, object]:
    out: dict[str, object] = {}
    episodes = _last(run, "episodes")
    if episodes is not None:
        out["episodes"] = f"{episodes:,.0f}"
    _first_to_last(out, run, "reward", "reward of rollouts", "{:.3f}")
    _before_and_after(out, run, pairs)
    budget = config.stop.kl_budget if config else None
    _first_to_last(out, run, "kl_k1", "KL (k1) of rollouts", "{:.3f}", after=" nats a response" + (f" (budget {budget:g})" if budget else ""))
    for key, name, form in (("entropy", "entropy, nats a token", "{:.3f}"), ("response_length", "response length, tokens", "{:.1f}"),
                            ("eos_rate", "responses that end by themselves", "{:.1%}"), ("kl_coef", "KL coefficient", "{:.4g}"),
                            ("explained_variance", "explained variance of the critic", "{:.3f}"), ("reward_disagreement", "reward models differ by", "{:.4f}")):
        _first_to_last(out, run, key, name, form)
    for key, name, form in (("clip_fraction", "clip fraction, mean", "{:.3%}"), ("ratio_max", "ratio, largest", "{:.3f}"),
                            ("first_ratio_max", "ratio at the first inner step, largest", "{!r}"),
                            ("logprob_difference", "train against generate, largest difference of a logprob", "{:.3g} nats")):
        values = plots.column(run.records, key)[1]
        if values:
            out[name] = form.format(math.fsum(values) / len(values) if "mean" in name else max(values))
    shares = [(name, plots.column(run.records, f"share_{name}")[1]) for name in ("rollout", "scoring", "update")]
    if all(values for _, values in shares):
        out["time of an iteration, median"] = ", ".join(f"{name} {100 * sorted(values)[len(values) // 2]:.0f} %" for name, values in shares)
    skipped = _last(run, "skipped_prompts")
    if skipped:
        out["prompts skipped"] = f"{skipped:,.0f}"
    for event in _failures(run):
        out[f"reward function {event[0]} failed"] = f"{event[1]:,} times, such as: {event[2]}"
    return out


def _before_and_after(out: dict[str, object], run: Run, pairs: Sequence[Pair]) -> None:
    """Held-out reward with its standard error, and how many of them the gain is."""
    told = [event for event in run.events if event.get("kind") == "samples" and _finite(event.get("reward"))]
    told = {event["step"]: event for event in told if isinstance(event.get("step"), int)}
    if len(told) >= 2:
        before, after = told[min(told)], told[max(told)]
        gain = after["reward"] - before["reward"]
        errors = [event.get("reward_error") for event in (before, after)]
        known = all(map(_finite, errors))
        shown = [f"{event['reward']:.3f}" + (f" ± {event['reward_error']:.3f}" if known else "") for event in (before, after)]
        out["reward of held-out prompts, before -> after"] = " -> ".join(shown)
        error = math.hypot(*errors) if known else 0.0
        if error > 0:
            out["gain"] = f"{gain:+.3f}, {gain / error:+.1f} standard errors"
    gains = [pair.gain for pair in pairs if pair.gain is not None]
    if gains:
        out["answers that got a greater reward"] = f"{sum(gain > 0 for gain in gains)} of {len(gains)} ({sum(gain < 0 for gain in gains)} a smaller one)"


def _of_pairs(run: Run, config: Config | None) -> dict[str, object]:
    """Of the reward stage and of dpo."""
    out: dict[str, object] = {}
    unit = "nats a pair" if kind_of(run) == "pairs" else "nats a prompt"
    _first_to_last(out, run, "loss", "training loss", "{:.4f}", after=f" {unit}")
    best = run.last("best").get("step")
    for key, name, form, choose in (
        ("validation_loss", "held-out loss", "{:.4f}", min), ("validation_accuracy", "held-out pairs in the right order", "{:.1%}", max),
        ("validation_calibration_error", "calibration error", "{:.3f}", min), ("validation_margin", "margin, held-out", "{:.3f}", None),
    ):
        steps, values = plots.column(run.records, key)
        if not values:
            continue
        out[f"{name}, last" + (" (best)" if choose else "")] = form.format(values[-1]) + (f" ({form.format(choose(values))})" if choose else "")
        if best in steps and best != steps[-1]:
            out[f"{name}, at step {best:,}"] = form.format(values[steps.index(best)])
    pairs, accuracy = _last(run, "validation_pairs"), _last(run, "validation_accuracy")
    if pairs and accuracy is not None:
        error = math.sqrt(0.25 / pairs)
        out["against chance"] = f"{pairs:,.0f} pairs: half right is 50.0 % ± {error:.1%}; {(accuracy - 0.5) / error:+.1f} standard errors"
    if config is not None and config.stop.reward_accuracy is not None:
        out["accuracy that was asked for"] = f"{config.stop.reward_accuracy:.1%}"
    return out


# ---- the plots ---------------------------------------------------------------------------------------------------------------------


def wanted(run: Run, config: Config | None, bytes_per_token: float | None = None) -> list[Picture]:
    """What is drawn of a stage, in this order."""
    kind, records, restarts = kind_of(run), run.records, run.restarts
    if kind == "text":
        return report.loss_pictures(run, bytes_per_token)
    if kind == "policy":
        budget, best = (config.stop.kl_budget if config else None), run.last("best").get("step")
        return [
            ("Reward against KL", "reward_kl.png", lambda path: own.plot_reward_kl(path, records, budget=budget, best=best)),
            ("Over iterations", "policy.png", lambda path: own.plot_policy(path, records, budget=budget, restarts=restarts)),
            ("Critic", "critic.png", lambda path: own.plot_critic(path, records, restarts=restarts)),
            ("Where the time goes", "phases.png", lambda path: own.plot_phases(path, records, restarts=restarts)),
            *report.loss_pictures(run)[1:],
        ]
    bins = run.last("calibration").get("bins") or []
    target = config.stop.reward_accuracy if config else None
    unit = "nats per pair" if kind == "pairs" else "nats per prompt"
    return [
        ("Accuracy and calibration", "accuracy.png", lambda path: own.plot_accuracy(path, records, target=target, restarts=restarts)),
        ("Reliability", "reliability.png", lambda path: own.plot_reliability(path, bins)),
        *report.loss_pictures(run, unit=unit),
    ]


# ---- small things ------------------------------------------------------------------------------------------------------------------


def _config(run: Run) -> Config | None:
    """The run's configuration; None where it cannot be read: a report needs little of it."""
    try:
        return load_config(run.directory)
    except UserError:
        return None


def _first_to_last(out: dict[str, object], run: Run, key: str, name: str, form: str, after: str = "") -> None:
    """The means of the first and of the last tenth."""
    values = plots.column(run.records, key)[1]
    if values:
        first = report.tail_mean(values[::-1], ENDS)
        out[f"{name}, first -> last"] = f"{form.format(first)} -> {form.format(report.tail_mean(values, ENDS))}{after}"


def _last(run: Run, key: str) -> float | None:
    values = plots.column(run.records, key)[1]
    return values[-1] if values else None


def _last_life(run: Run) -> list[dict]:
    """Events since the last start: each life says again which records it leaves out."""
    begins = [number for number, event in enumerate(run.events) if event.get("kind") in ("start", "resume")]
    return run.events[begins[-1] :] if begins else run.events


def _failures(run: Run) -> list[tuple[str, int, str]]:
    """(function, how often, the first reason) of each reward function that failed."""
    found: dict[str, tuple[int, str]] = {}
    for event in run.events:
        if event.get("kind") == "reward_failed":
            count, reason = found.get(str(event.get("function")), (0, str(event.get("reason"))))
            found[str(event.get("function"))] = (count + _whole(event.get("count"), 1), reason)
    return [(name, *told) for name, told in found.items()]


def _whole(value: object, otherwise: int) -> int:
    return value if isinstance(value, int) else otherwise


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
