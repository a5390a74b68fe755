"""The seam: every patch is still needed and still works, groups are made by their members alone, and no tensor is left on the CPU.

Patches change libraries for good, so each is tried in a process of its own.
"""
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import forked
import pytest
import torch
from small import environment
from spawn import spawn

from megatron_ext.platform import cuda_on_cpu, megatron

pytestmark = pytest.mark.both
ROOT = Path(__file__).resolve().parent.parent
ON_CPU = not torch.cuda.is_available()


def python(source: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    hidden = ("RANK", "WORLD_SIZE")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    return forked.run(arguments, env=environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}, timeout=300,
                      program=("-c", textwrap.dedent(source)), quiet=True)


def passes(source: str, *arguments: str) -> str:
    done = python(source, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# ---- patches -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def probed() -> dict[str, str]:
    """For each patch, what its probe said before and after it: "fails" or "passes". One process a patch, from one warm parent."""
    return dict(line.split("=") for line in passes("""
        import os, sys
        import megatron.core.optimizer, megatron.core.tensor_parallel.random  # imported once, patched in children
        from megatron_ext.platform import cuda_on_cpu, megatron

        def verdict(patch):
            try:
                patch.probe()
            except Exception:
                return "fails"
            return "passes"

        for kind, patches in (("cpu", cuda_on_cpu.PATCHES), ("megatron", megatron.PATCHES)):
            for patch in patches:
                if os.fork() == 0:
                    # A patch of megatron-core may ask for CUDA itself: what else stands in for it is there already.
                    others = [] if kind == "cpu" and patch.name != "gradient-norm" else cuda_on_cpu.PATCHES
                    for other in others:
                        if other is not patch:
                            other.apply()
                    before = verdict(patch)
                    patch.apply()
                    print(f"{patch.name}={before}, {verdict(patch)}", flush=True)
                    os._exit(0)
                os.wait()
    """).splitlines() if "=" in line)


PATCHES = (*(cuda_on_cpu.PATCHES if ON_CPU else ()), *megatron.PATCHES)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_a_patch_is_needed_and_works(probed, patch):
    """Fails before: else upstream does it itself, and the patch has to go. Passes after: else upstream changed under it."""
    assert probed[patch.name] == "fails, passes"


def test_every_patch_says_why_and_has_a_name_of_its_own():
    names = [patch.name for patch in (*cuda_on_cpu.PATCHES, *megatron.PATCHES)]
    assert len(set(names)) == len(names)
    assert all(len(patch.why) > 40 for patch in (*cuda_on_cpu.PATCHES, *megatron.PATCHES))


def test_only_the_seam_knows_of_cuda_and_its_libraries():
    """`torch.cuda.is_available()` and a backend's name elsewhere would be a second place that knows."""
    words = ("torch.cuda.is_available", '"nccl"', "torch.version.cuda")
    asked = {
        str(path.relative_to(ROOT)) for path in (ROOT / "megatron_ext").rglob("*.py")
        if any(word in path.read_text(encoding="utf-8") for word in words)
    }
    # evidence.py reads the name in torch's own flight recording, whatever this process runs on.
    assert asked <= {"megatron_ext/platform/__init__.py", "megatron_ext/doctor.py", "megatron_ext/health/evidence.py"}


# ---- process groups ----------------------------------------------------------------------------------------------------------------


def ranks(source: str, count: int = 3) -> list[str]:
    """Runs `source` in `count` ranks (gloo, connected); what each printed. A rank that hangs is an error."""
    prelude = "import torch.distributed as dist\ndist.init_process_group('gloo')\nrank = dist.get_rank()\n"
    return spawn(["-c", prelude + textwrap.dedent(source)], count, timeout=300)


def test_groups_are_made_by_their_members_alone():
    """Members that have made different numbers of groups before: torch's own names would differ, and both would wait for ever."""
    said = ranks("""
        import torch
        from megatron_ext.platform.megatron import default_group
        from megatron_ext.platform.process_groups import new_group

        for _ in range(rank * 2):
            new_group([rank], "alone", 60)
        pair = new_group([2, 0], "pair", 60) if rank != 1 else new_group([1], "pair", 60)
        again = new_group([0, 2], "pair", 60) if rank != 1 else pair  # the same ranks for the same purpose: another communicator
        value = torch.tensor([float(rank)])
        dist.all_reduce(value, group=pair)
        dist.all_reduce(value, group=again)
        found = [None] * pair.size()
        with default_group(pair):  # rank 1 takes no part: a collective over the world would hang
            dist.all_gather_object(found, rank)
            inside = dist.get_world_size()
        print(float(value), pair.rank(), found, inside, dist.get_world_size())
        dist.barrier()
    """)
    assert said == ["4.0 0 [0, 2] 2 3", "1.0 0 [1] 1 3", "4.0 1 [0, 2] 2 3"]


def test_the_default_group_is_restored_after_an_error():
    from megatron_ext.platform.megatron import default_group

    gather, size = torch.distributed.all_gather_object, torch.distributed.get_world_size
    with pytest.raises(KeyError), default_group(None):
        raise KeyError
    assert (torch.distributed.all_gather_object, torch.distributed.get_world_size) == (gather, size)


def test_a_layout_has_the_groups_of_its_grid():
    said = ranks("""
        from megatron_ext.platform import install, quiet
        quiet()
        install("cpu")
        from megatron_ext.parallel.groups import build_groups
        from megatron_ext.parallel.layout import Layout

        layout = Layout(tp=2, pp=2, ranks=(0, 1, 2, 3))
        groups = build_groups(layout, 60)
        of = lambda group: dist.get_process_group_ranks(group)
        print(of(groups.tp), of(groups.pp), of(groups.dp), of(groups.mp), of(groups.embd), groups.pos_embd is None)
        other = build_groups(Layout(ranks=(0, 1, 2, 3)), 60)  # another layout on the same ranks
        assert other.dp.size() == 4 and other.tp.size() == 1
        dist.barrier()
    """, count=4)
    assert said[3] == "[2, 3] [1, 3] [3] [0, 1, 2, 3] [1, 3] True"
    assert said[0] == "[0, 1] [0, 2] [0] [0, 1, 2, 3] [0, 2] False"


def test_a_layout_that_cannot_be_is_refused():
    from megatron_ext.parallel.layout import Layout

    with pytest.raises(ValueError, match="do not divide"):
        Layout(tp=2, ranks=(0, 1, 2))
    with pytest.raises(ValueError, match="ascend"):
        Layout(tp=2, ranks=(1, 0))


# ---- which device -------------------------------------------------------------------------------------------------------------------


FAULTS = """
import resource, torch
from megatron_ext import platform
if {install}:
    platform.install("cpu")
def cycle():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(16 << 18) for _ in range(16)]  # 16 MiB each
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(*(cycle() for _ in range(4)))
"""


def test_a_cpu_rank_keeps_the_memory_that_it_frees():
    """Page faults of 256 MiB that are taken, freed and taken again."""
    def faults(install: bool, **settings: str) -> int:
        done = subprocess.run([sys.executable, "-c", FAULTS.format(install=install)], env=environment() | settings, capture_output=True, text=True, check=True,
                              timeout=120)
        return sum(map(int, done.stdout.split()[1:]))

    kept, own = faults(True), faults(True, MALLOC_TRIM_THRESHOLD_="65536")
    assert kept < own / 4, (kept, own)


@pytest.mark.skipif(not ON_CPU, reason="there is a GPU here")
def test_a_missing_gpu_is_said():
    done = python("""
        from megatron_ext.errors import UserError
        from megatron_ext.platform import install
        try:
            install("cuda")
        except UserError as error:
            print(error)
        print(install("auto"), install("cpu") is install("auto"))
    """)
    assert "launch.device=cuda: torch sees no CUDA device here" in done.stdout
    assert "device(type='cpu'), backend='gloo') True" in done.stdout


FAKE = """
    import contextlib
    import sys
    import torch
    import torch.distributed as dist
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    torch.cuda.current_device = lambda: torch.device("cuda", 0)  # all that is asked of a driver; factories are as they come
    if torch.version.cuda is None:
        # Some Python methods of a CPU build ask for the driver before fake tensors can answer: the same by operators.
        aten, to = torch.ops.aten, torch.Tensor.to

        def moved(self, *args, **kwargs):
            if args and isinstance(args[0], (str, torch.device)) and not kwargs:
                return aten._to_copy.default(self, device=torch.device(args[0]))
            return to(self, *args, **kwargs)

        def item(self, index):
            index, dim, view = index if isinstance(index, tuple) else (index,), 0, self
            for position, part in enumerate(index):
                if part is None:
                    view = view.unsqueeze(dim)
                elif part is Ellipsis:
                    dim = view.dim() - sum(rest is not None for rest in index[position + 1:]) - 1
                elif isinstance(part, int):
                    view, dim = view.select(dim, part), dim - 1
                elif isinstance(part, slice):
                    view = aten.slice.Tensor(view, dim, part.start, part.stop, part.step or 1)
                else:
                    return aten.index.Tensor(view, [None] * dim + [part])
                dim += 1
            return view

        def set_item(self, index, value):
            mask = index[0] if isinstance(index, tuple) else index
            if not isinstance(mask, torch.Tensor):
                return item(self, index).fill_(value)
            return self.masked_fill_(mask.reshape(*mask.shape, *(1,) * (self.dim() - mask.dim())), value)

        torch.Tensor.__getitem__, torch.Tensor.__setitem__ = item, set_item
        torch.Tensor.contiguous = lambda self: self if self.is_contiguous() else aten.clone.default(self, memory_format=torch.contiguous_format)
        torch.Tensor.float = lambda self: aten._to_copy.default(self, dtype=torch.float32)
        torch.Tensor.__invert__, torch.Tensor.to = lambda self: aten.bitwise_not.default(self), moved
    from megatron_ext.config.schema import KernelsConfig, ModelConfig, ParallelConfig, PrecisionConfig
    from megatron_ext.models import decoder, norm
    from megatron_ext.models.build import FAMILIES
    from megatron_ext.models.layers import transformer_config
    from megatron_ext.parallel.groups import build_groups
    from megatron_ext.parallel.layout import Layout
    from megatron_ext.models.attention import document_mask, pack
    from megatron_ext.platform import megatron
    from megatron.core.tensor_parallel import random

    # Dropout's streams live in the driver, and there is no dropout here.
    random.get_cuda_rng_tracker().fork = lambda *args: contextlib.nullcontext()
    next(patch for patch in megatron.PATCHES if patch.name == "memory-buffer").apply()
    what, mutation, layers = sys.argv[1:]
    models = {
        "llama": ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, num_query_groups=2, rope_scaling_factor=8.0),
        "gpt2": ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, position_embedding="learned", norm="layernorm",
                            activation="gelu_tanh", bias=True, qkv_bias=True, tied_embeddings=True),
        "t5": ModelConfig(family="encoder_decoder", num_layers=1, hidden_size=64, num_attention_heads=4, position_embedding="relative", activation="relu",
                          attention_scale=1.0, tied_embeddings=True),
    }
    model = models[what.split("-")[0]]
    parallel = ParallelConfig(tp=2, sp=what.endswith("sp"))
    groups = build_groups(Layout(tp=2, sp=parallel.sp, ranks=(0, 1)))
    if mutation == "norm":
        honest = norm.Norm.forward
        norm.Norm.forward = lambda self, x: honest(self, x) + torch.zeros(x.shape[-1])
    if mutation == "loss":
        honest = decoder.vocab_parallel_cross_entropy
        decoder.vocab_parallel_cross_entropy = lambda logits, labels, **k: honest(logits, labels, **k) + torch.ones(labels.shape)
    if mutation == "rotary":
        honest = decoder.Decoder.rotary_angles
        decoder.Decoder.rotary_angles = lambda self, *a: honest(self, *a).cpu()
    with FakeTensorMode(), torch.no_grad():
        config = transformer_config(model, parallel, PrecisionConfig(dtype="bf16"), KernelsConfig(layers=layers), on_cpu=False)
        built = FAMILIES[model.family](model, config, groups, vocab_size=500, padded_vocab_size=512, first=True, last=True)
        for module in built.modules():  # what megatron-core makes on the CPU and build_model moves: Module.to cannot swap fake tensors
            for name, value in list(module._parameters.items()):
                if value is not None and value.device.type != "cuda":
                    # (and Float16Module casts)
                    module._parameters[name] = torch.nn.Parameter(torch.ops.aten._to_copy.default(value.detach(), dtype=torch.bfloat16, device=torch.device("cuda")))
        tokens = torch.zeros(2, 16, dtype=torch.int64, device="cuda")
        positions = torch.arange(16, device="cuda")[None].expand(2, -1)
        mask = packed = None
        if "documents" in what:
            documents = torch.zeros(2, 16, dtype=torch.int32, device="cuda")
            mask, packed = (document_mask(documents), None) if layers == "plain" else (None, pack(documents))
        inputs = {"decoder_tokens": tokens} if what == "t5" else {}
        total, loss = built(tokens, positions, mask, labels=tokens, packed=packed, rows_differ="documents" in what, **inputs)
        assert total.shape == () and total.device.type == "cuda", total
        assert loss.shape == (2, 16) and loss.device.type == "cuda", loss
        logits = built(tokens, positions, mask, packed=packed, **inputs)
        assert logits.shape == (2, 16, 256) and logits.device.type == "cuda"
        left = [name for name, tensor in (*built.named_parameters(), *built.named_buffers()) if tensor.device.type != "cuda"]
        assert not left, left
    print("all on cuda")
"""


NEEDS_CUDA_BUILD = pytest.mark.skipif(torch.version.cuda is None, reason="torch's CPU build has no fake CUDA dropout; the second leg runs this")


@pytest.mark.parametrize(("what", "layers"), [
    ("llama", "fused"), ("t5", "fused"), ("llama-sp", "fused"), ("llama-sp", "plain"),
    ("llama-documents", "plain"),  # the kernels look at where documents end, which fake tensors cannot tell
    pytest.param("gpt2", "fused", marks=NEEDS_CUDA_BUILD), pytest.param("gpt2-sp", "plain", marks=NEEDS_CUDA_BUILD),
])
def test_a_forward_pass_on_cuda_makes_no_tensor_on_the_cpu(what, layers):
    """Without the CPU layer, which would hide it. No GPU is needed: fake tensors have a device and no memory."""
    done = python(FAKE, what, "none", layers)
    assert done.stdout.strip().endswith("all on cuda"), done.stderr[-3000:]


@pytest.mark.parametrize("mutation", ["norm", "loss", "rotary"])
def test_a_forgotten_device_is_caught(mutation):
    done = python(FAKE, "llama", mutation, "plain")
    assert done.returncode == 1 and "cuda:0" in done.stderr.splitlines()[-1] and "cpu" in done.stderr.splitlines()[-1], done.stderr[-3000:]
