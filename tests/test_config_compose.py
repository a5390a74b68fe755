"""Overrides as people type them, through Hydra, into the schema and back."""
import dataclasses
import random

import pytest

from megatron_ext.config import overrides
from megatron_ext.config.build import key_types
from megatron_ext.config.compose import compose, from_yaml, load_config, to_yaml
from megatron_ext.config.schema import Config
from megatron_ext.errors import UserError


def refused(*words: str) -> str:
    with pytest.raises(UserError) as error:
        compose(list(words))
    return str(error.value)


def test_defaults_of_conf_are_those_of_the_schema():
    """`--help` shows the schema's defaults; conf/ must not say otherwise."""
    assert compose() == Config()


@pytest.mark.parametrize("text", [
    "outputs/lr=0.001", "a b", "/tmp/한국어,1.txt", "대한민국의 수도는?", "Hello, world", "it's \"so\"", "[not a list", "{a: b}", "C:\\tmp\\",
    "x\\'y", "~/runs", "123", "1e5", "true", "$HOME", "#3", "a:b", "%", "", "tab\there", "null values",
])
def test_text_survives_the_grammar(text):
    assert compose([f"run.dir={text}"]).run.dir == text


def test_random_text_survives_the_grammar():
    source = random.Random(0)
    for _ in range(40):
        text = "x" + "".join(source.choice("\\'\" ,=[]{}:()#%@!?a1 한é~+*&|<>;\t-/.$`") for _ in range(source.randint(1, 12)))
        assert compose([f"run.dir={text}"]).run.dir == text


def test_values_by_type():
    config = compose(["train.tokens=1e9", "optim.lr=3", "parallel.sp=True", "checkpoint.load='a b'", "model.num_query_groups=null",
                      "data.weights=[0.5,1]", "data.paths=[a,b c,'d,e',f=g, 한국어]", "generate.stop=[]", "+train.steps=7"])
    assert config.train.tokens == 10**9 and type(config.train.tokens) is int
    assert config.optim.lr == 3.0 and type(config.optim.lr) is float
    assert config.parallel.sp is True and config.model.num_query_groups is None and config.train.steps == 7
    assert config.checkpoint.load == "a b" and config.data.weights == (0.5, 1.0)
    assert config.data.paths == ("a", "b c", "d,e", "f=g", "한국어") and config.generate.stop == ()


def test_interpolation_is_hydras():
    assert compose(["run.dir=outputs/${model.name}", "model=micro_llama"]).run.dir == "outputs/micro_llama"


def test_presets_come_before_keys_in_any_order():
    config = compose(["model.num_layers=2", "model=gpt2_124m", "parallel=tp2_pp2"])
    assert config.model.num_layers == 2 and config.model.hidden_size == 768 and config.parallel.tp == config.parallel.pp == 2


@pytest.mark.parametrize(("word", "expected"), [
    ("train.stepz=3", ["train.stepz=3", "unknown key", "train.steps"]),
    ("steps=3", ["unknown key", "train.steps"]),
    ("parralel.tp=2", ["parallel.tp"]),
    ("model=tny", ["model=tny", "did you mean model=tiny", "gpt2_124m"]),
    ("stage=stf", ["did you mean stage=sft", "pretrain"]),
    ("train=3", ["group of keys"]),
    ("train.steps=abc", ["train.steps=abc", "a whole number"]),
    ("train.steps=1.5", ["train.steps=1.5", "a whole number"]),
    ("train.steps=", ["a whole number"]),
    ("train.steps=true", ["a whole number"]),
    ("train.steps=null", ["a whole number"]),
    ("optim.lr=fast", ["a number"]),
    ("parallel.sp=1", ["true or false"]),
    ("parallel.vpp=two", ["a whole number or null"]),
    ("optim.lr=1e-3,1e-4", ["one value a run"]),
    ("data.paths=a", ["data.paths=[a]"]),
    ("data.paths=a,b", ["data.paths=[a,b]"]),
    ("data.paths=['a]", ["quote is not closed"]),
    ("data.weights=[a,b]", ["list of numbers", "'a'"]),
    ("~train.steps", ["cannot be deleted"]),
    ("hello world", ["key=value", "--prompt"]),
    ("train.steps", ["key=value", "did you mean train.steps=...?"]),
    ("run.dir=${no.such}", ["run.dir", "no.such"]),
    ("run.dir=${oops", ["run.dir"]),
    ("run.dir=???", ["run.dir"]),
])
def test_refused(word, expected):
    text = refused(word)
    assert all(part in text for part in expected), text


def test_the_same_key_twice_is_refused():
    assert "given twice" in refused("train.steps=1", "train.steps=2")


def test_yaml_and_back(tmp_path):
    config = compose(["run.dir=한국어 a=b", "data.paths=[a,b]", "optim.lr=1e-5", "train.tokens=1e9", "model=llama32_1b"])
    assert from_yaml(to_yaml(config)) == config
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_config(tmp_path) == load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(("content", "expected"), [
    ("train: {stepz: 3}", "train.steps"), ("train: 3", "group of keys"), ("train: {steps: '3'}", "a whole number"), ("- 1", "a mapping"),
    ("a: [", "is not YAML"), ("optim: {lr: [1]}", "a number"), ("!!python/object/apply:os.system ['true']", "is not YAML"),
])
def test_bad_yaml_names_its_file(tmp_path, content, expected):
    file = tmp_path / "config.yaml"
    file.write_text(content)
    with pytest.raises(UserError) as error:
        load_config(file)
    assert expected in str(error.value) and "config.yaml" in str(error.value)


def test_missing_config_file(tmp_path):
    with pytest.raises(UserError, match="is not there"):
        load_config(tmp_path / "none")


def test_only_what_is_named_changes_a_base():
    base = compose(["model=gpt2_124m", "train.steps=7", "optim.lr=0.5"])
    assert compose(["train.micro_batch_size=2"], base=base) == dataclasses.replace(
        base, train=dataclasses.replace(base.train, micro_batch_size=2))
    changed = compose(["parallel=tp2", "precision=bf16"], base=base)
    assert changed.parallel.tp == 2 and changed.precision.dtype == "bf16" and changed.model == base.model and changed.train == base.train


def test_every_preset_composes():
    for group in overrides.GROUPS:
        for option in overrides.options_of(group):
            compose([f"{group}={option}"])
            assert group in ("stage", "cluster") or option == "tiny" or (overrides.conf_dir() / group / f"{option}.yaml").read_text().strip()


def test_every_key_has_a_type_that_can_be_described():
    from megatron_ext.config.build import describe

    assert all(describe(hint) for hint in key_types().values()) and len(key_types()) > 80
