"""kernels/rope.py against fp64, megatron-core and transformers; both backends, both pairings."""
import math

import pytest
import torch
from kernel_truth import DEVICE, SIZES, draw, each_backend, each_dtype, judge, same_bits

from kernels.backend import MissingBackend
from kernels.rope import LinearScaling, Llama3Scaling, inverse_frequencies, rope, rope_reference, rope_tables

each_pairing = pytest.mark.parametrize("interleaved", (False, True), ids=("halves", "interleaved"))


def tables(*shape: int, rotary: int, seed: int = 0, longest: int = 5000) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin at random positions, so that a token can be told from its neighbour."""
    positions = torch.randint(longest, shape, generator=torch.Generator().manual_seed(seed))
    return rope_tables(positions.to(DEVICE), inverse_frequencies(rotary, device=DEVICE))


def judged(q, k, cos, sin, *, interleaved: bool, backend: str) -> None:
    douts = [draw(*x.shape, dtype=x.dtype, seed=90 + i) for i, x in enumerate((q, k))]
    judge(lambda q, k: rope(q, k, cos, sin, interleaved=interleaved, backend=backend),
          lambda q, k: rope_reference(q, k, cos, sin, interleaved), [q, k], douts, names=("q'", "k'", "dq", "dk"))


@each_backend
@each_dtype
@each_pairing
@pytest.mark.parametrize("tokens", SIZES)
def test_error_is_at_most_twice_that_of_pytorch(tokens, interleaved, dtype, backend):
    q, k = draw(tokens, 1, 3, 8, dtype=dtype, seed=tokens), draw(tokens, 1, 1, 8, dtype=dtype, seed=tokens + 1)
    judged(q, k, *tables(tokens, 1, rotary=8), interleaved=interleaved, backend=backend)


@each_backend
@each_pairing
@pytest.mark.parametrize("dim, rotary", [(2, 2), (3, 2), (64, 64), (80, 20), (96, 96), (127, 2), (128, 32), (128, 126), (129, 128), (256, 256)])
def test_head_sizes_and_partial_rotation(dim, rotary, interleaved, backend):
    q, k = draw(5, 2, 7, dim, dtype=torch.bfloat16, seed=dim), draw(5, 2, 2, dim, dtype=torch.bfloat16, seed=dim + 1)
    cos, sin = tables(5, 2, rotary=rotary)
    judged(q, k, cos, sin, interleaved=interleaved, backend=backend)
    turned, _ = rope(q, k, cos, sin, interleaved=interleaved, backend=backend)
    assert torch.equal(turned[..., rotary:], q[..., rotary:])


@each_backend
@each_pairing
def test_views_of_a_fused_projection_and_other_strides(interleaved, backend):
    heads, groups, dim = 4, 2, 16
    cos, sin = tables(6, 3, rotary=dim)
    fused = draw(6, 3, groups, (heads // groups + 2) * dim, dtype=torch.float32, seed=1)  # megatron-core's: per group its queries, key, value

    def parts(x):
        q, k, _ = x.split([heads // groups * dim, dim, dim], dim=-1)
        return q.unflatten(-1, (heads // groups, dim))[:, :, :, 0], k

    judge(lambda x: rope(*parts(x), cos, sin, interleaved=interleaved, backend=backend),
          lambda x: rope_reference(*parts(x), cos, sin, interleaved), [fused],
          [draw(2, 6, 3, dim, dtype=torch.float32, seed=i).permute(1, 2, 0, 3) for i in (2, 3)])
    q = draw(3, heads, 6, dim, dtype=torch.float32, seed=4)  # [batch, heads, seq, d]
    judge(lambda q: rope(q.permute(2, 0, 1, 3), None, cos, sin, interleaved=interleaved, backend=backend)[0],
          lambda q: rope_reference(q.permute(2, 0, 1, 3), None, cos, sin, interleaved)[0], [q],
          [draw(dim, heads, 3, 6, dtype=torch.float32, seed=5).permute(3, 2, 1, 0)])
    wide = torch.stack((cos, sin), dim=-2)  # tables may be views too
    for found, expected in zip(rope(q.permute(2, 0, 1, 3), None, wide[..., 0, :], wide[..., 1, :], backend=backend),
                               rope(q.permute(2, 0, 1, 3), None, cos, sin, backend=backend), strict=True):
        assert found is expected is None or torch.equal(found, expected)


@each_backend
def test_one_table_serves_the_batch_and_packed_tokens_are_a_batch_of_one(backend):
    q, k = draw(5, 3, 4, 8, dtype=torch.float32, seed=1), draw(5, 3, 2, 8, dtype=torch.float32, seed=2)
    cos, sin = tables(5, 1, rotary=8)
    judged(q, k, cos, sin, interleaved=False, backend=backend)
    together = rope(q, k, cos, sin, backend=backend)
    expanded = rope(q, k, cos.expand(5, 3, 4), sin.expand(5, 3, 4), backend=backend)
    packed = rope(q[:, 1], k[:, 1], cos[:, 0], sin[:, 0], backend=backend)
    for i in range(2):
        assert torch.equal(together[i], expanded[i])
        assert torch.equal(together[i][:, 1], packed[i])


@each_backend
def test_positions_restart_in_each_packed_document_and_go_on_while_decoding(backend):
    inverse = inverse_frequencies(16, device=DEVICE)
    q, k = draw(9, 2, 16, dtype=torch.float32, seed=3), draw(9, 2, 16, dtype=torch.float32, seed=4)
    packed = rope(q, k, *rope_tables(torch.tensor([0, 1, 2, 3, 0, 1, 0, 1, 2], device=DEVICE), inverse), backend=backend)
    for begin, end in ((0, 4), (4, 6), (6, 9)):
        alone = rope(q[begin:end], k[begin:end], *rope_tables(torch.arange(end - begin, device=DEVICE), inverse), backend=backend)
        assert torch.equal(packed[0][begin:end], alone[0]) and torch.equal(packed[1][begin:end], alone[1])
    # rows of a batch that have come to different lengths: one token each
    step = rope(q[:1].expand(3, 2, 16).unsqueeze(0), None, *rope_tables(torch.tensor([[7, 0, 1000]], device=DEVICE), inverse), backend=backend)[0]
    for row, position in enumerate((7, 0, 1000)):
        assert torch.equal(step[0, row], rope(q[:1], None, *rope_tables(torch.tensor([position], device=DEVICE), inverse), backend=backend)[0][0])


@each_backend
@each_pairing
@pytest.mark.parametrize("rotary", (16, 32))
def test_norms_stay_and_products_see_only_the_distance(rotary, interleaved, backend):
    q, k = draw(1, 4, 32, dtype=torch.float32, seed=5).expand(64, 4, 32), draw(1, 4, 32, dtype=torch.float32, seed=6).expand(64, 4, 32)
    inverse = inverse_frequencies(rotary, device=DEVICE)

    def turned(x, positions):
        return rope(x, None, *rope_tables(positions.to(DEVICE), inverse), interleaved=interleaved, backend=backend)[0]

    at = torch.randint(100_000, (64,), generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(turned(q, at).norm(dim=-1), q.norm(dim=-1), rtol=1e-6, atol=0)
    product = (turned(q, at + 13) * turned(k, at)).sum(-1)
    torch.testing.assert_close(product, product[:1].expand_as(product), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(product[0], (turned(q, torch.full((64,), 13)) * k).sum(-1)[0], rtol=1e-5, atol=1e-5)


@each_backend
@each_pairing
def test_turning_back_gives_the_input(interleaved, backend):
    q, k = draw(9, 2, 3, 16, dtype=torch.float32, seed=8), draw(9, 2, 1, 16, dtype=torch.float32, seed=9)
    cos, sin = tables(9, 2, rotary=12)
    back = rope(*rope(q, k, cos, sin, interleaved=interleaved, backend=backend), cos, -sin, interleaved=interleaved, backend=backend)
    torch.testing.assert_close(back[0], q, rtol=0, atol=1e-6)
    torch.testing.assert_close(back[1], k, rtol=0, atol=1e-6)


@each_backend
def test_gradient_of_the_gradient(backend):
    cos, sin = tables(4, 1, rotary=8)
    q = draw(4, 2, 3, 8, dtype=torch.float32, seed=10).requires_grad_()
    dy = draw(4, 2, 3, 8, dtype=torch.float32, seed=11).requires_grad_()
    (dq,) = torch.autograd.grad(rope(q, None, cos, sin, backend=backend)[0], q, dy, create_graph=True)
    weight = draw(4, 2, 3, 8, dtype=torch.float32, seed=12)
    (found,) = torch.autograd.grad(dq, dy, weight)
    torch.testing.assert_close(found, rope(weight, None, cos, sin, backend=backend)[0], rtol=0, atol=0)


@each_backend
def test_one_output_alone_may_be_used(backend):
    cos, sin = tables(4, 1, rotary=8)
    q, k = (draw(4, 2, 2, 8, dtype=torch.float32, seed=s).requires_grad_() for s in (13, 14))
    turned, _ = rope(q, k, cos, sin, backend=backend)
    turned.sum().backward()
    (expected,) = torch.autograd.grad(rope_reference(q, None, cos, sin)[0].sum(), q)
    torch.testing.assert_close(q.grad, expected)
    assert k.grad is None or not k.grad.any()


@each_backend
@pytest.mark.parametrize("shape", [(0, 2, 2, 8), (3, 0, 2, 8), (0, 2, 8)])
def test_nothing_in_nothing_out(shape, backend):
    q, k = torch.empty(shape, device=DEVICE, requires_grad=True), torch.empty(shape, device=DEVICE, requires_grad=True)
    leading = shape[:-2]
    table = torch.empty(*leading, 4, device=DEVICE)
    turned = rope(q, k, table, table, backend=backend)
    (turned[0].sum() + turned[1].sum()).backward()
    assert turned[0].shape == q.grad.shape == shape and turned[1].shape == k.grad.shape == shape


@each_backend
def test_keys_without_heads(backend):
    cos, sin = tables(3, 1, rotary=8)
    q = draw(3, 1, 2, 8, dtype=torch.float32, seed=1)
    found, empty = rope(q, q[:, :, :0], cos, sin, backend=backend)
    torch.testing.assert_close(found, rope_reference(q, None, cos, sin)[0])
    assert empty.shape == (3, 1, 0, 8)


@each_backend
def test_results_and_inputs_may_be_changed_in_place(backend):
    cos, sin = tables(4, 1, rotary=8)
    leaf = draw(4, 2, 2, 8, dtype=torch.float32, seed=15).requires_grad_()
    q = leaf * 1
    turned, keys = rope(q, q, cos, sin, backend=backend)
    with torch.no_grad():
        q.zero_()  # nothing of q is kept
    turned.mul_(2)
    (turned + keys).sum().backward()
    (expected,) = torch.autograd.grad(3 * rope_reference(leaf, None, cos, sin)[0].sum(), leaf)
    torch.testing.assert_close(leaf.grad, expected)


@each_backend
@each_pairing
def test_same_bits_and_no_grad(interleaved, backend):
    q, k = draw(17, 2, 5, 16, dtype=torch.bfloat16, seed=16), draw(17, 2, 5, 16, dtype=torch.bfloat16, seed=17)
    cos, sin = tables(17, 1, rotary=16)
    same_bits(lambda q, k: rope(q, k, cos, sin, interleaved=interleaved, backend=backend), [q, k], [q, k])
    with torch.no_grad():
        assert not rope(q.requires_grad_(), k, cos, sin, backend=backend)[0].requires_grad


def test_torch_path_in_several_pieces():
    q = draw(9, 1, 512, 128, dtype=torch.float32, seed=18)  # 2.25 of the pieces that the CPU works on
    cos, sin = tables(9, 1, rotary=128)
    for interleaved in (False, True):
        torch.testing.assert_close(rope(q, None, cos, sin, interleaved=interleaved, backend="torch")[0],
                                   rope_reference(q, None, cos, sin, interleaved)[0], rtol=1e-5, atol=1e-5)


@each_pairing
@each_backend
def test_agrees_with_megatron_core(interleaved, backend):
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    q, k = draw(7, 2, 4, 16, dtype=torch.float32, seed=19), draw(7, 2, 2, 16, dtype=torch.float32, seed=20)
    positions, inverse = torch.arange(7, device=DEVICE).unsqueeze(1), inverse_frequencies(8, device=DEVICE)
    angles = (positions.double().unsqueeze(-1) * inverse).float()
    angles = (angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)).unsqueeze(2)
    found = rope(q, k, *rope_tables(positions, inverse), interleaved=interleaved, backend=backend)
    for x, y in zip((q, k), found, strict=True):
        torch.testing.assert_close(y, _apply_rotary_pos_emb_bshd(x, angles, rotary_interleaved=interleaved), rtol=1e-5, atol=2e-6)


@each_backend
def test_agrees_with_transformers(backend):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k = draw(7, 2, 4, 16, dtype=torch.float32, seed=21), draw(7, 2, 2, 16, dtype=torch.float32, seed=22)
    cos, sin = rope_tables(torch.arange(7, device=DEVICE).unsqueeze(1), inverse_frequencies(16, device=DEVICE))
    batch_first = [torch.cat((t, t), -1).transpose(0, 1) for t in (cos, sin)]
    theirs = llama.apply_rotary_pos_emb(q.permute(1, 2, 0, 3), k.permute(1, 2, 0, 3), *batch_first)
    for found, expected in zip(rope(q, k, cos, sin, backend=backend), theirs, strict=True):
        torch.testing.assert_close(found, expected.permute(2, 0, 1, 3), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rope_type, scaling, theirs", [
    ("llama3", Llama3Scaling(), {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}),
    ("llama3", Llama3Scaling(factor=32.0), {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                            "original_max_position_embeddings": 8192}),
    ("linear", LinearScaling(4.0), {"factor": 4.0}),
])
@pytest.mark.parametrize("head_dim, base", [(128, 500_000.0), (64, 10_000.0)])
def test_scaled_frequencies_agree_with_transformers(head_dim, base, rope_type, scaling, theirs):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(head_dim=head_dim, max_position_embeddings=131072,
                                      rope_parameters={"rope_type": rope_type, "rope_theta": base, **theirs})
    expected, factor = ROPE_INIT_FUNCTIONS[rope_type](config)
    assert factor == 1.0
    found = inverse_frequencies(head_dim, base, scaling=scaling)
    torch.testing.assert_close(found.float(), expected, rtol=3e-6, atol=0)
    assert found.dtype == torch.float64


def test_tables_are_right_at_a_million():
    mpmath = pytest.importorskip("mpmath")
    positions, inverse = torch.tensor([0, 1, 4096, 131_071, 999_983, 1_048_575]), inverse_frequencies(128, 500_000.0)
    cos, sin = rope_tables(positions, inverse)
    with mpmath.workdps(40):
        for i, position in enumerate(positions.tolist()):
            for pair in (0, 1, 17, 63):
                angle = position / mpmath.mpf(500_000) ** (mpmath.mpf(2 * pair) / 128)
                assert abs(cos[i, pair].item() - mpmath.cos(angle)) < 6e-8 and abs(sin[i, pair].item() - mpmath.sin(angle)) < 6e-8
    scaled = rope_tables(positions, inverse, scale=1.5)
    torch.testing.assert_close(scaled[0], 1.5 * cos, rtol=2e-7, atol=0)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == (6, 64)


def test_bad_input_is_named():
    q, k = torch.randn(4, 2, 6, 8), torch.randn(4, 2, 3, 8)
    cos = torch.randn(4, 1, 4)
    sin = torch.randn(4, 1, 4)
    for match, error, call in (
        ("q is int64", TypeError, lambda: rope(q.long(), k, cos, sin)),
        ("k is float16", TypeError, lambda: rope(q, k.half(), cos, sin)),
        ("cos is bfloat16", TypeError, lambda: rope(q, k, cos.bfloat16(), sin)),
        ("sin is float64", TypeError, lambda: rope(q, k, cos, sin.double())),
        ("q has shape", ValueError, lambda: rope(q[0, 0], None, cos, sin)),
        ("k has shape", ValueError, lambda: rope(q, k[:3], cos, sin)),
        ("k has shape", ValueError, lambda: rope(q, k[0], cos, sin)),
        ("k has shape", ValueError, lambda: rope(q, k[..., :6], cos, sin)),
        ("cos has shape", ValueError, lambda: rope(q, k, cos[:3], sin)),
        ("cos has shape", ValueError, lambda: rope(q, k, cos[:, 0], sin)),
        ("cos has shape", ValueError, lambda: rope(q, k, cos.expand(4, 3, 4), sin)),
        ("cos has shape .* with r at most d", ValueError, lambda: rope(q, k, torch.randn(4, 1, 5), sin)),
        ("cos has shape", ValueError, lambda: rope(q, k, cos[..., :0], sin)),
        ("sin has shape", ValueError, lambda: rope(q, k, cos, sin[..., :2])),
        ("last dimension of q is strided", ValueError, lambda: rope(q.transpose(2, 3), None, torch.randn(4, 1, 3), torch.randn(4, 1, 3))),
        ("last dimension of k is strided", ValueError, lambda: rope(q, torch.randn(4, 2, 3, 16)[..., ::2], cos, sin)),
        ("last dimension of cos is strided", ValueError, lambda: rope(q, k, torch.randn(4, 1, 8)[..., ::2], sin)),
        ("k is on meta", ValueError, lambda: rope(q, k.to("meta"), cos, sin)),
        ("sin is on meta", ValueError, lambda: rope(q, k, cos, sin.to("meta"))),
        ("cos requires a gradient", ValueError, lambda: rope(q, k, cos.clone().requires_grad_(), sin)),
        ("unknown here; there are: ", MissingBackend, lambda: rope(q, k, cos, sin, backend="cudnn")),
        ("positions is float32", TypeError, lambda: rope_tables(torch.ones(3), inverse_frequencies(8))),
        ("inverse_frequencies is bfloat16", TypeError, lambda: rope_tables(torch.arange(3), inverse_frequencies(8).bfloat16())),
        ("inverse_frequencies has shape", ValueError, lambda: rope_tables(torch.arange(3), inverse_frequencies(8).view(2, 2))),
        ("rotary_dim is 7", ValueError, lambda: inverse_frequencies(7)),
        ("base is 0", ValueError, lambda: inverse_frequencies(8, 0)),
        ("scaling.factor is 0", ValueError, lambda: inverse_frequencies(8, scaling=LinearScaling(0))),
        ("low_freq_factor is 4", ValueError, lambda: inverse_frequencies(8, scaling=Llama3Scaling(low_freq_factor=4.0))),
    ):
        with pytest.raises(error, match=match):
            call()
    assert math.isfinite(rope(q, k, cos, sin)[0].sum().item())


@each_backend
@each_pairing
def test_registered_as_torch_wants_it(interleaved, backend):
    cos, sin = tables(3, 1, rotary=8)
    q = draw(3, 2, 2, 8, dtype=torch.float32, seed=23).requires_grad_()
    k = draw(3, 2, 1, 8, dtype=torch.float32, seed=24).requires_grad_()
    for inverse in (False, True):
        torch.library.opcheck(torch.ops.kernels.rope.default, ([q, k], cos, sin, interleaved, inverse, backend))
    torch.library.opcheck(torch.ops.kernels.rope.default, ([q], cos, sin, interleaved, False, backend))
    compiled = torch.compile(lambda q, k: rope(q, k, cos, sin, interleaved=interleaved, backend=backend), fullgraph=True, backend="aot_eager")
    for function in (compiled, lambda q, k: rope(q, k, cos, sin, interleaved=interleaved, backend=backend)):
        results = function(q, k)
        grads = torch.autograd.grad([y.pow(2).sum() for y in results], (q, k))
        if function is compiled:
            expected = [*results, *grads]
        else:
            for found, wanted in zip([*results, *grads], expected, strict=True):
                torch.testing.assert_close(found, wanted, rtol=0, atol=0)
