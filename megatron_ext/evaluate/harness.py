"""EleutherAI's lm-evaluation-harness (MIT) over the training model. Imported on rank 0 alone, and only when it is asked for.

The harness makes prompts of documents, asks `Runtime` three kinds of questions, and turns the answers into numbers:

    loglikelihood            log p(continuation | context), and whether greedy decoding would give it     (multiple choice, ...)
    loglikelihood_rolling    log p(text), in windows of the model's length that each predict new tokens   (perplexity)
    generate_until           a completion that ends at a stop string

Where a text is cut into context and continuation, what stands before the first token, which side is cut when it is too long: all as in the
harness's own backend for transformers (`HFLM`), so that the numbers are the same.
"""
import contextlib
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import lm_eval
from jinja2.sandbox import SandboxedEnvironment
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import METRIC_REGISTRY
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from megatron_ext.config.schema import EvaluateConfig, GenerateConfig
from megatron_ext.errors import RunFailed, UserError
from megatron_ext.evaluate.likelihood import Continuation
from megatron_ext.evaluate.ranks import Ranks
from megatron_ext.evaluate.tasks import KEY, Tasks
from megatron_ext.evaluate.text import PlainTokenizer

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

AT_ONCE = 2048  # requests that the ranks are told of at a time
GENERATED = 256  # tokens, where a task does not say; as HFLM
SAMPLING = {"do_sample", "temperature", "top_k", "top_p", "until", "max_gen_toks"}
HARMLESS = {"num_beams": 1, "repetition_penalty": 1.0, "num_return_sequences": 1, "use_cache": True}  # what others' settings say and do not mean


class Runtime(TemplateLM):
    """The model of all ranks, as the harness sees it.

    Args:
        facts: what the results say of it (`config` in results.json).
        add_bos: see `evaluate.add_bos`.
    """

    backend = "causal"

    def __init__(self, ranks: Ranks, tokenizer: PlainTokenizer, *, facts: dict, add_bos: bool | None, batch_size: int, seed: int):
        super().__init__()
        self.tokenizer, self.max_length = tokenizer, ranks.max_length
        self._ranks, self._facts, self._add_bos, self._batch_size, self._seed = ranks, facts, add_bos, batch_size, seed
        self.asked = False  # whether a question came yet

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        return self.tokenizer.eos_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    def get_model_info(self) -> dict:
        return self._facts

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        if add_special_tokens is None:
            begun = has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
            add_special_tokens = False if begun else self._add_bos is not False
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    # ---- questions

    def _loglikelihood_tokens(self, requests: Sequence[tuple], disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        for pair, context, words in requests:
            if not context or not words:
                raise UserError("evaluate.harness", repr(pair)[:200], "a continuation without any token cannot be scored; look at the task's templates")
            if len(words) > self.max_length:
                raise UserError("evaluate.max_length", self.max_length, f"a continuation has {len(words)} tokens: {str(pair)[:100]!r}")
        found = self._in_order(
            requests, lambda request: (-len(request[1]) - len(request[2]), request[1] + request[2]), "likelihoods", disable_tqdm,
            lambda part: self._ranks.likelihoods([Continuation(context, words) for _, context, words in part]),
        )
        return [(one.logprob, one.greedy) for one in found]

    def loglikelihood_rolling(self, requests: Sequence["Instance"], disable_tqdm: bool = False) -> list[float]:
        windows, owners = [], []
        for number, request in enumerate(requests):
            pieces = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1)
            for context, words in map(utils.make_disjoint_window, pieces):
                windows.append((None, context, words))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[number] += logprob
        return totals

    def generate_until(self, requests: Sequence["Instance"], disable_tqdm: bool = False) -> list[str]:
        eos = self.tokenizer.decode(self.eot_token_id)
        kinds: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            kinds.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        texts: list[str] = [""] * len(requests)
        for numbers in kinds.values():
            given = normalize_gen_kwargs(requests[numbers[0]].args[1], GENERATED)
            stop = handle_stop_sequences(given["until"], eos=eos)
            settings = self._settings(given, stop)
            room = self.max_length - settings.max_tokens
            if room < 1:
                raise UserError("evaluate.max_length", self.max_length, f"a task asks for {settings.max_tokens} tokens (max_gen_toks), which leaves none "
                                                                        "for its prompt")
            prompts = [self.tok_encode(requests[number].args[0])[-room:] or [self.prefix_token_id] for number in numbers]
            found = self._in_order(
                list(zip(prompts, numbers)), lambda pair: -len(pair[0]), "completions", disable_tqdm,
                lambda part, settings=settings: self._ranks.completions([prompt for prompt, _ in part], settings, [number for _, number in part]),
            )
            for number, one in zip(numbers, found, strict=True):
                text = self.tokenizer.decode(one.tokens, skip_special_tokens=True)
                texts[number] = postprocess_generated_text(text, stop, None)
        return texts

    def _settings(self, given: dict, stop: list[str]) -> GenerateConfig:
        for key, value in given.items():
            if key not in SAMPLING and HARMLESS.get(key) != value:
                raise UserError("evaluate.harness", f"{key}: {value}", f"this task's generation_kwargs ask for what is not done here; known: {', '.join(sorted(SAMPLING))}")
        sampled = bool(given.get("do_sample")) and float(given.get("temperature", 1.0)) > 0
        return GenerateConfig(
            max_tokens=given["max_gen_toks"], temperature=float(given.get("temperature", 1.0)) if sampled else 0.0,
            top_k=int(given.get("top_k") or 0) if sampled else 0, top_p=float(given.get("top_p", 1.0)) if sampled else 1.0,
            stop=tuple(dict.fromkeys(string for string in stop if string)), seed=self._seed, batch_size=self._batch_size,
        )

    def _in_order(self, requests: Sequence, key: Callable, name: str, silent: bool, ask: Callable) -> list:
        """Asks longest first, some at a time; the answers in the order of the requests."""
        self.asked = True
        order = sorted(range(len(requests)), key=lambda number: key(requests[number]))
        answers: list = [None] * len(requests)
        with tqdm(total=len(requests), desc=name, disable=silent or not sys.stderr.isatty()) as bar:
            for start in range(0, len(order), AT_ONCE):
                part = order[start : start + AT_ONCE]
                for number, answer in zip(part, ask([requests[number] for number in part]), strict=True):
                    answers[number] = answer
                bar.update(len(part))
        return answers


