"""The HTTP side of encode-only mode: `/v1/encode` on srt's FastAPI application.

Bodies are read and written in `wire.py`, requests are served in `service.py`; here are the limits
of a request, the caller who leaves, and the one place where an error becomes a status.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncIterable, AsyncIterator, Coroutine
from ipaddress import ip_address
from typing import Any

import msgspec
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response
from sglang.srt.encode_only import line_keys, wire
from sglang.srt.encode_only.line import Address
from sglang.srt.encode_only.request import RequestError
from sglang.srt.encode_only.service import EncodeService, is_encoder, service_of
from sglang.srt.entrypoints.http_server import get_global_state
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)
router = APIRouter()

_REQUEST_BODY = {
    "required": True,
    "content": {wire.JSON: {"schema": msgspec.json.schema(wire.EncodeRequest)}},
}
_AT_ONCE = 1 << 20
"""Bytes of an answer that are written in less time than a thread takes to begin."""
_REFUSED = {
    "generates no text": (
        "/generate",
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/responses",
        "/v1/messages",
        "/api/generate",
        "/api/chat",
        "/invocations",
        "/vertex_generate",
    ),
    # srt would make up numbers of its vectors.
    "judges no texts": (
        "/classify",
        "/v1/classify",
        "/v1/rerank",
        "/v1/score",
        "/v1/decisions",
        "/v1/systemone",
    ),
    # These would end the scheduler.
    "counts no experts": (
        "/start_expert_distribution_record",
        "/stop_expert_distribution_record",
        "/dump_expert_distribution_record",
    ),
}
"""What an encoder does not do, and the routes of srt's that are for it."""


@functools.cache
def install(app: FastAPI) -> None:
    """Puts our routes on srt's application; a second call does nothing."""
    routes = app.router.routes
    count = len(routes)
    app.include_router(router)
    own = routes[count:]
    del routes[count:]
    # In front of srt's own, which are compared with a path one after another; and a generating
    # stream's error would follow a status of 200. FastAPI's route for POST documents what the first
    # one serves, in whose place it would look for parameters.
    for route in routes:
        if isinstance(route, Route) and route.path == wire.ROUTED:
            route.app = _Routed(route.app)
    routes[:0] = [
        Route(wire.ROUTE, encode, methods=["POST"]),
        *own,
        *(
            Route(path, _NotDone(what), methods=["GET", "POST", "PUT"])
            for what, paths in _REFUSED.items()
            for path in paths
        ),
    ]


def shape_refusals(_: Any, app: FastAPI, **keys: str | None) -> None:
    """AFTER `add_api_key_middleware`: what it answers on our route has the shape of our errors."""
    app.add_middleware(_Refusals)


@router.get(wire.ROUTE, response_class=Response)
async def info(request: Request) -> Response:
    """What this encoder is: an EncoderInfo."""
    content = msgspec.json.encode(_service().info)
    return Response(content, media_type=wire.JSON, headers=_line(request))


@router.post(wire.ROUTE, response_class=Response, openapi_extra={"requestBody": _REQUEST_BODY})
async def encode(request: Request) -> Response:
    """Hidden states of texts or token ids, as tensors."""
    return await _respond(request.stream(), request)


async def _respond(content: AsyncIterable[bytes], request: Request) -> Response:
    try:
        return await _unless_gone(request, _answer(await _body(content), request))
    except RequestError as error:
        return _refusal(error)
    except ClientDisconnect:
        return Response(status_code=499)
    except Exception:
        logger.exception("An encode request failed.")
        return _refusal(RequestError("Internal error; the server's log has it.", status=500))


class _Routed:
    """ASGI application around srt's for embeddings: takes out of it what a router has passed on."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            body = await request.body()
        except ClientDisconnect:
            return
        carried = wire.read_routed(body)
        if carried is None:
            await self.app(scope, _replayed(body, receive), send)
            return
        if carried.strip(b"{} \t\r\n"):
            response = await _respond(_whole(carried), request)
        else:
            response = await info(request)
        response.headers[wire.OURS] = "1"
        await response(scope, receive, send)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """`receive` of a request whose body has been read."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


