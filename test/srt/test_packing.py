"""How the inputs of a call become requests of srt."""

from __future__ import annotations

import random

import pytest
from sglang.srt.encode_only.packing import parts
from sglang.srt.encode_only.request import EncodeInput, RequestError


def inputs(*lengths: int) -> list[EncodeInput]:
    return [EncodeInput(token_ids=[5] * length) for length in lengths]


def test_every_input_travels_once_within_the_budget(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(50):
        given = inputs(*(rng.randint(1, 90) for _ in range(rng.randint(1, 40))))
        budget, ranks = rng.randint(1, 200), rng.randint(1, 4)
        found = parts(given, budget, None, ranks)
        assert [one for part in found for one in part] == given
        for part in found:
            assert len(part) == 1 or sum(len(one.token_ids) for one in part) <= budget


def test_ranks_share_a_call_as_far_as_their_queues_go() -> None:
    assert [len(part) for part in parts(inputs(5, 5, 5, 5), 100, None, ranks=2)] == [2, 2]
    assert [len(part) for part in parts(inputs(2, 2), 100, 1, ranks=4)] == [2]
    with pytest.raises(RequestError, match="2 batches, but the server queues at most 1"):
        parts(inputs(60, 60), 100, 1, ranks=4)
