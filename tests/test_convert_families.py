"""BERT and T5 from Hugging Face directories and back: logits and loss of transformers, the original bit by bit, refusals by name."""
import json
import math
import shutil

import hugging_face as hf
import pytest
import torch
import torch.nn.functional as F

from megatron_ext.cli.main import main

transformers = pytest.importorskip("transformers", reason="transformers is not installed here")
pytestmark = pytest.mark.usefixtures("connected")
WORDS, LENGTH, SAID = 125, 40, 16
BERT = {"vocab_size": WORDS, "hidden_size": 60, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 88, "max_position_embeddings": 48,
        "type_vocab_size": 3, "hidden_act": "gelu_new"}
T5 = {"vocab_size": WORDS, "d_model": 60, "d_kv": 14, "d_ff": 88, "num_layers": 1, "num_decoder_layers": 3, "num_heads": 6, "dropout_rate": 0.1,
      "relative_attention_num_buckets": 16, "relative_attention_max_distance": 20, "decoder_start_token_id": 0}
CASES = {
    "bert": (transformers.BertForMaskedLM, transformers.BertConfig(**BERT)),
    "t5": (transformers.T5ForConditionalGeneration, transformers.T5Config(**T5)),
    "t5 1.1": (transformers.T5ForConditionalGeneration, transformers.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
}


@pytest.fixture(scope="module")
def imported(connected, tmp_path_factory):
    """name -> (folder with `hf`, `ours` and `back`, transformers' model, our engine): imported into two stages of two ranks, exported again."""
    made = {}

    def of(name: str):
        if name not in made:
            folder, (kind, config) = tmp_path_factory.mktemp("model"), CASES[name]
            config._attn_implementation = "eager"
            model, generator = kind(config).eval(), torch.Generator().manual_seed(5)
            with torch.no_grad():
                for parameter in model.parameters():
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_(0.3 * noise) if parameter.dim() == 1 else parameter.copy_(noise / (2 if len(parameter) == WORDS else math.sqrt(parameter.shape[-1])))
            model.save_pretrained(folder / "hf")
            assert main(["convert", f"hf={folder / 'hf'}", f"output={folder / 'ours'}", "parallel.tp=2", "parallel.pp=2"]) == 0
            assert main(["convert", f"checkpoint.load={folder / 'ours'}", f"output={folder / 'back'}"]) == 0
            made[name] = (folder, model, hf.restored(folder / "ours", connected)[0])
        return made[name]

    return of


def theirs(model, tokens, said):
    """Logits of transformers."""
    with torch.no_grad():
        if isinstance(model, transformers.BertForMaskedLM):
            return model(input_ids=tokens, token_type_ids=tokens % 3).logits
        return model(input_ids=tokens, decoder_input_ids=said).logits


@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_of_transformers(imported, name):
    _, model, engine = imported(name)
    generator = torch.Generator().manual_seed(3)
    tokens, said, labels = (torch.randint(0, WORDS, (3, length), generator=generator) for length in (LENGTH, SAID, LENGTH if "bert" in name else SAID))
    truth, ours = theirs(model, tokens, said), engine.models[0].eval()
    inputs = {"token_types": tokens % 3} if "bert" in name else {"decoder_tokens": said}
    with torch.no_grad():
        _, losses = ours(tokens, torch.arange(LENGTH).expand(3, -1), labels=labels, **inputs)
    expected = F.cross_entropy(truth.flatten(0, 1), labels.flatten(), reduction="none").view_as(losses)
    assert float(truth.std()) > 0.5, "weights so small that every model gives the same"
    assert float((losses - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_export_is_the_original_bit_by_bit(imported, name):
    folder, _, _ = imported(name)
    assert hf.same_tensors(folder / "hf", folder / "back")
    assert (folder / "hf" / "config.json").read_bytes() == (folder / "back" / "config.json").read_bytes()


@pytest.mark.parametrize("name", CASES)
def test_a_config_json_of_our_making_is_read_by_transformers(imported, name):
    folder, model, _ = imported(name)
    shutil.copytree(folder / "ours", folder / "alone", ignore=shutil.ignore_patterns("hugging_face"))
    assert main(["convert", f"checkpoint.load={folder / 'alone'}", f"output={folder / 'made'}"]) == 0
    again = hf.read(type(model), folder / "made")
    tokens, said = (torch.randint(0, WORDS, (2, length), generator=torch.Generator().manual_seed(4)) for length in (LENGTH, SAID))
    assert torch.equal(theirs(again, tokens, said), theirs(model, tokens, said))


def test_what_is_not_computed_is_refused_by_name(imported, tmp_path, capsys):
    def refused(source, name: str, change: dict) -> str:
        folder = tmp_path / name
        shutil.copytree(source, folder)
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        assert main(["convert", f"hf={folder}", f"output={tmp_path / 'out'}"]) == 2
        return capsys.readouterr().err

    bert, t5 = (imported(name)[0] / "hf" for name in ("bert", "t5"))
    capsys.readouterr()
    assert "position_embedding_type" in refused(bert, "a", {"position_embedding_type": "relative_key"})
    assert "is_decoder" in refused(bert, "b", {"is_decoder": True})
    assert "tie_word_embeddings" in refused(bert, "f", {"tie_word_embeddings": False})
    assert "feed_forward_proj" in refused(t5, "c", {"feed_forward_proj": "gated-silu"})
    assert "decoder.block.3" in refused(t5, "d", {"num_decoder_layers": 4})
    assert "encoder.layer.1" in refused(bert, "e", {"num_hidden_layers": 1})


def test_norms_under_googles_names_are_those_of_today(imported, tmp_path):
    """As the Hub's bert-base-uncased has them. An export has today's."""
    from safetensors.torch import load_file, save_file

    source = imported("bert")[0] / "hf"
    shutil.copytree(source, tmp_path / "old")
    tensors = load_file(source / "model.safetensors")
    named = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor for name, tensor in tensors.items()}
    assert len(set(named) - set(tensors)) == 12, "a norm of the embeddings, two of each layer, one of the head"
    save_file(named, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
    assert main(["convert", f"hf={tmp_path / 'old'}", f"output={tmp_path / 'ours'}"]) == 0
    assert main(["convert", f"checkpoint.load={tmp_path / 'ours'}", f"output={tmp_path / 'back'}"]) == 0
    assert hf.same_tensors(source, tmp_path / "back")
