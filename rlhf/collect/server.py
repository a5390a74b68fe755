"""`collect serve`: the page on which people order answers, over HTTP (FastAPI, uvicorn).

    GET  /             the page: one file, no other is loaded
    GET  /api/state    what this annotator sees now
    POST /api/decide   {task, order}           POST /api/skip   {task, reason}           POST /api/undo   {}

A call is an annotator's by its bearer token; there are no cookies, so that no other site can act for anybody. Answers are written by models
and people nobody knows: the page shows them as text only, and its Content-Security-Policy allows the page's own script and style by their
hashes, connections to this server, and nothing else. The server is one process with one event loop: calls come to the desk one after the
other.
"""
import base64
import hashlib
import json
import re
import socket
from collections.abc import Mapping
from pathlib import Path

from megatron_ext.config.schema import CollectConfig, Config
from megatron_ext.errors import UserError
from rlhf.collect import ballots, links, tasks
from rlhf.collect.desk import Desk, Refused
from rlhf.collect.log import AppendLog
from rlhf.collect.patience import MOST, PATIENCE, protocol
from rlhf.collect.rights import Gate

PAGE = Path(__file__).with_name("page.html")
LARGEST = 1 << 16  # bytes of a call
SAID = {"removed": "{count:,} tasks are not shown: their sources were removed", "licence": "{count:,} tasks are not shown: a licence forbids it",
        "task_is_gone": "{count:,} tasks that people decided are not in tasks.jsonl any more; their decisions stay in the log",
        "task_changed": "{count:,} tasks have changed since people decided them; they are asked again"}
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(config: Config) -> int:
    """Runs until it is interrupted (Ctrl-C, SIGTERM). Prints the address, and links that were made just now.

    Raises:
        UserError: FastAPI or uvicorn is missing, the port is taken, another server has the directory, no tasks.
    """
    settings, folder = config.collect, Path(config.input)
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError("collect", "serve", f"needs {error.name}: pip install 'megatron-ext[collect]'") from None
    gate = Gate(config)
    found = {name: task for name, task in tasks.load(folder / "tasks.jsonl").items() if gate.admits(task.source)}
    if not found:
        raise UserError("input", config.input, f"holds no task that may be shown: {', '.join(f'{reason} {count}' for reason, count in gate.left_out.items())}")
    listening = _listen(settings)
    port = listening.getsockname()[1]
    with listening, AppendLog(folder / ballots.FILE, key="input") as log:
        desk = Desk(found, log, settings)
        allowed, made = links.ready(folder, settings.annotators, settings.renew)
        server = over_http(application(desk, allowed, hosts=(settings.host,)))  # before its address is told: then it answers at once
        address = f"http://{_in_url(settings.host)}:{port}/"
        print(f"{len(found):,} tasks; {desk.progress()['total']['done']:,} are ordered. The page: {address}", flush=True)
        for reason, count in (gate.left_out + desk.misfits).items():
            print(f"note: {SAID[reason].format(count=count)}", flush=True)
        if settings.host not in LOOPBACK:
            print(f"note: {address} speaks plain HTTP: put it behind TLS, or listen at 127.0.0.1 and reach it by ssh -L {port}:127.0.0.1:{port}",
                  flush=True)
        for name, token in made.items():
            print(f"{name:<20}{address}#token={token}", flush=True)
        for name in settings.annotators:
            if name not in made:
                print(f"{name:<20}has a link already (another: collect.renew=[{name}])", flush=True)
        server.run(sockets=[listening])
    return 0


def over_http(app, *, patience: float = PATIENCE, most: int = MOST):
    """A uvicorn.Server of the application: HTTP/1.1 alone, no header of a proxy believed, nothing logged but what is broken (`patience.py`)."""
    import uvicorn

    return uvicorn.Server(uvicorn.Config(app, http=protocol(patience, most), ws="none", lifespan="off", proxy_headers=False, log_level="error", access_log=False,
                                         server_header=False, timeout_graceful_shutdown=5))


