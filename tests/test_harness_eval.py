"""lm-evaluation-harness through our runtime against the harness's own backend for transformers, and what task files may not do."""
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import harness_tasks
import pytest
import small

from megatron_ext.config.schema import Config, EvaluateConfig
from megatron_ext.data.tokenizer import EOD
from megatron_ext.errors import UserError
from megatron_ext.evaluate import tasks

LENGTH = 64  # tokens of the model's context
FEWSHOT = 2
SETTINGS = EvaluateConfig(harness=harness_tasks.TASKS, fewshot=FEWSHOT, bootstrap=0, batch_size=3)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return harness_tasks.write(tmp_path_factory.mktemp("harness") / "tasks")


# ---- numbers ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm_eval(tmp_path_factory):
    tasks.offline(os.environ)
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    pytest.importorskip("accelerate", reason="accelerate is not installed here: the harness's backend for transformers needs it")
    return pytest.importorskip("lm_eval", reason=f"lm-evaluation-harness is not installed here: {tasks.INSTALL}")


@pytest.fixture(scope="module")
def theirs(lm_eval, small_data, tmp_path_factory) -> Path:
    """A directory of transformers': a random Llama with grouped heads, and a tokenizer that begins every text with <s>."""
    import tokenizers
    import torch
    from tokenizers.processors import TemplateProcessing
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("hf") / "llama"
    inner = tokenizers.Tokenizer.from_file(str(small_data / "tokenizer.json"))
    inner.add_special_tokens(["<s>", "<|user|>"])
    begin = inner.token_to_id("<s>")
    inner.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", begin)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=EOD, bos_token="<s>")
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=inner.get_vocab_size() + 1, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
        max_position_embeddings=LENGTH, initializer_range=0.1, bos_token_id=begin, eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=False,
    ))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def imported(theirs, tmp_path_factory) -> Path:
    """The same as a run of ours."""
    from megatron_ext.cli.main import main

    run = tmp_path_factory.mktemp("run") / "run"
    assert main(["convert", f"hf={theirs}", f"output={run}"]) == 0
    return run


@pytest.fixture(scope="module")
def found(imported):
    from megatron_ext.config.compose import compose
    from megatron_ext.train.restored import source

    return source(compose([f"checkpoint.load={imported}"]), ())


@pytest.fixture(scope="module")
def engine(found, connected):
    from megatron_ext.train.restored import restored_engine

    return restored_engine(found, connected)


@pytest.fixture(scope="module")
def truth(lm_eval, theirs, directory) -> dict:
    """The harness's results with its own backend."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    cwd = Path.cwd()
    os.chdir(directory)  # the harness looks for data from where it stands
    try:
        return lm_eval.simple_evaluate(
            HFLM(pretrained=str(theirs), device="cpu", dtype="float32", batch_size=2), tasks=list(harness_tasks.TASKS), num_fewshot=FEWSHOT, bootstrap_iters=0,
            task_manager=TaskManager(include_path=str(directory), include_defaults=False),
        )
    finally:
        os.chdir(cwd)


def through_our_runtime(engine, found, directory: Path, output: Path, *, settings: EvaluateConfig = SETTINGS) -> tuple[dict, dict]:
    """The harness's results, and its samples as they were written: {task: [...]}."""
    from megatron_ext.evaluate import harness
    from megatron_ext.evaluate.ranks import Ranks
    from megatron_ext.evaluate.text import PlainTokenizer

    settings = replace(settings, task_dir=str(directory))
    ranks = Ranks(engine, found.tokenizer(), batch_size=settings.batch_size, max_length=LENGTH, ends=found.ends)
    plain = PlainTokenizer(found.tokenizer_file(), eos=ranks.tokenizer.eod, folder=found.folder)
    model = harness.Runtime(ranks, plain, facts={}, add_bos=None, batch_size=settings.batch_size, seed=5)
    checked = tasks.gather(settings, output / "checked")
    results, files = harness.run_tasks(model, checked, settings, name="ours", output=output / "out")
    return results, samples_of(files)


def samples_of(files) -> dict[str, list[dict]]:
    found = {}
    for file in files:
        if file.name.startswith("samples_"):
            found[file.name.split("_")[1]] = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return found


