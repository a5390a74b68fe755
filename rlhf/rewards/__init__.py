"""Reward functions: what a response is worth where a few lines of Python can tell.

    from rlhf.rewards import Functions, check, reward

| name | a response is worth | its settings |
|---|---|---|
| length | 1 at the length that is asked for, less with the distance | target, at_least, at_most, scale, unit |
| format | 1 if it has the form | kind (sentence, json, python), pattern |
| exact_match | 1 if it is the record's reference | case, punctuation, extract |
| overlap | F1 of the words shared with the reference | measure (f1, rouge_l) |
| repetition | minus the share of repeated n-grams | n |
| code | the share of the record's tests that its code passes, in a sandbox | seconds, memory, partial, tests, stdin, stdout, prefix, unconfined |

Any other is `module:function` (registry.py). They run in worker processes, one response at a time (runner.py).
**A function that raises, runs out of time, ends its
process or returns what is no finite number has no value for that response, and there the mean of its values for the others stands in**, so that its
failure neither rewards nor punishes; with no value at all, 0 for each. Failures are counted by function and reason, and the run goes on, until a
function has failed on everything three times in a row.
"""
from rlhf.rewards import code, text  # noqa: F401 - registers what is built in
from rlhf.rewards.registry import REWARDS, Unanswerable, check, reward
from rlhf.rewards.runner import Functions, Scores

__all__ = ["REWARDS", "Functions", "Scores", "Unanswerable", "check", "reward"]
