"""Every family in two ranks, TP2 and PP2 (convert_ranks.py), against transformers: logits, greedy tokens, and the export of what a run at that layout saves.

Training steps are compared with one rank's: new kinds of layers have their gradients summed over ranks in the right places.
"""
import json
from pathlib import Path

import pytest
from hugging_face import CASES, same_tensors, save, truth
from spawn import spawn

pytest.importorskip("transformers", reason="transformers is not installed here")
NAMES = list(CASES)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The directory, and {"CASE/LAYOUT": facts}; `off` is of the rank that has logits."""
    import torch

    root = tmp_path_factory.mktemp("convert")
    for number, name in enumerate(NAMES):
        model = save(CASES[name], root / "models" / str(number) / "hf", max_shard_size="150KB")
        torch.save(truth(model), root / "models" / str(number) / "truth.pt")
    spawn([str(Path(__file__).with_name("convert_ranks.py")), str(root / "models")], 2, timeout=570, show=True)
    first, second = (json.loads((root / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert all(first[key]["tokens"] == second[key]["tokens"] for key in first), "ranks disagree"
    return root / "models", {key: fact | {"off": second[key]["off"]} for key, fact in first.items()}


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_tokens_and_export_are_those_of_transformers(found, name, layout):
    root, facts = found
    fact, folder = facts[f"{NAMES.index(name)}/{layout}"], root / str(NAMES.index(name))
    assert fact["off"] < 1e-5
    assert fact["tokens"], "greedy generation grew other tokens"
    assert same_tensors(folder / "hf", folder / f"{layout}-exported")
    assert (folder / "hf" / "config.json").read_bytes() == (folder / f"{layout}-exported" / "config.json").read_bytes()


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
@pytest.mark.parametrize("name", NAMES)
def test_training_is_that_of_one_rank(found, name, layout):
    fact = found[1][f"{NAMES.index(name)}/{layout}"]
    assert fact["losses"] < 1e-5 and fact["norms"] < 1e-4
