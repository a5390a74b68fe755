"""`generate`: completions of prompts from a checkpoint, on the command line."""
import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from megatron_ext import platform
from megatron_ext.cli.options import Options
from megatron_ext.config.schema import Config
from megatron_ext.errors import UserError
from megatron_ext.generate.decode import Completion, check_layout, check_prompt, generate
from megatron_ext.train import record as records
from megatron_ext.train.restored import restored_engine, source


def run(config: Config, options: Options) -> int:
    """Prints a completion of each prompt, on rank 0: text, or with --json one object.

    Raises:
        UserError: no checkpoint, a layout that does not fit, a prompt that is empty or too long, ...
    """
    check_layout(config.parallel)
    prompts = None if _from_stdin(options) and not platform.is_first_rank() else read_prompts(options)
    found = source(config, options.overrides)
    tokenizer = found.tokenizer()
    device = platform.install(config.launch.device)
    platform.connect(device, config.launch.timeout)
    box = [prompts]
    dist.broadcast_object_list(box, src=0, device=device.device)  # torchrun and srun may give standard input to one rank only
    prompts, settings = box[0], found.config.generate
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    for prompt, tokens in zip(prompts, encoded):
        check_prompt(tokens, "prompt", textwrap.shorten(prompt, 60, placeholder="..."),
                     max_sequence_length=found.config.model.max_sequence_length, vocab_size=found.vocab_size)
    completions = generate(restored_engine(found, device), encoded, settings, tokenizer=tokenizer)
    if dist.get_rank() == 0:
        whose = [(prompt, completion) for prompt, group in zip(prompts, _grouped(completions, settings.samples)) for completion in group]
        if options.json:
            about = {"checkpoint": str(found.path), "step": found.record["step"], "layout": records.layout(found.config), "seed": settings.seed}
            print(json.dumps(about | {"completions": [_fields(prompt, one, settings.seed) for prompt, one in whose]}, ensure_ascii=False))
        else:
            print("\n\n".join(prompt + one.text for prompt, one in whose))
    platform.disconnect()
    return 0


def read_prompts(options: Options) -> list[str]:
    """The prompts of --prompt, of the lines of --prompt-file, or else of standard input; blank lines are passed over.

    Raises:
        UserError: none, an empty one, a file that cannot be read, text that is not UTF-8.
    """
    if options.prompts:
        if "" in options.prompts:
            raise UserError("--prompt", "", "is empty; give at least one character to continue")
        for prompt in options.prompts:
            _check_text("--prompt", prompt)
        if options.prompt_file is None:
            return list(options.prompts)
    key, name = ("--prompt-file", options.prompt_file) if options.prompt_file else ("standard input", "")
    try:
        content = Path(options.prompt_file).read_bytes() if options.prompt_file else sys.stdin.buffer.read()
        lines = content.decode("utf-8").splitlines()
    except OSError as error:
        raise UserError(key, name, f"cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(key, name, f"is not UTF-8 text (byte {error.start})") from None
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise UserError(key, name, "holds no prompt; one a line")
    return [*options.prompts, *lines]


def _check_text(key: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # bytes of the command line that are no UTF-8 arrive as lone surrogates
        raise UserError(key, ascii(text), "is not UTF-8 text") from None


def _from_stdin(options: Options) -> bool:
    return not options.prompts and options.prompt_file is None


def _grouped(completions: Sequence[Completion], size: int) -> list[Sequence[Completion]]:
    return [completions[start : start + size] for start in range(0, len(completions), size)]


def _fields(prompt: str, one: Completion, seed: int) -> dict:
    return {
        "prompt": prompt, "completion": one.text, "text": prompt + one.text, "stop": one.stop, "sample": one.sample, "seed": seed,
        "prompt_tokens": one.prompt, "tokens": one.tokens, "logprobs": one.logprobs, "raw_logprobs": one.raw_logprobs,
    }
