"""Where each text encoder runs: the values of `--srt-encoders`, read and checked.

How the option reaches the pipeline's configuration is in `option.py`; what an encoder does in its
place is in `loader.py` and `encoder.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from urllib.parse import urlsplit

import msgspec
from sglang.srt.encode_only.client import shown
from sglang.srt.encode_only.encoders import ENCODERS, find_encoder

FLAG = "--srt-encoders"
VALUES = (
    "native, srt, server (or server:PORT), or one or several URLs (http://HOST:PORT, commas "
    "between them)"
)

_NAMED = re.compile(r"([A-Za-z][\w-]*)=(.*)", re.DOTALL)


class Native(msgspec.Struct, frozen=True):
    """In the diffusion worker, as stock sglang runs it."""

    def __str__(self) -> str:
        return "native"


class InWorker(msgspec.Struct, frozen=True):
    """In the diffusion worker, by srt."""

    def __str__(self) -> str:
        return "srt in the diffusion worker"


class Beside(msgspec.Struct, frozen=True):
    """On a server of its own, started and stopped with the diffusion server.

    Attributes:
        port: that it listens on; None for any that is free.
    """

    port: int | None = None

    def __str__(self) -> str:
        return "srt on a server of its own"


class Servers(msgspec.Struct, frozen=True):
    """On encode-only servers: they share the load, and one that is down is passed over.

    Attributes:
        urls: where they are.
        local: whether they belong to the diffusion server, which starts one that ends again. What
            a worker is told of such a server is written `server:http://HOST:PORT`.
    """

    urls: tuple[str, ...]
    local: bool = False

    def __str__(self) -> str:
        where = "srt on a server of its own, " if self.local else "srt at "
        return where + ", ".join(map(shown, self.urls))


Placement = Native | InWorker | Beside | Servers

Option = str | Sequence[str] | Mapping[str, str | Sequence[str]]
"""The option as a user gives it: `"srt"`, `"text_encoder=srt text_encoder_2=http://…"`, a list of
such items, or a place (a list of URLs counts as one) by component."""


class Placements(msgspec.Struct, frozen=True):
    """The option, read.

    Attributes:
        every: the place of every encoder that has none of its own and that srt serves; None where
            the option gives no such place.
        named: the places that were given for a component by name.
    """

    every: Placement | None = None
    named: dict[str, Placement] = {}

    @property
    def native(self) -> bool:
        """Whether it is all as stock has it."""
        return {self.every or Native(), *self.named.values()} == {Native()}

    def of(self, component: str, architecture: str | None) -> Placement:
        """Where `component` runs, whose class is `architecture`."""
        if component in self.named:
            return self.named[component]
        if self.every is not None and _is_served(architecture):
            return self.every
        return Native()

    def check(self, model: str, encoders: Mapping[str, str]) -> None:
        """Raises ValueError where the option does not fit a pipeline.

        Args:
            model: the pipeline, for the message.
            encoders: the class of each of its text encoders by component name.
        """
        for component, placement in self.named.items():
            if component not in encoders:
                raise ValueError(
                    f"{FLAG} gives a place for {component!r}, but the text encoders of {model} "
                    f"are {_listed(encoders)}. Name one of them."
                )
            if placement != Native() and not _is_served(encoders[component]):
                raise ValueError(
                    f"{FLAG} {component}={shown(as_option(placement))}: srt does not serve "
                    f"{encoders[component]}. It serves {_listed(ENCODERS)}. Leave {component} out."
                )
        served = [c for c, a in encoders.items() if _is_served(a)]
        here = [c for c in served if c not in self.named]
        every = shown(as_option(self.every))
        if isinstance(self.every, Servers) and len(here) > 1:
            raise ValueError(
                f"{FLAG} {every} is for {_listed(here)} of {model}, but a server "
                f"has one encoder. Give each its own: {here[0]}=http://…."
            )
        ports = [p.port for p in self.named.values() if isinstance(p, Beside) and p.port]
        if isinstance(self.every, Beside) and self.every.port:
            ports += [self.every.port] * len(here)
        if len(ports) > len(set(ports)):
            raise ValueError(f"{FLAG} gives one port to several servers; give each its own.")
        if self.every not in (None, Native()) and not served:
            classes = _listed(f"{c} ({a})" for c, a in encoders.items())
            raise ValueError(
                f"{FLAG} {every}: srt serves none of the text encoders of {model}: "
                f"{classes}. It serves {_listed(ENCODERS)}. Leave {FLAG} out."
            )


def read(option: Option) -> Placements:
    """Reads the option; ValueError says what was given and what is accepted."""
    every: Placement | None = None
    named: dict[str, Placement] = {}
    for component, value in _items(option):
        place = _place(component, value)
        if component is None:
            if every is not None:
                raise ValueError(f"{FLAG} gives a place for every encoder twice; give one.")
            every = place
        elif component in named:
            raise ValueError(f"{FLAG} gives a place for {component} twice; give one.")
        else:
            named[component] = place
    return Placements(every, named)


def _items(option: Option) -> Iterable[tuple[str | None, str]]:
    """The option's items: a component, or None for every one, and its value."""
    if isinstance(option, Mapping):
        for component, value in option.items():
            urls = value if isinstance(value, str) else ",".join(_texts(value))
            yield component.replace("-", "_"), urls
        return
    for item in option.split() if isinstance(option, str) else _texts(option):
        match = _NAMED.fullmatch(item)
        if match:
            yield match[1].replace("-", "_"), match[2]
        else:
            yield None, item


def _texts(values: object) -> Sequence[str]:
    if not isinstance(values, list | tuple) or not all(isinstance(v, str) for v in values):
        raise ValueError(f"{FLAG} got {values!r}; give {VALUES}, or such a value by component.")
    return values


def _place(component: str | None, value: str) -> Placement:
    if value == "native":
        return Native()
    if value == "srt":
        return InWorker()
    if match := re.fullmatch(r"server(?::(\d+))?", value):
        port = None if match[1] is None else int(match[1])
        if port is not None and not 0 < port < 1 << 16:
            raise ValueError(f"{FLAG}: {value!r}: a port is a number of 1 to 65535.")
        return Beside(port)
    if value.startswith("server:http"):
        return Servers((_url(component, value.removeprefix("server:")),), local=True)
    return Servers(tuple(_url(component, url.strip()) for url in value.split(",")))


def _url(component: str | None, text: str) -> str:
    where = FLAG if component is None else f"{FLAG} {component}="
    said = shown(text)
    try:
        parts = urlsplit(text)
        usable = bool(parts.scheme in ("http", "https") and parts.hostname and parts.port != 0)
    except ValueError:
        raise ValueError(
            f"{where}: the host or the port of {said!r} cannot be read; give http://HOST:PORT, of "
            "which the port is a number of 1 to 65535."
        ) from None
    if usable:
        return text.rstrip("/")
    if re.fullmatch(r"[\w.-]+:\d+(/.*)?|\[[\da-fA-F:]+\]:\d+(/.*)?", text):
        raise ValueError(f"{where}: {said!r} is a URL without its scheme; write http://{said}.")
    raise ValueError(f"{where}: {said!r} is no place for a text encoder; give {VALUES}.")


def _is_served(architecture: str | None) -> bool:
    return architecture is not None and find_encoder([architecture]) is not None


def as_option(placement: Placement | None) -> str:
    """The placement as it is written."""
    match placement:
        case Beside(port):
            return "server" if port is None else f"server:{port}"
        case Servers(urls, local):
            return "server:" * local + ",".join(urls)
        case InWorker():
            return "srt"
        case _:
            return "native"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
