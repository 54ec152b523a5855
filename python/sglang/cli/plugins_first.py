"""Makes `sglang generate` load the diffusion plugins before it reads its arguments.

`sglang serve` and the Python API do so by themselves. This is installed while sglang is being
imported, by the platform's entry point, which is the only code of a plugin that runs early enough;
so it stands outside the diffusion runtime, which must not be imported by then.
"""

from __future__ import annotations

import sys

from sglang.srt.encode_only.plugin import supports_installed_sglang
from sglang.srt.encode_only.seams import Seam
from sglang.srt.encode_only.seams import install as install_seams

COMMAND_LINE: tuple[Seam, ...] = (
    Seam(
        target="sglang.cli.generate:generate",
        kind="before",
        hook="sglang.cli.plugins_first:load_plugins",
        parameters=("args", "extra_argv"),
        process="diffusion",
        reason="`sglang generate` reads its arguments before it loads plugins, so that a plugin "
        "cannot add a flag.",
        upstream="apply_plugin_hooks() before the parser is built, as sglang.cli.serve does",
    ),
)


def install() -> None:
    """Puts the hook on `sglang generate`, in its process alone; SeamError where it does not fit."""
    if sys.argv[1:2] == ["generate"] and supports_installed_sglang():
        install_seams(COMMAND_LINE)


def load_plugins(args: object, extra_argv: list[str]) -> None:
    """BEFORE `sglang.cli.generate.generate`."""
    from sglang.multimodal_gen.runtime.platforms.plugins import apply_plugin_hooks

    apply_plugin_hooks()