def run_tasks(model: Runtime, tasks: Tasks, settings: EvaluateConfig, *, name: str, output: Path) -> tuple[dict, list[Path]]:
    """Runs the tasks and writes results and samples as the harness writes them, in `output`/`name`.

    Returns:
        the harness's results (without samples), and the files: results_DATE.json first, samples_TASK_DATE.jsonl.

    Raises:
        UserError: a task that cannot be loaded, ...
        RunFailed: results that could not be written.
    """
    for metric, path in tasks.metrics.items():
        if metric not in METRIC_REGISTRY:
            raise UserError(KEY, path, f"metric {metric!r} is none of the harness's own; they are {', '.join(sorted(METRIC_REGISTRY))}")
    if not settings.task_code:
        _fence()
    tracker = EvaluationTracker(output_path=str(output))
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for the result
        try:
            manager = TaskManager(include_path=str(tasks.directory), include_defaults=tasks.brought)
            results = lm_eval.simple_evaluate(
                model, model_args={"path": name}, tasks=list(tasks.names), num_fewshot=settings.fewshot, batch_size=settings.batch_size,
                limit=settings.limit, bootstrap_iters=settings.bootstrap, task_manager=manager, evaluation_tracker=tracker,
            )
        except UserError:
            raise
        except Exception as error:
            if model.asked:
                raise
            raise UserError("evaluate.harness", ",".join(tasks.names), f"cannot be made ready ({type(error).__name__}: {error})") from error
        samples = results.pop("samples")
        before = set(output.rglob("*.json*"))
        tracker.save_results_aggregated(results, samples)
        for task in results["configs"]:
            tracker.save_results_samples(task, samples[task])
    written = sorted(set(output.rglob("*.json*")) - before)  # results before samples; the tracker only warns when it could not write
    if len(written) != 1 + len(results["configs"]):
        raise RunFailed(f"results could not be written to {output}")
    shutil.copyfile(written[0], output / "results.json")
    return results, written


def _fence() -> None:
    """Templates of task files run in a sandbox: plain Jinja gives them all of Python (`''.__class__.__mro__` ...)."""
    open_ = utils.env
    if not isinstance(open_, SandboxedEnvironment):
        fenced = SandboxedEnvironment(loader=open_.loader, undefined=open_.undefined, keep_trailing_newline=open_.keep_trailing_newline)
        fenced.filters.update(open_.filters)
        utils.env = fenced


plain = utils.handle_non_serializable  # what json.dumps calls for numbers of numpy and the like


def table(results: dict) -> str:
    """The harness's own tables: tasks, then groups."""
    parts = [utils.make_table(results)]
    if results.get("groups"):
        parts.append(utils.make_table(results, "groups"))
    return "\n".join(parts)
