"""kernels/context_parallel.py: ring and Ulysses over gloo ranks equal attention on one rank, forward and all gradients."""
import queue
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from context_parallel_ranks import gradients, run

from kernels import ring_attention as ring
from kernels import ulysses_attention as ulysses
from kernels.attention import attention
from kernels.context_parallel import zigzag_join, zigzag_packed_positions, zigzag_positions, zigzag_split

ranks = pytest.mark.parametrize("facts", [2, pytest.param(4, marks=pytest.mark.campaign)], indirect=True, ids=lambda n: f"{n} ranks")


@pytest.fixture(scope="module")
def facts(request, tmp_path_factory):
    return run(tmp_path_factory.mktemp("ranks"), request.param)


@ranks
def test_equal_to_one_rank_by_the_rule(facts):
    """Against fp64 the error of every output and gradient is at most twice that of torch's own op on one rank (tests/kernel_truth.py)."""
    cases = [(name, part, *numbers) for rank in facts for name, parts in rank.items() if " " in name for part, numbers in parts.items()]
    assert len({name for name, *_ in cases}) >= 30
    for name, part, error, theirs, largest in cases:
        eps = torch.finfo(getattr(torch, name.rsplit(" ", 1)[1])).eps
        assert error <= max(2 * theirs, eps * largest), f"{name}, {part}: error {error:.3e}, PyTorch's own {theirs:.3e}, largest value {largest:.1f}"


@ranks
def test_same_bits_when_repeated(facts):
    assert all(rank["bits"] for rank in facts)


@ranks
def test_long_messages_beside_others(facts):
    assert max(rank["long"] for rank in facts) < 2e-5


@ranks
def test_what_does_not_fit_is_refused_by_name(facts):
    expected = {"odd": "ValueError: {}: q holds 5 tokens", "length": "ValueError: {}: cu_seqlens has lengths [6, ",
                "total": "ValueError: {}: cu_seqlens has",
                "keys": "ValueError: {}: k holds 24 tokens, q 4", "dtype": "TypeError: {}: k is torch.bfloat16, q is torch.float32",
                "heads": "ValueError: {}: q has 3 heads, which", "backend": "MissingBackend: varlen cannot serve attention: "}
    for rank in facts:
        for name, message in rank["refused"].items():
            op, case = name.split()
            assert message != "not refused", name
            assert case not in expected or message.startswith(expected[case].format(op)), message
        assert "neither a multiple nor a divisor" in rank["refused"]["ulysses_attention groups"]
        assert "group" in rank["refused"]["ring_attention group"]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_zigzag_split_and_join(size):
    x = torch.arange(2 * 12 * size * 3).view(2, 12 * size, 3)
    parts = [zigzag_split(x, 1, rank, size) for rank in range(size)]
    assert torch.equal(zigzag_join(parts, 1), x)
    for rank, part in enumerate(parts):
        assert torch.equal(part, x[:, zigzag_positions(12 * size, rank, size)])
        assert torch.equal(part[:, :6], x[:, 6 * rank : 6 * rank + 6])
    with pytest.raises(ValueError, match=f"zigzag_split: dimension 2 of x is 3; {size} ranks"):
        zigzag_split(x, 2, 0, size)
    with pytest.raises(ValueError, match=f"zigzag_positions: seq is 3; {size} ranks"):
        zigzag_positions(3, 0, size)


def test_zigzag_of_packed_sequences():
    lengths, size = (8, 0, 4, 16), 2
    cu = torch.tensor([0, 8, 8, 12, 28], dtype=torch.int32)
    for rank in range(size):
        alone = torch.cat([zigzag_positions(n, rank, size) + start for n, start in zip(lengths, cu.tolist())])
        assert torch.equal(zigzag_packed_positions(cu, rank, size), alone)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("method", ["ring", "ulysses"])
def test_more_ranks_in_threads(method, size, causal, packed, monkeypatch):
    """The steps of three and four ranks without as many processes: messages are queues, the sums are the real ones."""
    links: dict = {}

    def link(*key):
        return links.setdefault(key, queue.Queue())  # one step: of a defaultdict, two threads could be given two queues for one key

    class Arrives:
        def __init__(self, rank, tag, into):
            self.rank, self.tag, self.into = rank, tag, into

        def wait(self):
            self.into.copy_(link(self.rank, self.tag).get(timeout=60))

    def shift(send, group, tag):
        link((group.rank() + 1) % size, tag).put(send.clone())
        into = torch.full_like(send, float("nan"))
        return into, [Arrives(group.rank(), tag, into)]

    def all_to_all(received, send, group):
        for rank in range(size):
            link(group.rank(), rank).put(send[rank].clone())
        for rank in range(size):
            received[rank] = link(rank, group.rank()).get(timeout=60)

    monkeypatch.setattr(ring, "_shift", shift)
    monkeypatch.setattr(ulysses.dist, "all_to_all_single", all_to_all)
    for module in (ring, ulysses):
        monkeypatch.setattr(module, "check_split", lambda *_: None)
    function = ring.ring_attention if method == "ring" else ulysses.ulysses_attention
    lengths, heads = (4 * size, 0, 2 * size, 12 * size), 2 * size
    cu = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0).int() if packed else None
    shape = (sum(lengths),) if packed else (6 * size, 2)
    whole = [torch.randn(*shape, n, 8, generator=torch.Generator().manual_seed(i)) for i, n in enumerate((heads, size, size, heads))]

    def mine(x, rank):
        return x[zigzag_packed_positions(cu, rank, size)] if packed else zigzag_split(x, 0, rank, size)

    def one(rank):
        group = SimpleNamespace(rank=lambda: rank, size=lambda: size)
        return gradients(lambda q, k, v: function(q, k, v, group=group, causal=causal, cu_seqlens=cu), *(mine(x, rank) for x in whole))

    with ThreadPoolExecutor(size) as pool:
        found = list(pool.map(one, range(size)))
    expected = gradients(lambda q, k, v: attention(q, k, v, causal=causal, cu_seqlens_q=cu), *whole)
    for rank, parts in enumerate(found):
        torch.testing.assert_close(parts, [mine(x, rank) for x in expected], rtol=1e-5, atol=2e-6)
    assert all(link.empty() for link in links.values()), "a message that nobody took"
