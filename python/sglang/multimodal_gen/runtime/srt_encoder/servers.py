"""The encode-only servers that encode for one component: their turns, and what they must serve."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Sequence

from sglang.multimodal_gen.runtime.srt_encoder.checkpoint import Checkpoint
from sglang.multimodal_gen.runtime.srt_encoder.encoder import EncoderError
from sglang.srt.encode_only.client import EncoderClient, EncoderUnavailable
from sglang.srt.encode_only.request import EncodeInput, EncodeOutput, RequestError

API_KEY = "SGLANG_SRT_ENCODER_API_KEY"
"""The environment variable that holds the servers' API key, where they have one."""


class EncodeServers:
    """Encodes on one of several servers, each in its turn; the next takes over from one down.

    Args:
        component: the pipeline's component, for messages.
        urls: the servers.
        expected: what each has to serve. It is asked before every batch, because a server can be
            started again with another model.
        timeout: seconds that a server has for an answer.
    """

    def __init__(self, component: str, urls: Sequence[str], expected: Checkpoint, timeout: float):
        self.component = component
        self.expected = expected
        key = os.environ.get(API_KEY)
        self._clients = [EncoderClient(url, api_key=key, timeout=timeout) for url in urls]
        # Workers that start together do not all begin with the same server.
        self._turns = itertools.count(random.randrange(len(urls)))

    def __call__(self, inputs: list[EncodeInput]) -> list[EncodeOutput]:
        """An output an input.

        Raises:
            EncoderError: no server answers, or one refuses, or one serves another model.
        """
        first = next(self._turns)
        down = []
        for i in range(len(self._clients)):
            client = self._clients[(first + i) % len(self._clients)]
            try:
                self._check(client)
                return client.encode_inputs(inputs)
            except EncoderUnavailable as error:
                down.append(str(error))
            except RequestError as error:
                if error.status != 429:
                    raise self._error(
                        f"The encoder at {client.base_url} refused: {error}"
                    ) from error
                down.append(f"The encoder at {client.base_url} is busy: {error}")
        raise self._error(" ".join(down))

    def _check(self, client: EncoderClient) -> None:
        mismatch = self.expected.mismatch(client.info())
        if mismatch is not None:
            raise self._error(f"The encoder at {client.base_url} serves another model: {mismatch}.")

    def _error(self, what: str) -> EncoderError:
        return EncoderError(f"{self.component} on srt: {what}")
