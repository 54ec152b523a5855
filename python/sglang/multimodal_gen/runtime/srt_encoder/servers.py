"""The encode-only servers that encode for one component: which is asked, and what it must serve."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np
from sglang.multimodal_gen.runtime.srt_encoder.checkpoint import Checkpoint
from sglang.multimodal_gen.runtime.srt_encoder.encoder import EncoderError, InputRefused
from sglang.srt.encode_only.client import EncoderClient, EncoderUnavailable
from sglang.srt.encode_only.request import EncodeInput, EncodeOutput, EncoderInfo, RequestError

API_KEY = "SGLANG_SRT_ENCODER_API_KEY"
"""The environment variable that holds the servers' API key, where they have one."""

MAX_PAUSE = 30.0
"""Seconds for which a server that failed is asked last, at most; the first time it is one."""

INFO_TIMEOUT = 5.0
"""Seconds that a server has to say which weights it has."""

SILENCE = 0.5
"""Seconds after which a server that has failed is not asked about its weights for a while."""

RETRY = 0.5
"""Seconds until servers that are started again are asked again."""

MOST_LOST = 2
"""How many servers may end while they have a prompt; it is given to no other then."""

SLACK = 1
"""How many more calls than the least busy server the one that knows a prompt may have."""


class Server:
    """One server, and how it has fared here.

    Attributes:
        calls: under way.
        paused_until: by `time.monotonic()`.
        silent: whether it took its time to fail, as a host does that is gone.
    """

    def __init__(self, client: EncoderClient):
        self.client = client
        self.calls = 0
        self.paused_until = 0.0
        self.silent = False
        self._pause = 0.0

    def failed(self, seconds: float) -> None:
        """Others are asked before it for a while, longer each time. It took `seconds` to fail."""
        self.silent = seconds > SILENCE
        self._pause = min(max(1.0, 2 * self._pause), MAX_PAUSE)
        self.paused_until = time.monotonic() + self._pause

    def answered(self) -> None:
        self._pause = self.paused_until = 0.0


