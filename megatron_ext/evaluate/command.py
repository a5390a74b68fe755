"""`evaluate`: how well a checkpoint predicts a split of its data, or of other data."""
import json
import math

import torch.distributed as dist

from megatron_ext import platform
from megatron_ext.cli.options import Options
from megatron_ext.config import validate
from megatron_ext.config.schema import Config
from megatron_ext.data.build import dataset_tokenizer, ensure_prepared
from megatron_ext.data.objective import pretraining_samples
from megatron_ext.errors import UserError
from megatron_ext.evaluate.split import SplitLoss, evaluate_split
from megatron_ext.train import record as records
from megatron_ext.train.restored import Source, restored_engine, source


def run(config: Config, options: Options) -> int:
    """Prints loss, perplexity and bits per byte, on rank 0: text, or with --json one object.

    Raises:
        UserError: no checkpoint, a layout that does not fit, data of another tokenizer, a split without documents, ...
    """
    if config.evaluate.harness:
        from megatron_ext.evaluate import harness_command

        return harness_command.run(config, options)
    found = source(config, options.overrides)
    config, settings = found.config, found.config.evaluate
    for rule in (validate.sequence_parallel_fits, validate.sequence_fits_positions):
        for error in rule(config):
            raise error
    device = platform.install(config.launch.device)
    if platform.is_first_rank():
        ensure_prepared(config.data)
    platform.connect(device, config.launch.timeout)
    dist.barrier()
    samples = pretraining_samples(config, (settings.split,))[settings.split]
    _check_tokenizer(found)
    count = min(settings.samples or samples.samples_per_epoch, samples.samples_per_epoch)
    result = evaluate_split(restored_engine(found, device), samples, count=count, micro_batch=settings.batch_size)
    if dist.get_rank() == 0:
        fields = report(found, result, count, samples.bytes_per_token)
        print(json.dumps(fields) if options.json else _text(fields))
    platform.disconnect()
    return 0


def report(found: Source, result: SplitLoss, sequences: int, bytes_per_token: float | None) -> dict:
    """What is printed. `bits_per_byte` counts the bytes of the text (UTF-8); None where they are not known."""
    fields = {
        "checkpoint": str(found.path), "step": found.record["step"], "split": found.config.evaluate.split,
        "loss": result.loss, "perplexity": result.perplexity, "bits_per_byte": result.bits_per_byte(bytes_per_token),
        "tokens": result.tokens, "sequences": sequences, "sequence_length": found.config.data.sequence_length,
        "bytes_per_token": bytes_per_token, "layout": records.layout(found.config),
    }
    # JSON has no infinity: a diverged model's perplexity is told as null beside its loss.
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in fields.items()}


def _check_tokenizer(found: Source) -> None:
    path, tokenizer = dataset_tokenizer(found.config.data)
    if tokenizer.sha256 != found.tokenizer_sha256:
        data = found.config.data
        reason = f"was made with another tokenizer ({path}) than the model's; prepare it with data.tokenizer= the run's tokenizer.json"
        raise UserError("data.path", data.path or ",".join(data.paths) or "null", reason)


def _text(fields: dict) -> str:
    def shown(value: float | None, form: str) -> str:
        return "unknown" if value is None else format(value, form)

    return (f"{fields['checkpoint']} on {fields['split']}: loss {shown(fields['loss'], '.4f')} nats a token, perplexity "
            f"{shown(fields['perplexity'], '.2f')}, {shown(fields['bits_per_byte'], '.4f')} bits per byte "
            f"({fields['tokens']:,} tokens in {fields['sequences']:,} sequences)")
