"""Import and export in one process: every family against transformers, what is carried along, and that memory does not grow with the model."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import hugging_face as hf
import pytest
import torch
from small import command, environment

from megatron_ext.checkpoint import ancestry, find, read_record
from megatron_ext.cli.main import main
from megatron_ext.config import sizes
from megatron_ext.data.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers", reason="transformers is not installed here")
pytestmark = pytest.mark.usefixtures("connected")
NAMES = list(hf.CASES)


@pytest.fixture(scope="module")
def imported(connected, tmp_path_factory):
    """name -> (folder with `hf`, `ours` and `back`, transformers' model, our engine): imported into two stages of two ranks, exported again."""
    made = {}

    def of(name: str):
        if name not in made:
            folder = tmp_path_factory.mktemp("model")
            model = hf.save(hf.CASES[name], folder / "hf")
            assert main(["convert", f"hf={folder / 'hf'}", f"output={folder / 'ours'}", "parallel.tp=2", "parallel.pp=2"]) == 0
            assert main(["convert", f"checkpoint.load={folder / 'ours'}", f"output={folder / 'back'}"]) == 0
            made[name] = (folder, model, *hf.restored(folder / "ours", connected))
        return made[name]

    return of


@pytest.mark.parametrize("name", NAMES)
def test_logits_losses_and_greedy_tokens_are_those_of_transformers(imported, connected, name):
    folder, model, engine, _ = imported(name)
    truth, decoder = hf.truth(model), engine.models[0].eval()
    assert float(truth["logits"].std()) > 0.5, "weights so small that every model gives the same"
    assert hf.off(hf.decoded(decoder), truth["logits"]) < 1e-5
    # The loss does not hold logits, and the plain layers are other modules.
    plain, _ = hf.restored(folder / "ours", connected, "kernels.layers=plain")
    with torch.no_grad():
        expected = model(hf.rows(), labels=hf.rows()).loss
        for one in (decoder, plain.models[0].eval()):
            _, losses = one(hf.rows()[:, :-1], torch.arange(hf.LENGTH)[None].expand(3, -1), labels=hf.rows()[:, 1:])
            assert float(losses.mean()) == pytest.approx(float(expected), rel=1e-5)
    assert hf.off(hf.decoded(plain.models[0]), truth["logits"]) < 1e-5
    assert torch.equal(hf.grown(engine), truth["tokens"])
    assert torch.equal(hf.grown(engine, modules_only=True), truth["tokens"])


@pytest.mark.parametrize("name", NAMES)
def test_export_is_the_original_bit_by_bit(imported, name):
    folder, model, engine, _ = imported(name)
    assert hf.same_tensors(folder / "hf", folder / "back")
    assert (folder / "hf" / "config.json").read_bytes() == (folder / "back" / "config.json").read_bytes()
    assert sizes.parameters(engine.config.model, hf.WORDS) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_config_json_of_our_making_is_read_by_transformers(imported, name):
    """Of a model that was trained from the start: here the files that were carried along are gone."""
    folder, model, _, _ = imported(name)
    shutil.copytree(folder / "ours", folder / "alone", ignore=shutil.ignore_patterns("hugging_face"))
    assert main(["convert", f"checkpoint.load={folder / 'alone'}", f"output={folder / 'made'}"]) == 0
    values = json.loads((folder / "made" / "config.json").read_text())
    again = hf.read(type(model), folder / "made")
    assert values["architectures"] == [type(model).__name__]
    with torch.no_grad():
        assert torch.equal(again(hf.rows()).logits, model(hf.rows()).logits)


# ---- files ---------------------------------------------------------------------------------------------------------------------------


def test_the_average_is_looked_for_where_it_is_written():
    from megatron_ext.convert import exporter
    from megatron_ext.train import weights

    assert exporter.AVERAGE == weights.AVERAGE


def test_many_files_of_two_dtypes_come_back_as_they_were(tmp_path):
    """bfloat16 but for the norms, in shards; the names of the base model alone, without its prefix."""
    model = hf.build(hf.CASES["qwen3"]).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = parameter.data.float() + 2.0**-20
    model.save_pretrained(tmp_path / "hf", max_shard_size="40KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 5
    assert main(["convert", f"hf={tmp_path / 'hf'}", f"output={tmp_path / 'ours'}"]) == 0
    assert read_record(find(str(tmp_path / "ours"), tmp_path))["config"]["precision"]["dtype"] == "fp32", "the one that holds both"
    assert main(["convert", f"checkpoint.load={tmp_path / 'ours'}", f"output={tmp_path / 'back'}"]) == 0
    assert hf.same_tensors(tmp_path / "hf", tmp_path / "back")


def test_base_model_names_and_old_buffers(tmp_path):
    """As openai-community/gpt2 has them: no `transformer.`, and the causal mask beside the weights."""
    from safetensors.torch import load_file, save_file

    hf.save(hf.CASES["gpt2"], tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    found = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    save_file(found | {"h.0.attn.bias": torch.ones(1, 1, 96, 96), "lm_head.weight": found["wte.weight"].clone()}, file)
    assert main(["convert", f"hf={tmp_path / 'hf'}", f"output={tmp_path / 'ours'}"]) == 0
    assert main(["convert", f"checkpoint.load={tmp_path / 'ours'}", f"output={tmp_path / 'back'}"]) == 0
    back = hf.tensors(tmp_path / "back")
    assert back.keys() == found.keys() and all(torch.equal(back[name], found[name]) for name in found)


def test_written_shards_have_the_index_that_transformers_reads(tmp_path, monkeypatch):
    from megatron_ext.convert import safetensors

    hf.save(hf.CASES["llama"], tmp_path / "hf")
    assert main(["convert", f"hf={tmp_path / 'hf'}", f"output={tmp_path / 'ours'}"]) == 0
    monkeypatch.setitem(safetensors.write.__kwdefaults__, "shard_bytes", 100_000)
    assert main(["convert", f"checkpoint.load={tmp_path / 'ours'}", f"output={tmp_path / 'back'}"]) == 0
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 3 and sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(tensor.numel() * 4 for tensor in hf.tensors(tmp_path / "back").values())
    assert hf.same_tensors(tmp_path / "hf", tmp_path / "back")


def test_ranks_share_the_work(tmp_path):
    """Two processes write the shards of four ranks; the checkpoint is that of one process, but for its own time and layout."""
    hf.save(hf.CASES["gpt_neox"], tmp_path / "hf")
    words = ("convert", f"hf={tmp_path / 'hf'}", f"output={tmp_path / 'ours'}", "parallel.tp=2", "parallel.pp=2", "launch.ranks=2")
    done = subprocess.run([sys.executable, "-m", "megatron_ext", *words], env=environment(), capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("GPTNeoXForCausalLM") == 1
    assert len(list((tmp_path / "ours" / "checkpoints" / "step_00000000").glob("shard_*.bin"))) == 4
    assert main(["convert", f"checkpoint.load={tmp_path / 'ours'}", f"output={tmp_path / 'back'}"]) == 0
    assert hf.same_tensors(tmp_path / "hf", tmp_path / "back")


MEMORY = """
import resource, sys
from megatron_ext.cli.main import main
import megatron_ext.convert.importer, megatron_ext.convert.exporter
from megatron_ext.config.compose import compose
compose(["launch.ranks=1"])  # what is loaded once is not counted
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024
import threading, time
top, before = [0], anonymous()
def watch():
    while True:
        top[0] = max(top[0], anonymous()); time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
assert main(sys.argv[1:]) == 0
print("grew", top[0] - before)
"""


def test_memory_is_bounded_by_the_largest_tensor(tmp_path):
    """A model of 134 MB, whose largest tensor is 6 MB: both ways take less than a quarter of the model (17 to 25 MB)."""
    settings = {**hf.GROUPED, "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 14, "vocab_size": 4000}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    model.save_pretrained(tmp_path / "hf")
    size = (tmp_path / "hf" / "model.safetensors").stat().st_size
    assert size > 120e6
    for words in ((f"hf={tmp_path / 'hf'}", f"output={tmp_path / 'ours'}"), (f"checkpoint.load={tmp_path / 'ours'}", f"output={tmp_path / 'back'}")):
        done = subprocess.run([sys.executable, "-c", MEMORY, "convert", *words], env=environment(), capture_output=True, text=True, check=True, timeout=500)
        assert int(done.stdout.split("grew")[1]) < size / 4
    assert hf.same_tensors(tmp_path / "hf", tmp_path / "back")


# ---- what is carried along -------------------------------------------------------------------------------------------------------------


def text_model(folder: Path, data: Path, *, licence: str = "license: apache-2.0", case: str = "qwen2", **generation) -> Path:
    """A directory with a tokenizer that begins texts with a token of its own, a chat template, settings of generation and a licence."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import processors

    inner = Inner.from_file(str(data / "tokenizer.json"))
    inner.add_special_tokens(["<begin>"])
    inner.post_processor = processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", inner.token_to_id("<begin>"))])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<begin>", eos_token="<|endoftext|>",
                                                     chat_template="{% for m in messages %}[{{ m.content }}]{% endfor %}")
    model = hf.build(hf.Case(hf.CASES[case].kind, {**hf.CASES[case].settings, "vocab_size": len(tokenizer)}))
    model.generation_config = transformers.GenerationConfig(**{"eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0, **generation})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(f"---\n{licence}\n---\n# A model\n", encoding="utf-8")
    (folder / "LICENSE").write_text("Do what is right.\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory, small_data):
    """An imported model that generates text."""
    root = tmp_path_factory.mktemp("texts")
    text_model(root / "hf", small_data)
    assert main(["convert", f"hf={root / 'hf'}", f"output={root / 'ours'}"]) == 0
    return root


def test_generate_takes_prompts_and_ends_as_transformers_does(texts, capsys):
    model = hf.read(transformers.Qwen2ForCausalLM, texts / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(texts / "hf")
    prompt = "def main(argument):"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    assert ids[0, 0] == tokenizer.bos_token_id
    grown = model.generate(ids, do_sample=False, max_new_tokens=12, pad_token_id=0)[0, ids.shape[1] :].tolist()
    words = ("generate", f"checkpoint.load={texts / 'ours'}", "generate.max_tokens=12", "generate.temperature=0", "--json")
    capsys.readouterr()
    assert main([*words, "--prompt", prompt]) == 0
    one = json.loads(capsys.readouterr().out)["completions"][0]
    assert one["tokens"] == grown and one["prompt_tokens"] == ids[0].tolist()
    # Any of several tokens ends a completion, as generation_config.json says.
    settings = texts / "ours" / "hugging_face" / "generation_config.json"
    before = settings.read_text()
    settings.write_text(json.dumps({"eos_token_id": [99999, grown[3]]}))
    assert main([*words, "--prompt", prompt]) == 0
    one = json.loads(capsys.readouterr().out)["completions"][0]
    settings.write_text(before)
    assert one["tokens"] == grown[: grown.index(grown[3]) + 1] and one["stop"] == "eod"


def test_files_beside_the_weights_come_back(texts, tmp_path):
    assert main(["convert", f"checkpoint.load={texts / 'ours'}", f"output={tmp_path / 'back'}"]) == 0
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json", "LICENSE", "chat_template.jinja"):
        if (texts / "hf" / name).exists():
            assert (texts / "hf" / name).read_bytes() == (tmp_path / "back" / name).read_bytes(), name
    assert (tmp_path / "back" / "README.md").read_text().startswith('---\nlicense: "apache-2.0"\n')
    record = read_record(find(str(texts / "ours"), tmp_path))
    assert record["origin"]["licence"] == "apache-2.0" and "LICENSE" in record["origin"]["licence_files"]
    assert record["origin"]["weights"].keys() == {"model.safetensors"} and len(record["origin"]["weights"]["model.safetensors"]) == 64


def test_a_tokenizer_of_two_files_becomes_one(small_data, tmp_path):
    """As OPT has it: vocab.json and merges.txt of a byte-level BPE, which begins texts with </s>."""
    inner = json.loads((small_data / "tokenizer.json").read_text())["model"]
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(inner["vocab"] | {"</s>": len(inner["vocab"])}))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in inner["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "bos_token": {"content": "</s>"}, "eos_token": "</s>"}))
    from megatron_ext.convert import carried

    made = Tokenizer.from_bytes(carried.tokenizer(folder))
    theirs = Tokenizer.from_file(small_data / "tokenizer.json")
    for text in ("def main(argument):\n    return 대한민국", " two  spaces "):
        assert made.encode(text) == theirs.encode(text) and made.decode(made.encode(text)) == text
    assert made.begin() == [len(inner["vocab"])] and theirs.begin() == []


@pytest.mark.parametrize(("card", "licence", "warned"), [
    ("license: apache-2.0", "apache-2.0", None), ("license: cc-by-nc-4.0", "cc-by-nc-4.0", "non-commercial"),
    ("license: other\nlicense_name: llama3.1", "llama3.1", "Built with Llama"), ("license: other\ncommercial: false", "unknown", "commercial use is not allowed"),
    ("tags: [x]", "unknown", "says nothing of a licence"),
])
def test_what_a_licence_forbids_is_told_at_export(tmp_path, capsys, card, licence, warned):
    hf.save(hf.CASES["llama"], tmp_path / "hf")
    (tmp_path / "hf" / "README.md").write_text(f"---\n{card}\n---\n")
    assert main(["convert", f"hf={tmp_path / 'hf'}", f"output={tmp_path / 'ours'}"]) == 0
    capsys.readouterr()
    assert main(["convert", f"checkpoint.load={tmp_path / 'ours'}", f"output={tmp_path / 'back'}"]) == 0
    said = capsys.readouterr().out
    assert read_record(find(str(tmp_path / "ours"), tmp_path))["origin"]["licence"] == licence
    assert ("warning" in said) == (warned is not None) and (warned or "") in said


def test_licence_and_origin_go_down_the_chain(small_data, tmp_path, capsys):
    """OPT, whose licence is known although its directory is silent; a run starts from it, and its export still says so when the import is gone."""
    text_model(tmp_path / "hf", small_data, licence="tags: []", case="opt")
    shutil.copy(small_data / "tokenizer.json", tmp_path / "hf" / "tokenizer.json")
    assert main(["convert", f"hf={tmp_path / 'hf'}", f"output={tmp_path / 'ours'}"]) == 0
    typed = [word for word in command(tmp_path / "run", small_data, f"checkpoint.start={tmp_path / 'ours'}", "train.steps=2", "optim.warmup_steps=0")
             if not word.startswith("model")]
    done = subprocess.run(typed, env=environment(), capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    links = ancestry.chain(find(str(tmp_path / "run"), tmp_path))
    assert [link["stage"] for link in links] == ["pretrain", "import"] and links[1]["origin"]["licence"] == "opt-175b"
    assert any("licence opt-175b" in line for line in ancestry.described(links))
    for number in range(2):
        capsys.readouterr()
        assert main(["convert", f"checkpoint.load={tmp_path / 'run'}", f"output={tmp_path / f'back{number}'}"]) == 0
        assert "non-commercial" in capsys.readouterr().out
        assert "OPT-175B" in (tmp_path / f"back{number}" / "README.md").read_text()
        shutil.rmtree(tmp_path / "ours", ignore_errors=True)
    theirs, ours = hf.tensors(tmp_path / "hf"), hf.tensors(tmp_path / "back1")
    assert theirs.keys() == ours.keys() and not any(torch.equal(theirs[name], ours[name]) for name in theirs if name.endswith("q_proj.weight"))
