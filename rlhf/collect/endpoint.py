"""Replies from an OpenAI-compatible endpoint (`POST BASE/chat/completions`): several at once, with retries, within a budget.

The key comes from the environment variable that `collect.key_env` names. It goes into one header and nowhere else: not into messages,
caches, manifests or logs; redirects are not followed, so that it reaches no other host. What an endpoint says of an error is shown without
it, in 200 characters.

    408, 409, 425, 429, 5xx, no connection, no reply in time     asked again: after Retry-After, or 0.5 s, 1 s, 2 s, ... with jitter, up to 60 s
    400, 413, 422                                                this item is left out and counted (too long, refused by a filter)
    401, 403, 404, other                                         the run ends: every request would meet it
    10 items in a row without a reply that is one                the run ends: the endpoint is down, or is none
"""
import asyncio
import email.utils
import hashlib
import math
import os
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from json import JSONDecodeError, loads
from urllib.parse import urlsplit

from megatron_ext.config.schema import CollectConfig
from megatron_ext.errors import RunFailed, UserError
from megatron_ext.redact import MARK, redact_text
from rlhf.collect.budget import Budget, Usage, most
from rlhf.collect.cache import Cache, Reply, Request

AGAIN = {408, 409, 425, 429, *range(500, 600)}
ITEM = {400, 413, 422}
IN_A_ROW = 10  # items without a reply after which the endpoint counts as down
LONGEST_WAIT = 60.0  # seconds between two tries, where the endpoint does not say
LONGEST_TOLD_WAIT = 600.0
LARGEST = 8 << 20  # bytes of a reply
MOST_TOKENS = 1 << 40  # that a reply can say it used


class _Left(Exception):
    """An item that is left out; its text is the reason."""


