"""The entry point of srt's general plugins: offers encode-only mode, and enters it when asked."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import logging
import multiprocessing
import os
import sys
from typing import Any

from sglang.srt.encode_only import seams

logger = logging.getLogger(__name__)

EXIT_SECONDS = 300
"""How long a scheduler that was told to end may take, in place of upstream's 15 seconds: as long as
clients wait."""

RUNS_MODELS = "SGLANG_ENCODE_SCHEDULER"
"""The environment variable by which a process knows that it was started as a scheduler."""


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
    # A module that is imported later takes what is there by then.
    seams.install(seam for seam in seams.ALWAYS if seam.module in sys.modules)


def enter_encode_only(hf_config: Any) -> None:
    """Puts this process into encode-only mode, for a checkpoint with that Hugging Face config.

    Called in every process that takes on arguments with `is_embedding_encoder`: the one that starts
    the others, which finds out for all of them whether every seam fits, then the schedulers and the
    tokenizer workers. One that was started as a scheduler runs models, whatever the program that
    it belongs to has imported; so does one with a scheduler and no engine, started elsewhere. Any
    other with an engine is a server. Calling it again does nothing.
    """
    if multiprocessing.parent_process() is None:
        for seam in seams.ENCODE_ONLY:
            seams.check(seam)
    if RUNS_MODELS in os.environ:
        enter_scheduler(hf_config)
    elif "sglang.srt.entrypoints.engine" in sys.modules:
        _enter_server()
    elif "sglang.srt.managers.scheduler" in sys.modules:
        enter_scheduler(hf_config)


def enter_scheduler(hf_config: Any) -> None:
    """The part of encode-only mode that runs models, for a scheduler or a worker elsewhere."""
    from sglang.srt.encode_only import encoders, metrics
    from sglang.srt.encode_only.forward_mode import encode_only_mode
    from sglang.srt.environ import envs

    encode_only_mode()
    if not envs.SGLANG_EAGER_INPUT_NO_COPY.is_set():
        # srt's copies are for graphs of its own; ours copy what they read.
        envs.SGLANG_EAGER_INPUT_NO_COPY.set(True)
    seams.install(seam for seam in seams.ENCODE_ONLY if seam.process == "scheduler")
    for backend in ("sdpa", "triton_backend", "fa4_backend"):
        importlib.import_module(f"sglang.srt.layers.attention.encode_only.{backend}")
    encoders.register_model(hf_config.architectures[0], encoders.encoder_of(hf_config))
    metrics.name_mode_in_log()


def _enter_server() -> None:
    from sglang.srt.encode_only import http_api
    from sglang.srt.entrypoints import http_server
    from sglang.srt.managers import tokenizer_manager

    seams.install(seam for seam in seams.ENCODE_ONLY if seam.process == "server")
    # A scheduler ends once it has answered its lines, of which the tokenizer manager does not know.
    tokenizer_manager._SCHEDULER_EXIT_TIMEOUT_SECS = EXIT_SECONDS
    http_api.install(http_server.app)
