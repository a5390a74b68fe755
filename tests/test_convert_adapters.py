"""LoRA adapters in PEFT's format, in and out: against the model with W + s B A in the place of W."""
import json
import math
import shutil
from pathlib import Path

import hugging_face as hf
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ext.checkpoint import find, read_record
from megatron_ext.cli.main import main

pytest.importorskip("transformers", reason="transformers is not installed here")
pytestmark = pytest.mark.usefixtures("connected")
RANK = 3
# Modules of each case that an adapter lies on: some of those that we join, all of them, and layers of both kinds.
TARGETS = {"llama": ("q_proj", "v_proj", "down_proj"), "gpt2": ("c_attn", "c_proj", "c_fc"), "gpt_neox": ("query_key_value", "dense"),
           "qwen3": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")}
CONV1D = ("c_attn", "c_proj", "c_fc")


def adapter(model, folder: Path, targets: tuple[str, ...], **settings) -> dict:
    """Writes an adapter of random numbers and adds what it stands for to the model."""
    found, generator = {}, torch.Generator().manual_seed(9)
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 5, "target_modules": list(targets), "bias": "none", "lora_dropout": 0.1, **settings}
    scale = settings["lora_alpha"] / (math.sqrt(RANK) if settings.get("use_rslora") else RANK)
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in targets:
            conv = name.rsplit(".", 1)[-1] in CONV1D and model.config.model_type == "gpt2"
            out, width = module.weight.shape[::-1] if conv else module.weight.shape
            a, b = torch.randn(RANK, width, generator=generator) / 8, torch.randn(out, RANK, generator=generator) / 4
            found |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
            with torch.no_grad():
                module.weight += scale * ((b @ a).t() if conv else b @ a)
    folder.mkdir()
    save_file(found, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return found


@pytest.mark.parametrize("name", TARGETS)
def test_an_adapter_is_what_it_stands_for_and_comes_back(connected, tmp_path, name):
    model = hf.save(hf.CASES[name], tmp_path / "hf")
    theirs = adapter(model, tmp_path / "peft", TARGETS[name], use_rslora=name == "gpt2")
    assert main(["convert", f"hf={tmp_path / 'hf'}", f"adapter={tmp_path / 'peft'}", f"output={tmp_path / 'ours'}", "parallel.tp=2"]) == 0
    engine, found = hf.restored(tmp_path / "ours", connected)
    with torch.no_grad():
        truth = model(hf.rows()[:, :-1]).logits
    # Weights lie in the engine without their adapters (load_weights merges): restored as generate does it, they are beside.
    from megatron_ext.train.restored import restored_engine

    beside = restored_engine(found, connected)
    assert any(name.endswith("lora_a") for name, _ in beside.models[0].named_parameters())
    assert hf.off(hf.decoded(beside.models[0].eval()), truth) < 1e-5 and hf.off(hf.decoded(engine.models[0].eval()), truth) < 1e-5
    # Merged into a model, and alone.
    assert main(["convert", f"checkpoint.load={tmp_path / 'ours'}", f"output={tmp_path / 'merged'}"]) == 0
    merged, weights = hf.tensors(tmp_path / "merged"), dict(model.named_parameters())
    weights["embed_out.weight"] = weights.get("lm_head.weight")  # GPT-NeoX's name in files
    assert all(float((merged[key] - weights[key]).abs().max()) < 1e-6 for key in merged)
    assert main(["convert", f"checkpoint.load={tmp_path / 'ours'}", f"output={tmp_path / 'alone'}", "adapter=only"]) == 0
    ours, said = load_file(tmp_path / "alone" / "adapter_model.safetensors"), json.loads((tmp_path / "alone" / "adapter_config.json").read_text())
    given = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    scales = said["lora_alpha"] / said["r"], given["lora_alpha"] / (math.sqrt(RANK) if given.get("use_rslora") else RANK)
    assert set(TARGETS[name]) <= set(said["target_modules"]) and ours.keys() >= theirs.keys()
    for key in theirs:
        if key.endswith("lora_A.weight"):
            beside = key.replace("lora_A", "lora_B")
            product, truth = scales[0] * ours[beside] @ ours[key], scales[1] * theirs[beside] @ theirs[key]
            assert float((product - truth).abs().max()) < 1e-6, key
    # What we have written reads back as the same tensors: the As of joined layers are one by now.
    assert main(["convert", f"hf={tmp_path / 'hf'}", f"adapter={tmp_path / 'alone'}", f"output={tmp_path / 'again'}"]) == 0
    assert main(["convert", f"checkpoint.load={tmp_path / 'again'}", f"output={tmp_path / 'twice'}", "adapter=only"]) == 0
    twice = load_file(tmp_path / "twice" / "adapter_model.safetensors")
    assert twice.keys() == ours.keys() and all(torch.equal(twice[key], ours[key]) for key in ours)
    record = read_record(find(str(tmp_path / "ours"), tmp_path))
    assert record["config"]["lora"]["rank"] == said["r"] and record["origin"]["adapter"].keys() == {"adapter_config.json", "adapter_model.safetensors"}



@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_peft_itself_writes_what_we_read_and_reads_what_we_write(connected, tmp_path, name):
    peft = pytest.importorskip("peft", reason="peft is not installed here")
    model = hf.save(hf.CASES[name], tmp_path / "hf")
    torch.manual_seed(5)
    settings = peft.LoraConfig(r=RANK, lora_alpha=7, target_modules=list(TARGETS[name]), init_lora_weights=False, fan_in_fan_out=name == "gpt2", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, settings).eval()
    adapted.save_pretrained(tmp_path / "peft")
    with torch.no_grad():
        truth = adapted(hf.rows()[:, :-1]).logits
        with adapted.disable_adapter():
            without = adapted(hf.rows()[:, :-1]).logits
    assert hf.off(without, truth) > 0.1, "the adapter matters"
    assert main(["convert", f"hf={tmp_path / 'hf'}", f"adapter={tmp_path / 'peft'}", f"output={tmp_path / 'ours'}"]) == 0
    assert hf.off(hf.decoded(hf.restored(tmp_path / "ours", connected)[0].models[0].eval()), truth) < 1e-5
    assert main(["convert", f"checkpoint.load={tmp_path / 'ours'}", f"output={tmp_path / 'back'}", "adapter=only"]) == 0
    again = peft.PeftModel.from_pretrained(hf.read(type(model), tmp_path / "hf"), tmp_path / "back").eval()
    with torch.no_grad():
        assert hf.off(again(hf.rows()[:, :-1]).logits, truth) < 1e-5


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    adapter(hf.save(hf.CASES["llama"], root / "hf"), root / "peft", TARGETS["llama"])
    return root


QUERY = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"


@pytest.mark.parametrize(("change", "said"), [
    (lambda found: {key: value for key, value in found.items() if key != QUERY.format("A")}, f"lacks {QUERY.format('A')}"),
    (lambda found: {key: value for key, value in found.items() if "layers.1.self_attn.q_proj" not in key and "layers.1.self_attn.v_proj" not in key},
     "lacks adapters of some layers"),
    (lambda found: found | {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(3, 125)}, "embed_tokens.lora_embedding_A"),
    (lambda found: found | {QUERY.format("B"): torch.zeros(60, 2)}, "has shape [60, 2]"),
])
def test_tensors_that_are_refused(sound, tmp_path, capsys, change, said):
    shutil.copytree(sound / "peft", tmp_path / "peft")
    file = tmp_path / "peft" / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    assert main(["convert", f"hf={sound / 'hf'}", f"adapter={tmp_path / 'peft'}", f"output={tmp_path / 'ours'}"]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("key", "value"), [("use_dora", True), ("peft_type", "IA3"), ("bias", "all"), ("rank_pattern", {"q_proj": 8}), ("r", 0), ("lora_alpha", None)])
def test_settings_that_are_refused(sound, tmp_path, capsys, key, value):
    shutil.copytree(sound / "peft", tmp_path / "peft")
    file = tmp_path / "peft" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    assert main(["convert", f"hf={sound / 'hf'}", f"adapter={tmp_path / 'peft'}", f"output={tmp_path / 'ours'}"]) == 2
    assert f"adapter_config.json: {key}={json.dumps(value)}" in capsys.readouterr().err


def test_what_has_no_adapter_gives_none(sound, tmp_path, capsys):
    assert main(["convert", f"hf={sound / 'hf'}", f"output={tmp_path / 'ours'}"]) == 0
    assert main(["convert", f"checkpoint.load={tmp_path / 'ours'}", "adapter=only", f"output={tmp_path / 'alone'}"]) == 2
    assert "holds no adapter" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["convert", f"hf={sound / 'hf'}", f"adapter={tmp_path / 'empty'}", f"output={tmp_path / 'x'}"]) == 2
    assert "adapter_config.json" in capsys.readouterr().err