class Endpoint:
    """Args: model: as the endpoint calls it. Raises UserError: no httpx, no key, a URL that is none."""

    def __init__(self, settings: CollectConfig):
        try:
            import httpx
        except ImportError:
            raise UserError("collect.endpoint", settings.endpoint, "needs httpx: pip install 'megatron-ext[collect]'") from None
        self._httpx, self._settings = httpx, settings
        parts = urlsplit(settings.endpoint)
        self._local = parts.hostname in ("127.0.0.1", "localhost", "::1")
        self._key = os.environ.get(settings.key_env, "").strip() if settings.key_env else ""
        if settings.key_env and not self._key and not self._local:
            raise UserError("collect.key_env", settings.key_env, "is not set in the environment: export the endpoint's key there, or collect.key_env= for an "
                                                                 "endpoint without one")
        if not self._key.isascii() or any(letter.isspace() for letter in self._key):
            raise UserError("collect.key_env", settings.key_env, "does not hold a key: letters outside ASCII, or spaces")
        self._url = settings.endpoint.rstrip("/") + "/chat/completions"
        plain = parts.scheme == "http" and not self._local
        self.note = f"{settings.endpoint} is not encrypted: the key and all texts can be read on the way" if plain else None

    def run(self, requests: Iterator[Request], cache: Cache, budget: Budget) -> Counter:
        """Asks for all that the cache has not. Returns why items were left out, and how often.

        Raises:
            UserError: a wrong key, model or address. RunFailed: the endpoint is down. `budget.reached` says that it ended early.
        """
        return asyncio.run(self._run(requests, cache, budget))

    async def _run(self, requests: Iterator[Request], cache: Cache, budget: Budget) -> Counter:
        left_out: Counter[str] = Counter()
        under_way: set[str] = set()
        self._failed_in_a_row = 0
        freed = asyncio.Condition()

        async def work(client) -> None:
            for request in requests:  # a plain iterator that all workers share: next() runs without an await in it
                if request.key in cache or request.key in under_way or budget.reached:
                    continue
                usage = most(request.messages, int(request.sampling["max_tokens"]))
                async with freed:
                    while budget.over(usage) and not budget.over(usage, alone=True):  # others hold what it needs
                        await freed.wait()
                    if (key := budget.over(usage)) is not None:
                        budget.reached = key
                        continue
                    budget.set_aside(usage)
                under_way.add(request.key)
                try:
                    cache.put(request, await self._ask(client, request, usage, cache, budget))
                    self._failed_in_a_row = 0
                except _Left as error:
                    left_out[str(error)] += 1
                    if self._failed_in_a_row >= IN_A_ROW:
                        raise RunFailed(f"{self._settings.endpoint}: {IN_A_ROW} requests in a row had no reply ({error}); what was answered is kept, run the "
                                        "same command again") from None
                finally:
                    under_way.discard(request.key)
                    budget.give_back(usage)
                    async with freed:
                        freed.notify_all()

        limits = self._httpx.Limits(max_connections=self._settings.concurrency)
        timeout = self._httpx.Timeout(self._settings.timeout, connect=min(30.0, self._settings.timeout / 2), pool=None)
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        async with self._httpx.AsyncClient(limits=limits, timeout=timeout, headers=headers, follow_redirects=False) as client:
            workers = [asyncio.create_task(work(client)) for _ in range(self._settings.concurrency)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        return left_out

    async def _ask(self, client, request: Request, usage: Usage, cache: Cache, budget: Budget) -> Reply:
        settings, reason = self._settings, "no_reply"
        body = {"model": settings.model, "messages": [dict(message) for message in request.messages], "stream": False, **request.sampling}
        for attempt in range(settings.retries + 1):
            wait = None
            try:
                status, headers, content = await self._post(client, body)
            except (self._httpx.ConnectError, self._httpx.ConnectTimeout, self._httpx.PoolTimeout):
                reason = "no_connection"
            except (self._httpx.RequestError, TimeoutError) as error:  # sent, perhaps answered, perhaps paid for
                reason = "no_reply_in_time" if isinstance(error, self._httpx.TimeoutException | TimeoutError) else "connection_lost"
                cache.lose(request, usage)
                if budget.over(Usage(0, 0, 0)):  # this request is still set aside: the limit counts it twice now
                    raise _Left(reason) from None
            else:
                if status == 200:
                    try:
                        return self._reply(content, headers, usage)
                    except _Left:
                        cache.lose(request, usage)
                        self._failed_in_a_row += 1
                        raise
                if status in ITEM:
                    raise _Left(f"refused_{status}")
                if status not in AGAIN:
                    raise self._ends(status, content)
                reason, wait = f"status_{status}", _told(headers.get("retry-after"))
            if attempt < settings.retries:
                await asyncio.sleep(_pause(attempt, request.key) if wait is None else wait)
        self._failed_in_a_row += 1
        raise _Left(reason)

    async def _post(self, client, body: dict) -> tuple[int, object, bytes]:
        """(status, headers, what came as it came, at most a byte more than LARGEST). Raises httpx.RequestError; TimeoutError: it did not end in time."""
        async with asyncio.timeout(self._settings.timeout), client.stream("POST", self._url, json=body) as response:
            content = bytearray()
            async for chunk in response.aiter_raw():  # not decompressed: a small reply may be a large text
                content += chunk
                if len(content) > LARGEST:
                    break
            return response.status_code, response.headers, bytes(content[: LARGEST + 1])

    def _reply(self, content: bytes, headers, usage: Usage) -> Reply:
        """Raises _Left: it is too large, or no completion. What it says of usage is believed as far as it can be."""
        try:
            content = _plain(content, headers.get("content-encoding", ""))
            found = loads(content)
            choice = found["choices"][0]
            text = choice["message"]["content"]
            told = found.get("usage") or {}
            spent = Usage(int(told.get("prompt_tokens", usage.prompt)), int(told.get("completion_tokens", usage.reply)))
            text.encode("utf-8")
            stop = choice.get("finish_reason")
        except (JSONDecodeError, RecursionError, UnicodeError, KeyError, IndexError, TypeError, AttributeError, ValueError, ArithmeticError, zlib.error):
            raise _Left("reply_is_no_chat_completion") from None
        if not (0 <= spent.prompt < MOST_TOKENS and 0 <= spent.reply < MOST_TOKENS):
            raise _Left("reply_is_no_chat_completion")
        return Reply(text, stop[:32] if isinstance(stop, str) else "", spent)

    def _ends(self, status: int, content: bytes) -> UserError:
        said = content[:4096].decode("utf-8", "replace")
        try:
            error = loads(content).get("error")
            said = str(error.get("message") if isinstance(error, dict) else error or said)
        except (ValueError, AttributeError, RecursionError):
            pass
        said = redact_text(said.replace(self._key, MARK) if self._key else said)
        said = " ".join("".join(letter if letter.isprintable() else " " for letter in said).split())[:200]  # a terminal obeys what is not printed
        key, value = {401: ("collect.key_env", self._settings.key_env), 403: ("collect.key_env", self._settings.key_env),
                      404: ("collect.model", self._settings.model)}.get(status, ("collect.endpoint", self._settings.endpoint))
        hint = "; it redirects: name the address it leads to" if 300 <= status < 400 else ""
        return UserError(key, value, f"the endpoint answers {status}: {said}{hint}")


def _plain(content: bytes, encoding: str) -> bytes:
    """A reply's text, where somebody on the way packed it although nobody asked for that. Raises zlib.error; _Left: too large, or packed in another way."""
    if encoding.strip().lower() in ("gzip", "x-gzip", "deflate"):
        content = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32).decompress(content, LARGEST + 1)
    elif encoding.strip().lower() not in ("", "identity"):
        raise _Left("reply_is_no_chat_completion")
    if len(content) > LARGEST:
        raise _Left("reply_too_large")
    return content


def _told(header: str | None) -> float | None:
    """Seconds that Retry-After asks for: a number or a date."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return None if math.isnan(seconds) else min(max(seconds, 0.0), LONGEST_TOLD_WAIT)


def _pause(attempt: int, key: str) -> float:
    """Twice as long each time; a part of it by the request's hash, so that all who failed together do not come back together."""
    part = int.from_bytes(hashlib.sha256(f"{key}{attempt}".encode()).digest()[:4], "big") / 2**32
    return min(0.5 * 2**attempt, LONGEST_WAIT) * (0.5 + part)