def compare(results: dict, samples: dict[str, list[dict]], truth: dict) -> None:
    """Accuracies and texts are the same, log-likelihoods within 1e-4."""
    for kind in ("results", "groups"):
        assert results[kind].keys() == truth[kind].keys()
        for task, numbers in truth[kind].items():
            for name, value in numbers.items():
                if isinstance(value, float):
                    exact = name.startswith(("acc", "exact_match"))
                    assert results[kind][task][name] == (value if exact else pytest.approx(value, rel=1e-4)), (task, name)
    assert samples.keys() == set(harness_tasks.LEAVES)
    for task in harness_tasks.LEAVES:
        expected = truth["samples"][task]
        assert len(samples[task]) == len(expected) > 4
        for mine, other in zip(sorted(samples[task], key=lambda one: one["doc_id"]), sorted(expected, key=lambda one: one["doc_id"]), strict=True):
            for field in ("doc_id", "doc_hash", "prompt_hash", "target_hash"):
                assert mine[field] == other[field]
            assert len(mine["resps"]) == len(other["resps"])
            for found, wanted in zip(mine["resps"], other["resps"]):
                same_answer(found[0], wanted[0])


def same_answer(found, wanted) -> None:
    """As written in samples: a text, one number, or a number and whether it is what greedy decoding gives (as text)."""
    if isinstance(wanted, tuple):
        assert float(found[0]) == pytest.approx(wanted[0], abs=1e-4) and str(found[1]) == str(wanted[1])
    elif isinstance(wanted, float):
        assert float(found) == pytest.approx(wanted, abs=1e-4)
    else:
        assert found == wanted


def test_the_harness_finds_the_numbers_of_its_own_backend(engine, found, directory, truth, tmp_path):
    results, samples = through_our_runtime(engine, found, directory, tmp_path)
    compare(results, samples, truth)
    # The reference is worth comparing with: answers differ, some texts end at a stop string and some do not, a text is longer than the context.
    answers = [one["resps"][0][0] for one in truth["samples"]["finish"]]
    assert len(set(answers)) > 4 and any(answers)
    greedy = [flag for one in truth["samples"]["letters"] for ((_, flag),) in one["resps"]]
    assert len({round(one["resps"][0][0][0], 3) for one in truth["samples"]["colours"]}) > 10 and not all(greedy)
    rolling = [one["resps"][0][0] for one in truth["samples"]["prose"]]
    assert min(rolling) < -3 * LENGTH
    assert json.loads((tmp_path / "out/results.json").read_text())["results"].keys() == results["results"].keys()


@pytest.mark.parametrize("layout", [("parallel.tp=2",), ("parallel.pp=2", "launch.ranks=4")], ids=["tp2", "pp2dp2"])
def test_ranks_find_them_from_the_command_line(imported, directory, truth, tmp_path, layout):
    words = [f"checkpoint.load={imported}", f"evaluate.harness=[{','.join(harness_tasks.TASKS)}]", f"evaluate.task_dir={directory}",
             f"evaluate.fewshot={FEWSHOT}", "evaluate.bootstrap=0", "evaluate.batch_size=4", f"evaluate.output={tmp_path}", *layout]
    done = subprocess.run([sys.executable, "-m", "megatron_ext", "evaluate", "--json", *words], env=small.environment(), capture_output=True,
                          text=True, check=False, timeout=540)
    assert done.returncode == 0, done.stderr[-4000:]
    told = json.loads(done.stdout)
    files = [Path(file) for file in told["files"]]
    written = json.loads(files[0].read_text(encoding="utf-8"))
    compare(written, samples_of(files), truth)
    assert told["results"] == written["results"] and (told["layout"]["tp"], told["layout"]["pp"]) == ((2, 1) if len(layout) == 1 else (1, 2))
    assert written["config"]["checkpoint"].endswith("step_00000000") and written["lm_eval_version"] and written["task_hashes"].keys() == set(harness_tasks.LEAVES)


def test_samples_are_drawn_from_the_seed_and_the_limit_holds(engine, found, directory, tmp_path):
    drawn = tmp_path / "tasks"
    harness_tasks.write(drawn)
    (drawn / "drawn.yaml").write_text((drawn / "finish.yaml").read_text().replace("task: finish", "task: drawn").replace(
        "do_sample: false", "do_sample: true, temperature: 1.2, top_p: 0.95").replace("metric_list", "repeats: 2\nmetric_list"))
    settings = replace(SETTINGS, harness=("drawn",), limit=3)
    one, other = (through_our_runtime(engine, found, drawn, tmp_path / name, settings=settings)[1]["drawn"] for name in ("one", "two"))
    assert [sample["resps"] for sample in one] == [sample["resps"] for sample in other] and len(one) == 3
    assert any(first != second for sample in one for (first, second) in sample["resps"]), "each of a document's samples is drawn anew"


