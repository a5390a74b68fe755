"""The same numbers in every layout: one spawn of four ranks trains on real text in all of them (parity_ranks.py), the tests compare.

Hidden size 256, the learning rate of `make run`, 20 steps of which 10 are past the warm-up (8 for the variants of the model, 13 in bf16). fp32: every
loss within 2e-6 of one rank's, relative. Different layouts add the same numbers in another order, which is 1e-7. Tried: without the sum of the
tied embeddings' gradients PP2 is 1e-3 off within four steps, its first gradient norms 3e-2; without that of the gains of norms, the smallest
there is, sequence parallel is 2e-6 off within four steps, its first gradient norms 5e-5.
"""
import pytest
from parity_ranks import difference, run_ranks
from small import prepare_text

pytestmark = [pytest.mark.both, pytest.mark.timeout(1200)]  # one spawn for all: minutes, and several times as many beside other work
LOSS, BF16_LOSS, FP8_LOSS = 2e-6, 2e-3, 1e-3
# bf16 keeps 8 bits: a partial sum rounded before it is added to another is off by up to 2^-9 = 2e-3, and the loss averages over 256 tokens.

LAYOUTS = ("tp2", "tp2sp", "pp2", "interleaved", "tp2pp2", "dp2", "dp2-plain", "tp2dp2", "cp2", "ulysses", "cp2tp2sp")
VARIANTS = (
    "tied/tp2", "tied/pp2", "tied/interleaved", "tied/tp2pp2", "gpt2/tp2sp", "gpt2/pp2", "multi-head/tp2", "multi-head/pp2", "masked/dp2",
    "documents/dp2", "documents/tp2sp", "documents/pp2", "documents/cp2", "gpt2/cp2",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, dict]:
    """Facts of every job: {"losses", "norms", "initial", "final"}; all ranks of a job have seen the same."""
    directory = tmp_path_factory.mktemp("parity")
    prepare_text(directory, split=(1.0, 0.0, 0.0))
    return run_ranks(directory, timeout=1100)


def same_training(runs: dict, name: str, reference: str) -> None:
    assert runs[name]["initial"] == runs[reference]["initial"] != "", "not the same initial weights"
    assert difference(runs, name, reference) <= LOSS
    # While the weights are still the same to the last bits; later gradients of a model this far from a minimum amplify them.
    assert difference(runs, name, reference, "norms", steps=3) <= 5e-6


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_as_one_rank_does(runs, name):
    assert len(runs[name]["losses"]) == (8 if name in ("dp2-plain", "cp2", "ulysses", "cp2tp2sp") else 20)
    same_training(runs, name, "one")


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_the_decoder_and_of_its_batches(runs, name):
    same_training(runs, name, f"{name.split('/')[0]}/one")


@pytest.mark.parametrize("name", ["micro1", "micro4"])
def test_how_the_batch_is_cut_changes_nothing(runs, name):
    same_training(runs, name, "one")


@pytest.mark.parametrize("name", ["full/one", "full/interleaved", "full/tp2sp", "selective/tp2sp"])
def test_recomputation_changes_nothing(runs, name):
    same_training(runs, name, "one")


def test_recomputation_is_bit_identical_where_the_order_of_sums_is(runs):
    for name, reference in (("full/one", "one"), ("selective/tp2sp", "tp2sp"), ("full/tp2sp", "tp2sp"), ("full/interleaved", "interleaved")):
        assert difference(runs, name, reference) == 0.0, name


def test_recomputation_draws_the_same_dropout_again(runs):
    assert runs["dropout/full"]["losses"] == runs["dropout/one"]["losses"]
    assert runs["dropout/full"]["final"] == runs["dropout/one"]["final"]
    assert difference(runs, "dropout/one", "one") > 1e-4


def test_the_variants_are_not_all_one_model(runs):
    """Else the comparisons above could hold because an option does nothing."""
    for name in ("documents/one", "masked/one", "tied/one", "gpt2/one", "multi-head/one"):
        assert difference(runs, name, "one") > 1e-4, name


def test_two_layouts_live_on_the_same_ranks(runs):
    """Stepped in turns on the same ranks, each trains as it does alone: no state is shared. What RLHF needs."""
    for name, alone in (("together/tp2sp", "tp2sp"), ("together/pp2", "gpt2/pp2")):
        assert difference(runs, name, alone) == 0.0 == difference(runs, name, alone, "norms"), name


@pytest.mark.parametrize("name", ["bf16/tp2sp", "bf16/pp2", "bf16/interleaved", "bf16/dp2"])
def test_bf16_stays_near_one_rank(runs, name):
    assert runs[name]["initial"] == runs["bf16/one"]["initial"]
    assert difference(runs, name, "bf16/one") <= BF16_LOSS
    assert difference(runs, name, "bf16/one", "norms", steps=1) <= 1e-3


def test_layers_on_our_kernels_train_as_the_plain_ones_do(runs):
    same_training(runs, "plain", "one")


@pytest.mark.parametrize("name", ["fp8/tp2sp", "fp8-delayed/pp2"])
def test_fp8_in_a_layout_stays_near_one_rank(runs, name):
    reference = f"{name.split('/')[0]}/one"
    assert runs[name]["initial"] == runs[reference]["initial"]
    # A last bit of an fp32 sum decides where a number between two FP8 ones falls, 1/16 apart; from there on two runs part, as two seeds would
    # (3e-4 after five steps of two texts). That scales are those of whole tensors is tested to 1e-6 on one block in test_fp8_layers.py.
    assert difference(runs, name, reference, steps=5) <= FP8_LOSS


def test_delayed_scaling_counts_what_is_recomputed_once(runs):
    assert runs["fp8-delayed/full"]["losses"] == runs["fp8-delayed/one"]["losses"]
    assert runs["fp8-delayed/full"]["final"] == runs["fp8-delayed/one"]["final"]


def test_fp8_follows_fp32_and_its_recipes_are_not_one(runs):
    for name in ("fp8/one", "fp8-delayed/one"):
        assert 1e-5 < difference(runs, name, "one") <= 2e-2, name
    assert difference(runs, "fp8/one", "fp8-delayed/one") > 1e-6


def test_bf16_follows_fp32(runs):
    assert 0 < difference(runs, "bf16/one", "one") <= 3e-3  # another rounding: 2.3e-3 found without AVX-512, below 2e-3 with it


def test_training_learns(runs):
    losses = runs["one"]["losses"]
    assert losses[-1] < losses[0] - 0.5
