"""Small decoders for the tests of generation and evaluation, and the slow truth: a full forward pass for every token, without a cache."""
import importlib.util
from dataclasses import replace
from pathlib import Path

from megatron_ext.config.schema import Config, ModelConfig, ParallelConfig, PrecisionConfig

WORDS = 120  # not a multiple of the table's 128: padding must never be drawn
LLAMA = ModelConfig(num_layers=4, hidden_size=64, num_attention_heads=4, num_query_groups=2, max_sequence_length=64, init_std=0.1)
VARIANTS = {
    "llama": LLAMA,
    "multi-head, partial and interleaved rotary": replace(LLAMA, num_query_groups=None, rotary_percent=0.5, rotary_interleaved=True),
    "multi-query, scaled rotary": replace(LLAMA, num_query_groups=1, rope_scaling_factor=8.0, qkv_bias=True, activation="geglu"),
    "gpt2": replace(
        LLAMA, num_query_groups=None, position_embedding="learned", norm="layernorm", activation="gelu_tanh", bias=True, qkv_bias=True,
        tied_embeddings=True,
    ),
}
LENGTHS = (5, 1, 9, 3, 12, 7)


def build(model: ModelConfig = LLAMA, layout=None, *, words: int = WORDS, dtype: str = "fp32", train: bool = False):
    """An engine on this process (or in `layout`), with fresh weights; `platform.connect` has been called by then."""
    from megatron_ext import platform
    from megatron_ext.parallel.layout import Layout
    from megatron_ext.train.engine import Engine

    layout = layout or Layout()
    parallel = ParallelConfig(tp=layout.tp, pp=layout.pp, vpp=layout.vpp, sp=layout.sp)
    config = Config(model=model, parallel=parallel, precision=PrecisionConfig(dtype=dtype))
    return Engine(config, layout, platform.install("cpu"), vocab_size=words, train=train)


def stirred(engine):
    """The engine with gains that are not 1 and biases that are not 0: a copy that forgets one must show."""
    import torch

    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in engine.models[0].named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return engine


def prompts(lengths=LENGTHS, words: int = WORDS) -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, words, (length,), generator=generator).tolist() for length in lengths]


def logits_of(engine, tokens: list[int]):
    """fp32 [len(tokens), words] of a one-rank engine: what it says behind each token."""
    import torch

    model = engine.models[0].eval()
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), torch.arange(len(tokens))[None])
    return logits[0, :, : engine.vocab_size].float()


def greedy(engine, prompt: list[int], count: int) -> list[int]:
    """The most probable tokens, one full forward pass each."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits_of(engine, tokens)[-1].argmax()))
    return tokens[len(prompt):]


def llama_copy(engine):
    """transformers' `LlamaForCausalLM` with the weights of a one-rank engine, made by the benchmark that compares with it."""
    path = Path(__file__).resolve().parent.parent / "benchmarks" / "bench_generate.py"
    spec = importlib.util.spec_from_file_location("bench_generate", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.transformers_copy(engine)