def test_tokens_are_those_of_transformers_tokenizer(theirs, found):
    """Beginning of sequence, special tokens in the text, trailing spaces, under HFLM's rules."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from megatron_ext.evaluate.harness import Runtime
    from megatron_ext.evaluate.text import PlainTokenizer

    tokenizer = AutoTokenizer.from_pretrained(theirs)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=600, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    pairs = [("a list of", " strings"), ("a list ", "of"), ("<s>a list", " of"), ("<|user|> file\n", "path "), ("none \n ", "x")]

    class Nobody:
        max_length = LENGTH

    ours = PlainTokenizer(found.tokenizer_file(), eos=found.tokenizer().eod, folder=found.folder)
    for add_bos in (None, True, False):
        truth = HFLM(pretrained=model, tokenizer=tokenizer, add_bos_token=add_bos)
        mine = Runtime(Nobody(), ours, facts={}, add_bos=add_bos, batch_size=1, seed=0)
        assert mine.prefix_token_id == truth.prefix_token_id != mine.eot_token_id == truth.eot_token_id
        for pair in pairs:
            assert mine._encode_pair(*pair) == truth._encode_pair(*pair)
        for flag in (None, True, False):
            assert mine.tok_encode(pairs[3][0], add_special_tokens=flag) == truth.tok_encode(pairs[3][0], add_special_tokens=flag)
    tokens = tokenizer.encode("file path <|user|> naïve")
    assert ours.decode(tokens, skip_special_tokens=True) == tokenizer.decode(tokens, skip_special_tokens=True)


# ---- what a task file may not do ---------------------------------------------------------------------------------------------------------

GOOD = harness_tasks.FILES["colours.yaml"]
BAD = {
    "a function": (GOOD + "process_docs: !function helpers.run\n", "process_docs runs the function helpers.run"),
    "a function inside": (GOOD + "filter_list: [{name: x, filter: [{function: custom, filter_fn: !function helpers.run}]}]\n", "filter_fn runs the function"),
    "a class": (GOOD + "class: !function helpers.Task\n", "runs"),
    "a metric from elsewhere": (GOOD.replace("metric: acc,", "metric: acc, hf_evaluate: true,"), "fetched from the network"),
    "a data set from elsewhere": (GOOD.replace("dataset_path: json", "dataset_path: someone/data"), "dataset_path 'someone/data' would be fetched"),
    "a data set script": (GOOD.replace("dataset_path: json", "dataset_path: ./data.py"), "dataset_path './data.py' would be fetched or run"),
    "pickles": (GOOD.replace("dataset_path: json", "dataset_path: pandas"), "dataset_path 'pandas'"),
    "trusted code": (GOOD.replace("{data_files:", "{trust_remote_code: true, data_files:"), "trust_remote_code, which is never given"),
    "a reader's setting": (GOOD.replace("{data_files:", "{storage_options: {}, data_files:"), "dataset_kwargs.storage_options is not known to be harmless"),
    "data on the network": (GOOD.replace("data/test.jsonl", "https://example.org/test.jsonl"), "is no local file"),
    "data that is not there": (GOOD.replace("data/test.jsonl", "data/tests.jsonl"), "data/tests.jsonl is not there"),
    "a file outside": (GOOD + "include: ../other.yaml\n", "lies outside"),
    "an object": (GOOD + "description: !!python/object/apply:os.system ['true']\n", "is no task file"),
    "what the model writes": (GOOD + "unsafe_code: true\n", "unsafe_code"),
    "a prompt file": (GOOD + "use_prompt: other.yaml:x\n", "`use_prompt` runs code"),
    "a list": ("[1, 2]", "is no task file"),
    "no YAML": ("task: [", "is no task file"),
    "itself": ("&a\ntask: x\nmetadata: *a\n", "is no task file"),
}


@pytest.fixture
def installed(monkeypatch, tmp_path) -> Path:
    """A harness with two tasks of its own and a group, as far as these checks look."""
    folder = tmp_path / "lm_eval"
    (folder / "tasks/swag").mkdir(parents=True)
    (folder / "tasks/swag/swag.yaml").write_text("task: swag\ndataset_path: allenai/swag\nprocess_docs: !function utils.run\n")
    (folder / "tasks/swag/group.yaml").write_text("group: animals\ntask:\n  - swag\n")
    monkeypatch.setattr(tasks, "check_installed", lambda names: folder)
    return folder


@pytest.mark.parametrize("name", BAD)
def test_what_would_run_code_or_fetch_is_refused(name, installed, tmp_path):
    directory = harness_tasks.write(tmp_path / "tasks")
    (directory / "colours.yaml").write_text(BAD[name][0].lstrip())
    with pytest.raises(UserError) as error:
        tasks.gather(EvaluateConfig(harness=("colours",), task_dir=str(directory)), tmp_path / "checked")
    assert error.value.key == "evaluate.task_dir" and "colours.yaml" in str(error.value) and BAD[name][1] in str(error.value)


def test_code_runs_when_the_user_says_so_and_data_is_found_beside_the_task(installed, tmp_path):
    directory = harness_tasks.write(tmp_path / "tasks")
    (directory / "helpers.py").write_text("def run(docs): return docs\n")
    (directory / "colours.yaml").write_text(BAD["a function"][0])
    found = tasks.gather(EvaluateConfig(harness=("colours",), task_dir=str(directory), task_code=True), tmp_path / "checked")
    written = (tmp_path / "checked/colours.yaml").read_text()
    assert "!function 'helpers.run'" in written and f"{directory}/data/test.jsonl" in written and not found.brought
    assert (tmp_path / "checked/helpers.py").is_file()


def test_the_harness_s_own_tasks_take_their_data_from_a_folder(installed, tmp_path):
    directory = harness_tasks.write(tmp_path / "tasks")
    asked = EvaluateConfig(harness=("swag", "colours"), task_dir=str(directory))
    with pytest.raises(UserError, match=r"swag: is a task that the harness brings, without its data: put .* into .*/tasks/swag/"):
        tasks.gather(asked, tmp_path / "one")
    (directory / "swag").mkdir()
    (directory / "swag/validation.jsonl").write_text("{}\n")
    assert not tasks.gather(asked, tmp_path / "two").brought
    written = (tmp_path / "two/swag.yaml").read_text()
    assert f"include: {installed}/tasks/swag/swag.yaml" in written and f"validation: {directory}/swag/validation.jsonl" in written
    assert tasks.gather(replace(asked, harness=("animals",)), tmp_path / "three").brought
    with pytest.raises(UserError, match="evaluate.harness=nothing: no such task; .* has: colours, empty, finish"):
        tasks.gather(replace(asked, harness=("nothing",)), tmp_path / "four")


def test_without_the_harness_the_install_line_is_told(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="evaluate.harness=a,b: needs lm-evaluation-harness, .* pip install 'lm-eval"):
        tasks.check_installed(("a", "b"))


def test_templates_and_unknown_metrics_run_nothing(engine, found, tmp_path):
    for name, line, reason in (
        ("template", "doc_to_text: \"{{ ''.__class__.__mro__[1].__subclasses__() }}\"", "is unsafe|SecurityError"),
        ("metric", "metric_list: [{metric: mine, aggregation: mean, higher_is_better: true}]", "metric 'mine' is none of the harness's own"),
    ):
        directory = harness_tasks.write(tmp_path / name)
        kept = [old for old in GOOD.strip().split("\n") if not old.startswith(line.partition(":")[0])]
        (directory / "colours.yaml").write_text("\n".join([*kept, line]))
        with pytest.raises(UserError, match=reason):
            through_our_runtime(engine, found, directory, tmp_path / f"{name}-out", settings=replace(SETTINGS, harness=("colours",)))


def test_layouts_that_cannot_score_are_refused_before_anything_starts(directory):
    from megatron_ext.cli.options import parse
    from megatron_ext.config.schema import ParallelConfig
    from megatron_ext.evaluate.harness_inputs import check

    config = Config(evaluate=replace(SETTINGS, task_dir=str(directory)), parallel=ParallelConfig(pp=2, vpp=2))
    with pytest.raises(UserError, match="parallel.vpp=2"):
        check(config, parse(["evaluate"]))
