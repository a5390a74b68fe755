"""A process that runs reward functions for `runner.py`: JSON lines in, JSON lines out, one response at a time.

    <- {"functions": [entries of rewards.functions], "parent": process number}
    -> {"ready": true}                                  or {"refused": "..."} and the end
    <- {"function": 0, "prompt": "...", "response": "...", "reference": "..." or null, "record": {...}}
    -> {"value": 0.5}                                   or {"failed": "raised ValueError in line 12 of mine.py"}

Reasons name places and types, never messages: those may hold the text of the prompt. What functions print goes to standard error; there is no standard
input for them. `random` is seeded by prompt and response, so that a score does not depend on which process gives it.
"""
import ctypes
import json
import math
import os
import random
import signal
import sys
from collections.abc import Mapping

from megatron_ext.errors import UserError
from megatron_ext.parallel.signals import STOPS
from rlhf.rewards.registry import Asked, Unanswerable, resolve


def main() -> None:
    requests, answers = os.fdopen(os.dup(0), "r", encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0), os.dup2(2, 1)
    beginning = json.loads(requests.readline())
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG, SIGKILL: a function that hangs does not see its input end
    for number in STOPS:  # Slurm gives a signal to every process of a task; when this one ends is its rank's to say
        signal.signal(number, signal.SIG_IGN)
    if os.getppid() != beginning["parent"]:
        return
    try:
        functions, answer = resolve(beginning["functions"]), {"ready": True}
    except UserError as error:
        functions, answer = (), {"refused": str(error)}
    print(json.dumps(answer), file=answers, flush=True)
    for line in requests if functions else ():
        request = json.loads(line)
        answer = judge(functions[request.pop("function")], **request)
        print(json.dumps(answer), file=answers, flush=True)


def judge(asked: Asked, *, prompt: str, response: str, reference: str | None, record: Mapping) -> dict:
    """{"value": finite float} or {"failed": reason}."""
    random.seed(f"{prompt}\0{response}".encode("utf-8", "surrogatepass"))
    try:
        value = asked(prompt, response, reference=reference, record=record)
    except Unanswerable as error:
        return {"failed": str(error)}
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - sys.exit() too is an answer that we cannot use
        return {"failed": f"raised {type(error).__name__}{_place(error)}"}
    if isinstance(value, str | bytes) or not (hasattr(value, "__float__") or hasattr(value, "__index__")):
        return {"failed": f"returned a {type(value).__name__}, no number"}
    try:
        number = float(value)
    except Exception as error:  # noqa: BLE001 - a tensor of two elements, an integer beyond all floats
        return {"failed": f"returned a {type(value).__name__} that is no float ({type(error).__name__})"}
    return {"value": number} if math.isfinite(number) else {"failed": f"returned {number}"}


def _place(error: BaseException) -> str:
    """Where in the function: the frame below `Asked.__call__`."""
    trace = error.__traceback__
    for _ in range(2):
        trace = trace.tb_next if trace is not None else None
    return "" if trace is None else f" in line {trace.tb_lineno} of {os.path.basename(trace.tb_frame.f_code.co_filename)}"


if __name__ == "__main__":
    main()
