"""What `convert` refuses: by name, with exit code 2, and without leaving anything behind. No megatron-core in here."""
import json
import shutil
from pathlib import Path

import hugging_face as hf
import pytest
import torch

from megatron_ext.cli.main import main

pytest.importorskip("transformers", reason="transformers is not installed here")


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A directory that is right."""
    folder = tmp_path_factory.mktemp("sound") / "hf"
    hf.save(hf.CASES["llama"], folder)
    return folder


@pytest.fixture
def copied(sound, tmp_path) -> Path:
    """A copy to be spoilt."""
    return Path(shutil.copytree(sound, tmp_path / "hf"))


def refused(capsys, *words: str, keeps: Path | None = None) -> str:
    """What is said."""
    capsys.readouterr()
    assert main(["convert", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "Traceback" not in said
    if keeps is not None:
        assert not keeps.exists() and not [path for path in keeps.parent.iterdir() if path.name.startswith(".")], "something was left behind"
    return said


def importing(capsys, folder: Path) -> str:
    output = folder.parent / "ours"
    return refused(capsys, f"hf={folder}", f"output={output}", keeps=output)


def rewrite(folder: Path, change) -> None:
    """`change` takes and gives {name: tensor}."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file)


def settings(folder: Path, **values) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# ---- tensors ---------------------------------------------------------------------------------------------------------------------------

NORM, QUERY = "model.layers.2.input_layernorm.weight", "model.layers.1.self_attn.q_proj.weight"


def test_an_unknown_tensor(copied, capsys):
    rewrite(copied, lambda found: found | {"model.layers.1.self_attn.q_proj.bias": torch.zeros(60)})
    assert "model.layers.1.self_attn.q_proj.bias" in importing(capsys, copied)


def test_a_layer_too_many(copied, capsys):
    rewrite(copied, lambda found: found | {NORM.replace("2", "4"): torch.ones(60)})
    assert NORM.replace("2", "4") in importing(capsys, copied)


@pytest.mark.parametrize("name", [NORM, QUERY, "lm_head.weight"])
def test_a_missing_tensor(copied, capsys, name):
    rewrite(copied, lambda found: {key: value for key, value in found.items() if key != name})
    assert f"lacks the tensor {name}" in importing(capsys, copied)


@pytest.mark.parametrize(("name", "cut"), [(NORM, (slice(0, 59),)), (QUERY, (slice(None), slice(0, 30))), ("model.embed_tokens.weight", (slice(0, 124),))])
def test_a_tensor_of_another_shape(copied, capsys, name, cut):
    rewrite(copied, lambda found: found | {name: found[name][cut].contiguous()})
    said = importing(capsys, copied)
    assert name in said and "config.json says" in said


def test_tensors_that_config_json_does_not_describe(copied, capsys):
    settings(copied, num_key_value_heads=3)
    said = importing(capsys, copied)
    assert "model.layers.0.self_attn.k_proj.weight has shape [20, 60], config.json says [30, 60]" in said and "and 4 more" in said


def test_a_head_that_differs_from_the_words_it_is_tied_to(copied, capsys):
    settings(copied, tie_word_embeddings=True)
    said = importing(capsys, copied)
    assert "lm_head.weight" in said and "tie_word_embeddings" in said


def test_quantised_weights(copied, capsys):
    rewrite(copied, lambda found: found | {QUERY: found[QUERY].to(torch.float8_e4m3fn)})
    assert f"{QUERY} as F8_E4M3" in importing(capsys, copied)


# ---- files -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [0, 4, 100, 0.5, -1])
def test_a_file_that_is_cut_short(copied, capsys, left):
    file = copied / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(left * len(content))] if isinstance(left, float) else content[:left])
    said = importing(capsys, copied)
    assert "model.safetensors" in said and "cut short" in said


@pytest.mark.parametrize("header", [b"{", b"[]", b'{"a": 3}', b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
                                    b'{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}}', b'{"a": {"dtype": "X", "shape": [], "data_offsets": [0, 4]}}',
                                    b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "b": {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]}}'])
