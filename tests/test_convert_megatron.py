"""Checkpoints of Megatron-LM's scripts (torch_dist), made by megatron-core's own writer, read without unpickling."""
import pickle
import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import decoders
import pytest
import torch
from hugging_face import restored
from megatron.core import dist_checkpointing

from megatron_ext.checkpoint import find, read_record
from megatron_ext.cli.main import main
from megatron_ext.config import sizes
from megatron_ext.convert import pickles

pytestmark = pytest.mark.usefixtures("connected")

LLAMA = replace(decoders.LLAMA, qk_norm=True)
GPT2 = decoders.VARIANTS["gpt2"]
TE = {"input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight", "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight"}


def arguments(model) -> Namespace:
    """What Megatron-LM's scripts would have been told, and much that says nothing of the model."""
    return Namespace(
        num_layers=model.num_layers, hidden_size=model.hidden_size, ffn_hidden_size=sizes.ffn_size(model), num_attention_heads=model.num_attention_heads,
        group_query_attention=model.num_query_groups is not None, num_query_groups=model.num_query_groups or 1, kv_channels=sizes.head_dim(model),
        max_position_embeddings=model.max_sequence_length, position_embedding_type={"rope": "rope", "learned": "learned_absolute"}[model.position_embedding],
        rotary_percent=1.0, rotary_base=10000, normalization={"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}[model.norm], norm_epsilon=model.norm_eps,
        swiglu=model.activation == "swiglu", add_bias_linear=model.bias, add_qkv_bias=False, qk_layernorm=model.qk_norm,
        untie_embeddings_and_output_weights=not model.tied_embeddings, bias_gelu_fusion=True, num_experts=None, hidden_dropout=0.0, attention_dropout=0.0,
        vocab_size=None, padded_vocab_size=128, params_dtype=torch.float32, tokenizer_model=Path("/somewhere"), lr=1e-3, data_path=["a"],
    )


def write(folder: Path, model, *, rename: dict[str, str] | None = None, **changed):
    """A checkpoint as `--ckpt-format torch_dist` leaves it; the engine it was made of."""
    engine = decoders.build(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in engine.models[0].parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    state = engine.sharded_state(loading=False, weights_only=True)
    for tensor in state["model"].values():
        for ours, theirs in (rename or {}).items():
            if hasattr(tensor, "key") and tensor.key.endswith(ours):
                tensor.key = tensor.key.replace(ours, theirs)
    args = arguments(model)
    vars(args).update(changed)
    iteration = folder / "iter_0000007"
    iteration.mkdir(parents=True)
    dist_checkpointing.save(state | {"args": args, "iteration": 7, "checkpoint_version": 3.0}, str(iteration))
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    return engine


@pytest.mark.parametrize(("model", "rename"), [(LLAMA, None), (LLAMA, TE), (GPT2, None)], ids=["llama", "llama by Transformer Engine", "gpt2"])
def test_the_model_is_the_same(connected, tmp_path, model, rename):
    theirs = write(tmp_path / "megatron", model, rename=rename)
    assert main(["convert", f"megatron={tmp_path / 'megatron'}", f"output={tmp_path / 'ours'}", "parallel.tp=2"]) == 0
    record = read_record(find(str(tmp_path / "ours"), tmp_path))
    assert record["origin"]["iteration"] == 7 and ".metadata" in record["origin"]["weights"]
    ours, found = restored(tmp_path / "ours", connected)
    assert found.vocab_size == 128, "nobody has said how many of the rows are words"
    tokens = torch.randint(0, 120, (2, 24), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(24)[None].expand(2, -1)
    with torch.no_grad():
        assert torch.equal(ours.models[0].eval()(tokens, positions), theirs.models[0].eval()(tokens, positions))
    assert main(["convert", f"checkpoint.load={tmp_path / 'ours'}", f"output={tmp_path / 'hf'}"]) == 0, "and out to Hugging Face"


@pytest.fixture(scope="module")
def sound(connected, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "megatron"
    write(folder, decoders.LLAMA)
    return folder


def refused(folder: Path, tmp_path: Path, capsys) -> str:
    assert main(["convert", f"megatron={folder}", f"output={tmp_path / 'ours'}"]) == 2
    return capsys.readouterr().err


class Hostile:
    """A pickle that leaves a mark when it is executed."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", [".metadata", "common.pt", "__0_0.distcp"])
def test_a_hostile_file_is_refused_and_not_executed(sound, tmp_path, capsys, name):
    shutil.copytree(sound, tmp_path / "megatron")
    file, mark = tmp_path / "megatron" / "iter_0000007" / name, tmp_path / "executed"
    if name == "common.pt":
        torch.save({"args": Hostile(mark), "iteration": 7}, file)
    elif name == ".metadata":
        file.write_bytes(pickle.dumps(Hostile(mark)))
    else:
        file.write_bytes(pickle.dumps(Hostile(mark)) + b"\0" * file.stat().st_size)
    assert name in refused(tmp_path / "megatron", tmp_path, capsys)
    assert not mark.exists()


def test_what_is_read_of_a_pickle_is_inert():
    found = pickles.loads(pickle.dumps({"a": Namespace(b=(1, torch.float32)), "c": Path("/x"), "d": {1, 2}}))
    assert found["a"].b[0] == 1 and found["d"] == {1, 2} and isinstance(found["c"], pickles.Inert)
    with pytest.raises(ValueError, match="is no pickle"):
        pickles.loads(b"nothing of the kind")


@pytest.mark.parametrize(("change", "said"), [
    ({"hidden_size": None}, "hidden_size is no number"), ({"num_experts": 8}, "num_experts=8"), ({"normalization": "Other"}, "normalization=Other"), ({"num_layers": 5}, "shape"),
    ({"add_bias_linear": True}, "lacks the tensor"), ({"qk_layernorm": True}, "lacks the tensor"),
    ({"untie_embeddings_and_output_weights": False}, "output_layer.weight, which no model of its arguments has"),
])
def test_arguments_that_do_not_fit(connected, tmp_path, capsys, change, said):
    write(tmp_path / "megatron", decoders.LLAMA, **change)
    assert said in refused(tmp_path / "megatron", tmp_path, capsys)


def test_a_file_that_is_missing_or_cut_short(sound, tmp_path, capsys):
    shutil.copytree(sound, tmp_path / "megatron")
    file = min((tmp_path / "megatron" / "iter_0000007").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-100])
    assert f"{file.name}=" not in (said := refused(tmp_path / "megatron", tmp_path, capsys)) and file.name in said and "cut short" in said
    (tmp_path / "megatron" / "iter_0000007" / ".metadata").unlink()
    assert "torch_dist" in refused(tmp_path / "megatron", tmp_path, capsys)
