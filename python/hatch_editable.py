"""Build hook of the editable wheel (`pip install -e`); the ordinary wheel is untouched.

sglang is a regular package in site-packages, so a second directory on sys.path would never be
looked into. The editable wheel therefore ships an import finder that adds this checkout to the
search path of `sglang` and of each of its regular subpackages.
"""

from __future__ import annotations

from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_FINDER = '''"""Adds {root} to the search path of the installed sglang packages."""

import sys
from importlib.machinery import PathFinder
from pathlib import Path

ROOT = Path({root!r})


class CheckoutFinder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "sglang" and not name.startswith("sglang."):
            return None
        spec = PathFinder.find_spec(name, path, target)
        # A namespace package (no origin) follows its parent's search path by itself.
        if spec is not None and spec.origin and spec.submodule_search_locations is not None:
            here = str(ROOT.joinpath(*name.split(".")))
            if Path(here).is_dir() and here not in spec.submodule_search_locations:
                spec.submodule_search_locations.append(here)
        return spec


sys.meta_path.insert(0, CheckoutFinder)
'''


class EditableHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict) -> None:
        if version != "editable":
            return
        build = Path(self.directory)
        build.mkdir(parents=True, exist_ok=True)
        finder = build / "_sglang_encoder_checkout.py"
        finder.write_text(_FINDER.format(root=self.root))
        pth = build / "_sglang_encoder_checkout.pth"
        pth.write_text("import _sglang_encoder_checkout\n")
        build_data["force_include_editable"][str(finder)] = finder.name
        build_data["force_include_editable"][str(pth)] = pth.name
