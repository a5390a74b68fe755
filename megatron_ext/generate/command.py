"""`generate`: completions of prompts from a checkpoint, in every rank."""
import json

import torch.distributed as dist

from megatron_ext import platform
from megatron_ext.cli.options import Options
from megatron_ext.config.schema import Config
from megatron_ext.generate import inputs
from megatron_ext.generate.decode import Completion, generate
from megatron_ext.train import record as records
from megatron_ext.train.restored import restored_engine


def run(config: Config, options: Options) -> int:
    """Prints a completion of each prompt, on rank 0: text, or with --json one object.

    Raises:
        UserError: no checkpoint, a layout that does not fit, a prompt that is empty or too long, ...
    """
    # torchrun and srun may give standard input to one rank only.
    prompts = None if inputs.from_stdin(options) and not platform.is_first_rank() else inputs.read_prompts(options)
    given = inputs.read(config, options)
    device = platform.install(config.launch.device)
    platform.connect(device, config.launch.timeout)
    box = [prompts]
    dist.broadcast_object_list(box, src=0, device=device.device)
    prompts, settings = box[0], given.source.config.generate
    encoded = given.encode(prompts)
    completions = generate(restored_engine(given.source, device), encoded, settings, tokenizer=given.tokenizer, eod=given.source.ends)
    if dist.get_rank() == 0:
        whose = [prompt for prompt in prompts for _ in range(settings.samples)]
        if options.json:
            print(json.dumps(report(given, whose, completions), ensure_ascii=False))
        else:
            print("\n\n".join(prompt + one.text for prompt, one in zip(whose, completions)))
    platform.disconnect()
    return 0


def report(given: inputs.Inputs, prompts: list[str], completions: list[Completion]) -> dict:
    """What --json prints. `prompts`: of each completion."""
    found, seed = given.source, given.source.config.generate.seed
    return {
        "checkpoint": str(found.path), "step": found.record["step"], "layout": records.layout(found.config), "seed": seed,
        "completions": [
            {
                "prompt": prompt, "completion": one.text, "text": prompt + one.text, "stop": one.stop, "sample": one.sample, "seed": seed,
                "prompt_tokens": one.prompt, "tokens": one.tokens, "logprobs": one.logprobs, "raw_logprobs": one.raw_logprobs,
            }
            for prompt, one in zip(prompts, completions)
        ],
    }
