"""Tells a caller of `sglang serve` why a prompt could not be encoded.

Stock answers a failed image with a bare 500 and leaves the reason in the log; a video's reason it
keeps with the video. Here an encoder's failure becomes a 503 with its message.
"""

from __future__ import annotations

import re

import fastapi
from sglang.srt.encode_only import wire
from sglang.srt.encode_only.request import RequestError

# How `encoder.py` begins its messages. The worker's error arrives as text within another error.
_ENCODER_ERROR = re.compile(r"text_encoder(_\d+)? on srt: .*", re.DOTALL)


def add_handler(app: fastapi.FastAPI, *args: object, **kwargs: object) -> None:
    """AFTER `http_server.create_app`."""
    app.add_exception_handler(RuntimeError, _answer)


async def _answer(request: fastapi.Request, error: Exception) -> fastapi.Response:
    said = _ENCODER_ERROR.search(str(error))
    if said is None:
        raise error
    status = 503
    body = wire.write_error(RequestError(said[0], status=status))
    return fastapi.Response(body, status, media_type=wire.JSON)