def application(desk: Desk, allowed: Mapping[str, str], *, hosts: tuple[str, ...] = ()):
    """The FastAPI application.

    Args:
        allowed: {hash of a token: annotator}.
        hosts: names by which it may be called, beside this machine's own; none is asked for with 0.0.0.0 and ::.
    """
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, Response

    page = PAGE.read_bytes()
    headers = {
        "Content-Security-Policy": policy(page.decode("utf-8")), "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store", "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Resource-Policy": "same-origin", "X-Frame-Options": "DENY",
        "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    }
    known = None if {"0.0.0.0", "::"} & {*hosts} else {*LOOPBACK, *hosts}
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)  # their pages load scripts from elsewhere

    @app.middleware("http")
    async def guard(request: Request, call_next):
        if known is not None and _host(request.headers.get("host", "")) not in known:  # a name of somebody else's that leads here
            response = JSONResponse({"error": "this server is not called that"}, 421)
        else:
            response = await call_next(request)
        response.headers.update(headers)
        return response

    def name_of(request: Request) -> str:
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        name = links.who(token.strip(), allowed) if kind.lower() == "bearer" else None
        if name is None:
            raise Refused(401, "this link is not known; ask for a new one")
        return name

    def answered(request: Request, act=None) -> Response:
        failed = "it could not be saved"
        try:
            name = name_of(request)
            if act is not None:
                act(name)
                failed = "this was saved, but what comes next could not be opened"
            return JSONResponse(desk.state(name))
        except Refused as error:
            return JSONResponse({"error": str(error)}, error.code)
        except OSError as error:  # the disk is full, or gone; what was saved and is sent again is taken once
            return JSONResponse({"error": f"{failed} ({error.strerror}); try again"}, 507)

    async def called(request: Request, act) -> Response:
        try:
            name_of(request)
            value = await _body(request)
        except Refused as error:
            return JSONResponse({"error": str(error)}, error.code)
        return answered(request, lambda name: act(name, value))

    @app.get("/")
    async def show():
        return Response(page, media_type="text/html; charset=utf-8")

    @app.get("/api/state")
    async def state(request: Request):
        return answered(request)

    @app.post("/api/decide")
    async def decide(request: Request):
        return await called(request, lambda name, value: desk.decide(name, value.get("task"), value.get("order")))

    @app.post("/api/skip")
    async def skip(request: Request):
        return await called(request, lambda name, value: desk.skip(name, value.get("task"), value.get("reason")))

    @app.post("/api/undo")
    async def undo(request: Request):
        return await called(request, lambda name, value: desk.undo(name))

    return app


def policy(page: str) -> str:
    """The Content-Security-Policy of a page: its own inline script and style, by their hashes, and calls to where it came from."""
    def hashes(tag: str) -> str:
        inside = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(one.encode()).digest()).decode()}'" for one in inside)

    return (f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; img-src data:; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'")


async def _body(request) -> dict:
    """Raises Refused: no JSON object, or too large."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "a call is application/json")
    from starlette.requests import ClientDisconnect

    content = bytearray()
    try:
        async for chunk in request.stream():
            content += chunk
            if len(content) > LARGEST:
                raise Refused(413, "the call is too large")
    except ClientDisconnect:
        raise Refused(400, "the call did not come whole") from None
    try:
        value = json.loads(bytes(content))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise Refused(422, "a call is a JSON object")
    return value


def _listen(settings: CollectConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=64)
    except OSError as error:
        key, value = ("collect.host", settings.host) if isinstance(error, socket.gaierror) else ("collect.port", settings.port)
        raise UserError(key, value, f"cannot be listened at: {error.strerror or error}; another port: collect.port=0 takes a free one") from None


def _host(header: str) -> str:
    """The name in a Host header, without its port."""
    match = re.fullmatch(r"\[([^\]]+)\](?::\d+)?|([^:\[\]]+)(?::\d+)?", header.strip().lower())
    return (match[1] or match[2]) if match else ""


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