async def _whole(content: bytes) -> AsyncIterator[bytes]:
    yield content


@router.api_route(
    wire.ROUTE,
    methods=["PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"],
    response_class=Response,
    include_in_schema=False,
)
async def other_method(request: Request) -> Response:
    refusal = _refusal(
        RequestError(f"{request.method} is not taken here; use POST or GET.", status=405)
    )
    refusal.headers["Allow"] = "GET, POST"
    return refusal


class _NotDone:
    """ASGI application in place of a route for something that an encoder does not do."""

    def __init__(self, what: str):
        self.what = what

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = RequestError(is_encoder(_service().info.model, self.what))
        await _refusal(error)(scope, receive, send)


async def _answer(body: bytearray, request: Request) -> Response:
    service = _service()
    service.check_ready()
    asked = wire.read_request(body)
    asked.check_count()
    inputs, truncated = await service.prepare(asked)
    info = service.info
    asked.check_answer(inputs, info)
    offer = asked.memory
    if offer and asked.encoding_format == "safetensors" and _is_here(request):
        written = await service.run_into(offer, inputs, truncated, request)
        if written is not None:
            headers = {wire.IN_MEMORY: str(written), **_line(request)}
            return Response(b"", media_type=wire.SAFETENSORS, headers=headers)
    outputs = await service.run(inputs, truncated, request)
    write = functools.partial(wire.write_answer, outputs, info, asked.encoding_format)
    large = wire.answer_bytes(inputs, info, asked.encoding_format) > _AT_ONCE
    # Meanwhile others are answered.
    content, media_type = await asyncio.to_thread(write) if large else write()
    return Response(content, media_type=media_type)


def _is_here(request: Request) -> bool:
    """Whether the caller is on this host, as far as its address tells."""
    if request.client is None:
        return False
    with contextlib.suppress(ValueError):
        address = ip_address(request.client.host)
        # A server on `::` sees IPv4 callers so.
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback
    return False


def _line(request: Request) -> dict[str, str]:
    """The header that tells of the scheduler's line, to a caller who can have use of it."""
    if not _is_here(request):
        return {}
    service = _service()
    if service.watched or service.ends:
        return {}
    key = line_keys.tell(service.info, service.updates)
    if key is None:
        return {}
    return {wire.LINE: Address(request.scope["server"][1], key).header()}


def _service() -> EncodeService:
    return service_of(get_global_state().tokenizer_manager)


async def _body(content: AsyncIterable[bytes]) -> bytearray:
    """The body, as far as it is within the limit.

    What is over it is read and dropped: a caller who is still sending would see a broken
    connection in place of the answer.
    """
    body, size = bytearray(), 0
    async for chunk in content:
        size += len(chunk)
        if size <= wire.MAX_BODY_BYTES:
            body += chunk
    if size > wire.MAX_BODY_BYTES:
        raise RequestError(
            f"The body has {size} bytes, but at most {wire.MAX_BODY_BYTES} are taken; "
            "send several requests.",
            status=413,
        )
    return body


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """`work`'s answer; cancels it, and raises ClientDisconnect, once its caller has gone."""
    answer = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        return answer.result()
    finally:
        answer.cancel()
        gone.cancel()
        await asyncio.gather(answer, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _refusal(error: RequestError) -> Response:
    return Response(wire.write_error(error), error.status, media_type=wire.JSON)


class _Refusals:
    """ASGI middleware that puts our error body in place of srt's for a wrong or missing key."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != wire.ROUTE:
            await self.app(scope, receive, send)
            return
        refused = False

        async def reshape(message: Message) -> None:
            nonlocal refused
            if message["type"] == "http.response.start" and message["status"] in (401, 403):
                refused = True
                error = RequestError(
                    "The server asks for its API key; send `Authorization: Bearer KEY`.",
                    status=message["status"],
                )
                await _refusal(error)(scope, receive, send)
            elif not refused:
                await send(message)

        await self.app(scope, receive, reshape)
