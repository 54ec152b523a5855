"""What `sglang serve` says of its encoders: why a prompt could not be encoded, and its health.

Stock answers a failed image with a bare 500 and leaves the reason in the log; a video's reason it
keeps with the video. Here an encoder's failure becomes a 503 with its message, and a prompt that it
refuses a 400. And a server whose encoders are down is not healthy.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import fastapi
from sglang.multimodal_gen.runtime.srt_encoder import option
from sglang.multimodal_gen.runtime.srt_encoder.placement import Servers
from sglang.multimodal_gen.runtime.srt_encoder.servers import API_KEY
from sglang.srt.encode_only import wire
from sglang.srt.encode_only.client import AsyncEncoderClient, EncoderUnavailable
from sglang.srt.encode_only.request import RequestError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

if TYPE_CHECKING:
    from sglang.multimodal_gen.runtime.server_args import ServerArgs

# How `encoder.py` begins its messages. The worker's error arrives as text within another error.
_ENCODER_ERROR = re.compile(
    r"text_encoder(_\d+)? on srt(?P<refused> refused the prompt)?: .*", re.DOTALL
)

HEALTH_ROUTES = ("/health", "/health_generate")
HEALTH_TIMEOUT = 3.0
"""Seconds that an encoder has to say that it is there."""


def extend(app: fastapi.FastAPI, server_args: ServerArgs, *args: object, **kwargs: object) -> None:
    """AFTER `http_server.create_app`."""
    app.add_exception_handler(RuntimeError, _answer)
    placements = option.placements_in(server_args.pipeline_config)
    servers = {c: p.urls for c, p in placements.named.items() if isinstance(p, Servers)}
    if servers:
        app.add_middleware(EncoderHealth, servers=servers)


async def _answer(request: fastapi.Request, error: Exception) -> fastapi.Response:
    said = _ENCODER_ERROR.search(str(error))
    if said is None:
        raise error
    status = 400 if said["refused"] else 503
    body = wire.write_error(RequestError(said[0], status=status))
    return fastapi.Response(body, status, media_type=wire.JSON)


class EncoderHealth:
    """Answers the health routes with 503 while no server of some component answers.

    Args:
        app: what answers everything else.
        servers: the URLs of the servers of each component.
    """

    def __init__(self, app: ASGIApp, servers: Mapping[str, Sequence[str]]):
        self.app = app
        key = os.environ.get(API_KEY)
        self._clients = {
            component: [
                AsyncEncoderClient(url, api_key=key, timeout=HEALTH_TIMEOUT) for url in urls
            ]
            for component, urls in servers.items()
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in HEALTH_ROUTES:
            await self.app(scope, receive, send)
            return
        said = ""

        async def send_unless_unhealthy(message: Message) -> None:
            nonlocal said
            if message["type"] == "http.response.start" and message["status"] == 200:
                failures = await asyncio.gather(*map(self._failure, self._clients))
                said = " ".join(filter(None, failures))
            if not said:
                await send(message)

        await self.app(scope, receive, send_unless_unhealthy)
        if said:
            body = {"status": "unhealthy", "error": said}
            await fastapi.responses.JSONResponse(body, 503)(scope, receive, send)

    async def _failure(self, component: str) -> str | None:
        """Why nobody encodes for `component`, None if somebody does."""

        async def failure(client: AsyncEncoderClient) -> str | None:
            try:
                await client.info()
            except (EncoderUnavailable, RequestError) as error:
                return str(error)
            return None

        said = await asyncio.gather(*map(failure, self._clients[component]))
        return None if None in said else f"{component}: {' '.join(filter(None, said))}"
