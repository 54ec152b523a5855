"""Encoders on servers, asked before the stage asks them: `queued.py` knows what it will want."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import AbstractContextManager

from sglang.multimodal_gen.runtime.srt_encoder.encoder import InputRefused, Key, key_of
from sglang.multimodal_gen.runtime.srt_encoder.servers import EncodeServers
from sglang.srt.encode_only.request import EncodeInput, EncodeOutput


class _Call:
    """Inputs that are being encoded, in a thread that ends with the process.

    Attributes:
        lost: what is said of servers that ended while they had the inputs.
    """

    def __init__(self, servers: EncodeServers, inputs: list[EncodeInput]):
        self.lost: list[str] = []
        self._servers = servers
        self._updates = servers.updates
        self._future: Future[dict[Key, EncodeOutput]] = Future()
        threading.Thread(target=self._run, args=(inputs,), daemon=True).start()

    def _run(self, inputs: list[EncodeInput]) -> None:
        try:
            outputs = self._servers(inputs, self.lost)
            self._future.set_result(dict(zip(map(key_of, inputs), outputs, strict=True)))
        except Exception as error:
            self._future.set_exception(error)

    def output(self, key: Key) -> EncodeOutput | None:
        """None where it is to be asked for anew: one of the inputs was refused, it failed before
        anybody waited for it, or weights have changed since.

        Raises:
            Exception: it fails now.
        """
        over = self._future.done()
        try:
            output = self._future.result()[key]
        except Exception as error:
            if over or isinstance(error, InputRefused):
                return None
            raise
        return output if self._servers.updates == self._updates else None


class Early:
    """An encoder on servers that can be told what will be asked of it. Threads may share it."""

    def __init__(self, servers: EncodeServers):
        self._servers = servers
        self._calls: dict[Key, _Call] = {}
        self._lock = threading.Lock()

    def changed(self) -> bool:
        return self._servers.changed()

    def patient(self) -> AbstractContextManager[None]:
        """As of EncodeServers."""
        return self._servers.patient()

    def begin(self, inputs: list[EncodeInput]) -> list[Key]:
        """Starts to encode what is not under way; what is called for once is kept no longer."""
        with self._lock:
            new = {key_of(one): one for one in inputs if key_of(one) not in self._calls}
            if new:
                call = _Call(self._servers, [*new.values()])
                self._calls.update(dict.fromkeys(new, call))
        return [*new]

    def forget(self, keys: Iterable[Key]) -> None:
        with self._lock:
            for key in keys:
                self._calls.pop(key, None)

    def __call__(self, inputs: list[EncodeInput]) -> list[EncodeOutput]:
        """As of EncodeServers."""
        keys = [key_of(one) for one in inputs]
        with self._lock:
            calls = {key: self._calls.pop(key) for key in {*keys} & {*self._calls}}
        outputs: dict[Key, EncodeOutput] = {}
        failed: set[_Call] = set()
        for key, call in calls.items():
            if (output := call.output(key)) is not None:
                outputs[key] = output
            else:
                failed.add(call)
        rest = {key: one for key, one in zip(keys, inputs, strict=True) if key not in outputs}
        if rest:
            # A prompt that ended servers while it waited is not given to as many again.
            lost = max((call.lost for call in failed), key=len, default=[])
            outputs.update(zip(rest, self._servers([*rest.values()], [*lost]), strict=True))
        return [outputs[key] for key in keys]
