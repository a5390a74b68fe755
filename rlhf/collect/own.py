"""Replies from a checkpoint of our own, on its ranks: `megatron_ext/generate` and the chat template of `rlhf/data`. Collective.

The first rank reads items and keeps the cache; all ranks decode what it tells them. What is drawn depends on the seed and the request alone
(its hash is the number of the sample), so that neither the layout nor where a run was interrupted changes a reply.
"""
from collections import Counter
from collections.abc import Iterator
from itertools import islice

import torch.distributed as dist

from megatron_ext import platform
from megatron_ext.config.schema import GenerateConfig
from megatron_ext.data.prepared import file_sha256
from megatron_ext.errors import UserError
from megatron_ext.generate import generate
from megatron_ext.generate.inputs import Inputs
from megatron_ext.train.restored import restored_engine
from rlhf.collect.budget import Budget, Usage
from rlhf.collect.cache import Cache, Reply, Request
from rlhf.data.template import Template

BATCHES = 4  # of generate.batch_size, between two writes of the cache


def identity(given: Inputs) -> str:
    """What stands for the model in hashes and records: the run's name and the hash of the checkpoint's manifest, which holds those of all files."""
    return f"{given.source.run.name}/{given.source.path.name}@{file_sha256(given.source.path / 'manifest.json')[:12]}"


class Own:
    """A checkpoint's model on this job's ranks.

    Args:
        given: see `generate/inputs.py`. Every rank makes one.
    Raises:
        UserError: no template, ranks that do not divide.
    """

    def __init__(self, given: Inputs):
        self.config = given.source.config
        self._device = platform.install(self.config.launch.device)
        platform.connect(self._device, self.config.launch.timeout)
        self.first = dist.get_rank() == 0
        self._tokenizer, self._template = given.tokenizer, Template.of(given.tokenizer, self.config.chat.template)
        self._ends = tuple(dict.fromkeys((self._template.end, *(given.source.ends or (given.tokenizer.eod,)))))
        self._engine = restored_engine(given.source, self._device)

    def run(self, requests: Iterator[Request], cache: Cache, budget: Budget) -> Counter:
        """On the first rank: replies to all that the cache has not. The others are in `serve` meanwhile. Returns why items were left out."""
        left_out: Counter[str] = Counter()
        longest = self.config.model.max_sequence_length
        wanted = self._wanted(requests, cache, left_out, longest)
        size = self.config.generate.batch_size * BATCHES
        while chunk := list(islice(wanted, size)):
            allowed, planned = [], Usage(0, 0, 0)
            for request, tokens in chunk:
                most = Usage(planned.prompt + len(tokens), planned.reply + int(request.sampling["max_tokens"]), planned.requests + 1)
                if (key := budget.over(most)) is not None:
                    budget.reached = key
                    break
                planned = most
                allowed.append((request, tokens))
            by_sampling: dict[tuple, list] = {}
            for request, tokens in allowed:
                how = request.sampling
                settings = (how["max_tokens"], how["temperature"], how["top_p"], tuple(how.get("stop", ())))
                by_sampling.setdefault(settings, []).append((request, tokens))
            for settings, group in by_sampling.items():
                drawn = self._draw(settings, [(tokens, int(request.key[:15], 16)) for request, tokens in group])
                for (request, tokens), one in zip(group, drawn):
                    stop = "stop" if one.stop in ("eod", "stop_string") else "length"
                    cache.put(request, Reply(one.text, stop, Usage(len(tokens), len(one.tokens))))
            if budget.reached:
                break
        return left_out

    def _wanted(self, requests: Iterator[Request], cache: Cache, left_out: Counter, longest: int) -> Iterator[tuple[Request, list[int]]]:
        seen = set()
        for request in requests:
            if request.key in cache or request.key in seen:
                continue
            seen.add(request.key)
            try:
                tokens = self._template.prompt(request.messages)
            except UserError:
                left_out["refused_by_template"] += 1
                continue
            if len(tokens) >= longest:
                left_out["prompt_too_long"] += 1
                continue
            yield request, tokens

    def _draw(self, settings: tuple, rows: list[tuple[list[int], int]]):
        box = [(settings, rows)]
        dist.broadcast_object_list(box, src=0, device=self._device.device)
        return self._decode(*box[0])

    def _decode(self, settings: tuple, rows: list[tuple[list[int], int]]):
        max_tokens, temperature, top_p, stop = settings
        own = self.config.generate
        wanted = GenerateConfig(max_tokens=int(max_tokens), temperature=float(temperature), top_p=float(top_p), top_k=own.top_k, stop=tuple(stop),
                                seed=own.seed, batch_size=own.batch_size)
        prompts, numbers = [tokens for tokens, _ in rows], [number for _, number in rows]
        return generate(self._engine, prompts, wanted, tokenizer=self._tokenizer, eod=self._ends, sample_ids=numbers)

    def serve(self) -> None:
        """On the other ranks: decodes with the first one until it is done."""
        while True:
            box = [None]
            dist.broadcast_object_list(box, src=0, device=self._device.device)
            if box[0] is None:
                return
            self._decode(*box[0])

    def end(self) -> None:
        """On the first rank, when all is written."""
        dist.broadcast_object_list([None], src=0, device=self._device.device)