def test_a_file_that_is_no_safetensors(copied, capsys, header):
    (copied / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    assert "model.safetensors" in importing(capsys, copied)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_a_pickle(copied, capsys, name):
    class Hostile:
        def __reduce__(self):
            return Path.touch, (copied.parent / "executed",)

    torch.save({"model.norm.weight": Hostile()}, copied / name)
    (copied / "model.safetensors").unlink()
    said = importing(capsys, copied)
    assert name in said and "convert unpickles nothing" in said and "safetensors" in said
    assert not (copied.parent / "executed").exists()


def test_a_directory_without_weights_or_settings(copied, capsys, tmp_path):
    (copied / "model.safetensors").unlink()
    assert "holds no *.safetensors" in importing(capsys, copied)
    (copied / "config.json").unlink()
    assert "holds no config.json" in importing(capsys, copied)
    assert "is not there" in refused(capsys, "hf=nowhere", f"output={tmp_path / 'x'}")


def test_a_model_card_that_is_no_text(copied, capsys):
    (copied / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert "README.md" in importing(capsys, copied)


def test_an_index_that_does_not_fit(sound, capsys, tmp_path):
    hf.save(hf.CASES["llama"], tmp_path / "hf", max_shard_size="100KB")
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    files[1].unlink()
    assert files[1].name in importing(capsys, tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors.index.json").unlink()
    assert "model.safetensors.index.json" in importing(capsys, tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../a.safetensors"}}')
    assert "is no index" in importing(capsys, tmp_path / "hf")


# ---- settings --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "value"), [
    ("model_type", "mamba"), ("hidden_act", "gelu"), ("quantization_config", {"bits": 4}), ("num_hidden_layers", "4"), ("num_hidden_layers", None),
    ("rms_norm_eps", "small"), ("attention_bias", "yes"), ("head_dim", 0), ("is_encoder_decoder", True), ("vocab_size", None),
])
def test_a_setting_that_is_not_supported(copied, capsys, key, value):
    settings(copied, **{key: value})
    said = importing(capsys, copied)
    assert f"config.json: {key}=" in said and json.dumps(value) in said


@pytest.mark.parametrize("rope", [{"rope_type": "yarn", "factor": 4.0}, {"type": "linear", "factor": 2.0}, {"rope_type": "llama3", "mscale": 1.0}])
def test_a_scaling_of_positions_that_is_not_supported(copied, capsys, rope):
    settings(copied, rope_parameters=None, rope_scaling=rope)
    said = importing(capsys, copied)
    assert "config.json: rope_scaling." in said and any(word in said for word in ("yarn", "linear", "mscale"))


def test_windows_of_qwen(tmp_path, capsys):
    hf.save(hf.CASES["qwen2"], tmp_path / "hf")
    settings(tmp_path / "hf", use_sliding_window=True)
    assert "config.json: use_sliding_window=true" in importing(capsys, tmp_path / "hf")


def test_a_setting_that_nobody_knows_is_told(copied, capsys):
    settings(copied, attention_multiplier=3.0)
    assert main(["convert", f"hf={copied}", f"output={copied.parent / 'ours'}"]) == 0
    assert "attention_multiplier=3.0" in capsys.readouterr().out


def test_a_window_cuts_the_context(tmp_path):
    from megatron_ext.checkpoint import find, read_record

    hf.save(hf.CASES["mistral"], tmp_path / "hf")
    settings(tmp_path / "hf", sliding_window=32)
    assert main(["convert", f"hf={tmp_path / 'hf'}", f"output={tmp_path / 'ours'}"]) == 0
    assert read_record(find(str(tmp_path / "ours"), tmp_path))["config"]["model"]["max_sequence_length"] == 32


def test_a_tokenizer_of_more_words_than_the_model(copied, small_data, capsys):
    shutil.copy(small_data / "tokenizer.json", copied / "tokenizer.json")
    said = importing(capsys, copied)
    assert "tokenizer has 500 words" in said and "vocab_size=125" in said


# ---- the command -----------------------------------------------------------------------------------------------------------------------


def test_where_to_and_from(sound, capsys, tmp_path):
    assert "hf=null" in refused(capsys, f"output={tmp_path / 'x'}")
    assert "output=null" in refused(capsys, f"hf={sound}")
    assert "both given" in refused(capsys, f"hf={sound}", f"checkpoint.load={sound}", f"output={tmp_path / 'x'}")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for name in ("full", "full/file"):
        assert "not empty" in refused(capsys, f"hf={sound}", f"output={tmp_path / name}")


def test_a_layout_or_a_model_that_does_not_fit(sound, capsys, tmp_path):
    output = tmp_path / "ours"
    said = refused(capsys, f"hf={sound}", f"output={output}", "parallel.tp=4", keeps=output)
    assert "parallel.tp=4" in said
    said = refused(capsys, f"hf={sound}", f"output={output}", "model.num_layers=3", keeps=output)
    assert "model.num_layers=3" in said and "leave model keys out" in said
    said = refused(capsys, f"hf={sound}", f"output={output}", "model.hidden_size=120", keeps=output)
    assert "model.hidden_size=120" in said, "what was typed, not the width of a head that follows from it"


@pytest.mark.parametrize(("keys", "family"), [
    ({}, "llama"), ({"qkv_bias": True}, "qwen2"), ({"qk_norm": True}, "qwen3"), ({"qkv_bias": True, "proj_bias": True}, "llama"),
    ({"norm": "layernorm", "activation": "gelu_tanh", "bias": True, "qkv_bias": True, "position_embedding": "learned", "tied_embeddings": True}, "gpt2"),
    ({"norm": "layernorm", "activation": "gelu", "bias": True, "block": "parallel", "rotary_percent": 0.25}, "gpt_neox"),
    ({"norm": "layernorm", "activation": "gelu_tanh", "mlp_bias": True, "head_bias": True, "block": "parallel_one_norm", "rotary_interleaved": True}, "gptj"),
    ({"norm": "layernorm", "activation": "relu", "bias": True, "position_embedding": "learned", "position_offset": 2, "block": "post_norm"}, "opt"),
    ({"rotary_interleaved": True}, None), ({"activation": "geglu"}, None), ({"block": "parallel"}, None), ({"norm": "layernorm"}, None),
])
def test_which_family_can_say_a_model(keys, family):
    from megatron_ext.config.schema import ModelConfig
    from megatron_ext.convert.families import FAMILIES, can_say

    found = next((name for name in FAMILIES if can_say(FAMILIES[name], ModelConfig(**keys), 1000)), None)
    assert found == family


def test_a_damaged_checkpoint(sound, capsys, tmp_path):
    assert main(["convert", f"hf={sound}", f"output={tmp_path / 'ours'}"]) == 0
    shard = tmp_path / "ours" / "checkpoints" / "step_00000000" / "shard_00000.bin"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    said = refused(capsys, f"checkpoint.load={tmp_path / 'ours'}", f"output={tmp_path / 'back'}", keeps=tmp_path / "back")
    assert "shard_00000.bin" in said and "sha256" in said