class EncodeServers:
    """Encodes on one of several servers. Threads may share it.

    A prompt goes to the server that got it before, by whichever worker, as long as that is hardly
    busier than the others. One that fails is passed over at once, and its call goes to another; it
    is asked again after a while, or when there is no other.

    Args:
        component: the pipeline's component, for messages.
        urls: the servers.
        expected: what each has to serve; every answer says, because a server can be started again
            with another model.
        timeout: seconds that a server has for an answer.
        patience: seconds for which they are asked again when none answers, because somebody is
            starting them again.

    Attributes:
        updates: how many times a server was seen to have other weights than before.
    """

    def __init__(
        self,
        component: str,
        urls: Sequence[str],
        expected: Checkpoint,
        timeout: float,
        patience: float = 0.0,
    ):
        self.component = component
        self.expected = expected
        key = os.environ.get(API_KEY)
        self._servers = [Server(EncoderClient(url, api_key=key, timeout=timeout)) for url in urls]
        self._lock = threading.Lock()
        self._timeout = timeout
        self._patience = patience
        # By URL, as an answer last had it.
        self._weights: dict[str, set[str]] = {}
        self._changed = False
        self.updates = 0

    def changed(self) -> bool:
        """Whether a server has other weights than at the last call of this, as far as they say."""
        now = time.monotonic()
        for server in self._servers:
            # One whose host says at once that nobody is there may be there the next moment.
            if server.paused_until > now and server.silent:
                continue
            # One that is down has no newer weights.
            with contextlib.suppress(EncoderUnavailable, RequestError), self._call(server):
                self._note(
                    server.client, server.client.info(timeout=min(self._timeout, INFO_TIMEOUT))
                )
        with self._lock:
            changed, self._changed = self._changed, False
        return changed

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """While this holds, they are waited for as long as for an answer, being started perhaps."""
        patience = self._patience
        self._patience = self._timeout
        try:
            yield
        finally:
            self._patience = patience

    def __call__(
        self, inputs: list[EncodeInput], lost: list[str] | None = None
    ) -> list[EncodeOutput]:
        """An output an input.

        Args:
            lost: what is said of servers that had these inputs before and ended, to which those
                that end now are added.

        Raises:
            EncoderError: no server answers, or one serves another model; or `MOST_LOST` have
                ended with the inputs. InputRefused: one refuses an input.
        """
        deadline = time.monotonic() + self._patience
        timeout = self._timeout
        lost = [] if lost is None else lost
        self._check_lost(lost)
        while True:
            outputs, down = self._ask_each(inputs, timeout, lost)
            if outputs is not None:
                return outputs
            left = deadline - time.monotonic() - RETRY
            if left <= 0:
                raise self._error(" ".join(down))
            time.sleep(RETRY)
            timeout = min(self._timeout, left)

    def _ask_each(
        self, inputs: list[EncodeInput], timeout: float, lost: list[str]
    ) -> tuple[list[EncodeOutput] | None, list[str]]:
        """The answer of the first server that gives one, and why others gave none.

        Args:
            lost: what is said of those that had the inputs and ended, from call to call.
        """
        down: list[str] = []
        for server in self._in_order(inputs):
            client = server.client
            try:
                with self._call(server):
                    outputs = client.encode_inputs(inputs, timeout=timeout)
                    for output in outputs:
                        self._check(client, output.encoder)
                    self._check_widths(client, outputs)
                    return outputs, down
            except EncoderUnavailable as error:
                down.append(str(error))
                if error.lost:
                    lost.append(str(error))
                self._check_lost(lost)
            except RequestError as error:
                if error.status == 429:
                    down.append(f"The encoder at {client.base_url} is busy: {error}")
                    continue
                if error.status in (401, 403):
                    raise self._error(str(error)) from error
                # Perhaps because of what it serves.
                with contextlib.suppress(EncoderUnavailable, RequestError):
                    self._check(client, client.info())
                said = f"The encoder at {client.base_url}: {error}"
                raise InputRefused(self.component, said) from error
        return None, down

    def _in_order(self, inputs: list[EncodeInput]) -> list[Server]:
        """The servers in the order in which they are asked."""
        prompt = hashlib.blake2b(digest_size=8)
        for one in inputs:
            prompt.update(np.asarray(one.token_ids, dtype=np.int64).tobytes())

        def rank(server: Server) -> bytes:
            # Of each prompt the servers have an order of their own, the same in every worker.
            url = server.client.base_url.encode()
            return hashlib.blake2b(url, key=prompt.digest(), digest_size=8).digest()

        now = time.monotonic()
        with self._lock:
            least = min(server.calls for server in self._servers)
            return sorted(
                self._servers,
                key=lambda s: (s.paused_until > now, s.calls > least + SLACK, rank(s)),
            )

    @contextlib.contextmanager
    def _call(self, server: Server) -> Iterator[None]:
        began = time.monotonic()
        with self._lock:
            server.calls += 1
        try:
            yield
        except EncoderUnavailable:
            with self._lock:
                server.failed(time.monotonic() - began)
            raise
        else:
            with self._lock:
                server.answered()
        finally:
            with self._lock:
                server.calls -= 1

    def _note(self, client: EncoderClient, found: EncoderInfo) -> None:
        with self._lock:
            # Behind one URL there may be several servers, which answer by turns.
            known = self._weights.setdefault(client.base_url, {found.weights})
            if found.weights not in known:
                known.add(found.weights)
                self._changed = True
                self.updates += 1

    def _check(self, client: EncoderClient, found: EncoderInfo | None) -> None:
        if found is None:
            return
        self._note(client, found)
        mismatch = self.expected.mismatch(found)
        if mismatch is not None:
            raise self._error(f"The encoder at {client.base_url} serves another model: {mismatch}.")

    def _check_lost(self, lost: list[str]) -> None:
        if len(lost) >= MOST_LOST:
            said = "These servers ended while they had the prompt, so no other gets it."
            raise self._error(f"{said} {' '.join(lost)}")

    def _check_widths(self, client: EncoderClient, outputs: list[EncodeOutput]) -> None:
        """Raises EncoderUnavailable where rows are not as wide as the pipeline's.

        One number a row would otherwise be spread over the whole of it.
        """
        for output in outputs:
            pairs = [
                (s.shape[-1], self.expected.hidden_size) for s in output.hidden_states.values()
            ]
            if output.pooled is not None:
                pairs.append((output.pooled.numel(), self.expected.pooled_size))
            for width, mine in pairs:
                if width != mine:
                    said = f"its answer has rows of {width} where the pipeline has {mine}"
                    raise EncoderUnavailable(client.base_url, said)

    def _error(self, what: str) -> EncoderError:
        return EncoderError(f"{self.component} on srt: {what}")
