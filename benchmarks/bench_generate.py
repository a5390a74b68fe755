"""Generation against transformers' `generate` with its cache: the same weights, prompts and threads, in turns in one run.

    python benchmarks/bench_generate.py [--threads 2 1] [--repeats 9] [--batch 32] [--prompt 32] [--new 64] [--vocab 2048] [--output FILE]

The model is a Llama of 4 layers, hidden 256, 8 heads, fp32. Prints one JSON object: tokens/s (medians of the repeats), and `ratio`, the
median over the repeats of transformers' time / ours, greedy and sampled. `modules` is ours with every token through megatron-core's
modules. It fails when the greedy tokens differ.
"""
import argparse
import json
import os
import platform as machine
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def build(vocab: int, length: int):
    """Our engine with fresh weights, and a transformers model that holds the same."""
    from megatron_ext import platform
    from megatron_ext.config.schema import Config, ModelConfig
    from megatron_ext.parallel.layout import Layout
    from megatron_ext.train.engine import Engine

    platform.quiet()
    device = platform.install("cpu")
    platform.connect(device, 600)
    # Wide enough weights that the most probable word is not a matter of rounding.
    model = ModelConfig(num_layers=4, hidden_size=256, num_attention_heads=8, max_sequence_length=length, init_std=0.1)
    engine = Engine(Config(model=model), Layout(), device, vocab_size=vocab, train=False)
    return engine, transformers_copy(engine)


def transformers_copy(engine):
    """A `LlamaForCausalLM` with the weights of a one-rank engine (rotary, RMSNorm, SwiGLU, no biases, untied)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_ext.config import sizes

    ours, model = engine.models[0], engine.config.model
    heads, groups, width = model.num_attention_heads, sizes.query_groups(model), sizes.head_dim(model)
    scaled = model.rope_scaling_factor is not None
    scaling = {"rope_scaling": {  # as in meta-llama/Llama-3.1-8B's config.json
        "rope_type": "llama3", "factor": model.rope_scaling_factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }} if scaled else {}
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=engine.vocab_size, hidden_size=model.hidden_size, intermediate_size=sizes.ffn_size(model),
        num_hidden_layers=model.num_layers, num_attention_heads=heads, num_key_value_heads=groups, head_dim=width,
        max_position_embeddings=model.max_sequence_length, rms_norm_eps=model.norm_eps, rope_theta=model.rotary_base,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=None, **scaling,
    )).eval()
    with torch.no_grad():
        theirs.model.embed_tokens.weight.copy_(ours.embedding.word_embeddings.weight[: engine.vocab_size])
        theirs.lm_head.weight.copy_(ours.output_layer.weight[: engine.vocab_size])
        theirs.model.norm.weight.copy_(ours.decoder.final_layernorm.weight)
        for layer, copy in zip(ours.decoder.layers, theirs.model.layers):
            attention = layer.self_attention
            qkv = attention.linear_qkv.weight.view(groups, heads // groups + 2, width, -1)
            copy.self_attn.q_proj.weight.copy_(qkv[:, :-2].reshape(heads * width, -1))
            copy.self_attn.k_proj.weight.copy_(qkv[:, -2].reshape(groups * width, -1))
            copy.self_attn.v_proj.weight.copy_(qkv[:, -1].reshape(groups * width, -1))
            copy.self_attn.o_proj.weight.copy_(attention.linear_proj.weight)
            gate, up = layer.mlp.linear_fc1.weight.chunk(2)
            copy.mlp.gate_proj.weight.copy_(gate)
            copy.mlp.up_proj.weight.copy_(up)
            copy.mlp.down_proj.weight.copy_(layer.mlp.linear_fc2.weight)
            copy.input_layernorm.weight.copy_(layer.input_layernorm.weight)
            copy.post_attention_layernorm.weight.copy_(layer.pre_mlp_layernorm.weight)
    return theirs


def in_turns(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, one after the other, so that a busy machine slows all alike; the first turn is not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            if turn:
                times[name].append(time.perf_counter() - begin)
    return times


def measure(engine, theirs, prompts: torch.Tensor, options: argparse.Namespace) -> dict:
    from megatron_ext.config.schema import GenerateConfig
    from megatron_ext.generate import generate

    ids, mask = prompts.tolist(), torch.ones_like(prompts)
    found: dict[str, dict] = {}
    for mode, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        settings = GenerateConfig(max_tokens=options.new, temperature=temperature, batch_size=options.batch)

        def ours(modules_only: bool = False, settings: GenerateConfig = settings) -> list[list[int]]:
            return [one.tokens for one in generate(engine, ids, settings, modules_only=modules_only)]

        def their(sampled: bool = mode == "sampled") -> list[list[int]]:
            out = theirs.generate(prompts, attention_mask=mask, max_new_tokens=options.new, do_sample=sampled, top_k=0 if sampled else None,
                                  use_cache=True, pad_token_id=0)
            return out[:, prompts.shape[1]:].tolist()

        if mode == "greedy" and ours() != their():
            raise SystemExit("the greedy tokens differ from transformers'")
        times = in_turns({"ours": ours, "transformers": their, "modules": lambda: ours(True)}, options.repeats)
        count = options.batch * options.new
        ratios = [b / a for a, b in zip(times["ours"], times["transformers"])]
        found[mode] = {name: round(count / statistics.median(values)) for name, values in times.items()} | {
            "ratio": round(statistics.median(ratios), 3), "ratios": [round(ratio, 3) for ratio in sorted(ratios)],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    for name, default in (("repeats", 9), ("batch", 32), ("prompt", 32), ("new", 64), ("vocab", 2048)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    engine, theirs = build(options.vocab, options.prompt + options.new)
    prompts = torch.randint(0, options.vocab, (options.batch, options.prompt), generator=torch.Generator().manual_seed(1))
    result = {"unit": "tokens/s", "batch": options.batch, "prompt": options.prompt, "new": options.new, "vocab": options.vocab,
              "cores": os.cpu_count(), "torch": torch.__version__, "python": machine.python_version(), "threads": {}}
    for threads in options.threads:
        torch.set_num_threads(threads)
        result["threads"][threads] = measure(engine, theirs, prompts, options)
    text = json.dumps(result, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
