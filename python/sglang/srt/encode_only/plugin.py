"""The entry point of srt's general plugins: offers encode-only mode, and enters it when asked."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import logging
import multiprocessing
import sys
from typing import TYPE_CHECKING

from sglang.srt.encode_only import seams

if TYPE_CHECKING:
    from sglang.srt.encode_only.server_args import ServerArgs

logger = logging.getLogger(__name__)


@functools.cache
def supports_installed_sglang() -> bool:
    """Whether the installed sglang is the one that our seams describe; says so once if not."""
    installed = importlib.metadata.version("sglang")
    if installed == seams.SUPPORTED_SGLANG:
        return True
    if multiprocessing.parent_process() is None:
        logger.error(
            "sglang-encoder is not loaded: it is for sglang %s, and sglang %s is installed.",
            seams.SUPPORTED_SGLANG,
            installed,
        )
    return False


def install() -> None:
    """Entry point of `sglang.srt.plugins`. Adds the flag; nothing on a request's path."""
    if not supports_installed_sglang():
        return
    from sglang.srt.encode_only import server_args

    server_args.register()
    seams.install(seams.ALWAYS)


def enter_encode_only(server_args: ServerArgs) -> None:
    """Puts this process into encode-only mode, as far as what it has imported goes.

    Called whenever a process resolves or publishes arguments with `is_embedding_encoder`.
    """
    from sglang.srt.encode_only import encoders, metrics
    from sglang.srt.encode_only.forward_mode import encode_only_mode

    # The process that starts the others finds out for all of them whether every seam fits.
    seams.install(seams.ENCODE_ONLY, everywhere=multiprocessing.parent_process() is None)
    if "sglang.srt.model_executor.model_runner" in sys.modules:
        encode_only_mode()
        importlib.import_module("sglang.srt.layers.attention.encode_only.sdpa")
        encoders.register_models()
        metrics.name_mode_in_log()
    if http_server := sys.modules.get("sglang.srt.entrypoints.http_server"):
        from sglang.srt.encode_only import http_api

        http_api.install(http_server.app)
