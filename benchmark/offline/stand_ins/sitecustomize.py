"""Stand-ins for the packages of kernels that sglang imports, where they are not installed.

Python imports this module by itself where its folder is on PYTHONPATH, in every process that a
server starts. Whatever is asked of a stand-in exists, and refuses to be called.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types

KERNELS = {
    "deep_ep",
    "deep_gemm",
    "flash_attn",
    "kernels",
    "sgl_kernel",
}


class Refusal(type):
    """A class with every attribute, and no instances: it serves in annotations and as a base."""

    def __call__(cls, *_: object, **__: object) -> None:
        raise RuntimeError(
            f"{cls.__module__} is a stand-in: the package is not installed on this machine."
        )

    def __getattr__(cls, name: str) -> Refusal:
        return attribute(cls.__module__, name)


def attribute(module: str, name: str) -> Refusal:
    # Python asks for what modules and classes may lack by such names.
    if name.startswith("__"):
        raise AttributeError(name)
    return Refusal(name, (), {"__module__": module})


class StandIn(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Refusal:
        return attribute(self.__name__, name)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds what nobody before it has found."""

    def find_spec(
        self, name: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in KERNELS:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


sys.meta_path.append(Finder())
