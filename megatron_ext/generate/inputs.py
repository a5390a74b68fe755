"""What `generate` is given on the command line: prompts, and the checkpoint that continues them. No torch, so that mistakes are told in a
moment, and once, before ranks are started.
"""
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.cli.options import Options
from megatron_ext.config.families import generates
from megatron_ext.config.schema import Config
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import UserError
from megatron_ext.generate.checks import check_layout, check_prompt
from megatron_ext.train.restored import Source, source


@dataclass(frozen=True)
class Inputs:
    """A checkpoint and its tokenizer."""

    source: Source
    tokenizer: Tokenizer

    def encode(self, prompts: list[str]) -> list[list[int]]:
        """Token ids of each prompt; for an imported model behind what its tokenizer begins a text with. Raises UserError for one that is too long."""
        begin = self.tokenizer.begin() if self.source.imported else []
        encoded = [begin + self.tokenizer.encode(prompt) for prompt in prompts]
        for prompt, tokens in zip(prompts, encoded):
            check_prompt(tokens, "prompt", textwrap.shorten(prompt, 60, placeholder="..."), vocab_size=self.source.vocab_size,
                         max_sequence_length=self.source.config.model.max_sequence_length)
        return encoded


def read(config: Config, options: Options) -> Inputs:
    """Finds the checkpoint and its tokenizer, and checks the layout. Raises UserError."""
    check_layout(config.parallel)
    found = source(config, options.overrides)
    generates(found.config, found.path)
    return Inputs(found, found.tokenizer())


def from_stdin(options: Options) -> bool:
    """Whether prompts come from standard input."""
    return not options.prompts and options.prompt_file is None


def read_prompts(options: Options) -> list[str]:
    """The prompts of --prompt and of the lines of --prompt-file, else of standard input; blank lines are passed over.

    Raises:
        UserError: none, an empty one, a file that cannot be read, text that is not UTF-8.
    """
    for prompt in options.prompts:
        if not prompt:
            raise UserError("--prompt", "", "is empty; give at least one character to continue")
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError:  # bytes of the command line that are no UTF-8 arrive as lone surrogates
            raise UserError("--prompt", ascii(prompt), "is not UTF-8 text") from None
    if options.prompt_file is not None:
        return [*options.prompts, *_lines("--prompt-file", options.prompt_file)]
    return list(options.prompts) or _lines("standard input", None)


def _lines(key: str, file: Path | None) -> list[str]:
    name = "" if file is None else file
    try:
        content = sys.stdin.buffer.read() if file is None else file.read_bytes()
        lines = content.decode("utf-8").split("\n")  # not splitlines: U+2028 and form feeds are text
    except OSError as error:
        raise UserError(key, name, f"cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(key, name, f"is not UTF-8 text (byte {error.start})") from None
    lines = [line.removesuffix("\r") for line in lines if line.strip()]
    if not lines:
        raise UserError(key, name, "holds no prompt; one a line")
    return lines
