"""Memory that one engine writes into the buffers of another, and into nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from sglang.multimodal_gen.runtime.platforms.host_transfer import HostTransferEngine

SIZE = 3_000_001


@pytest.fixture
def pool() -> torch.Tensor:
    return torch.zeros(SIZE + 10, dtype=torch.uint8)


@pytest.fixture
def receiver(pool: torch.Tensor) -> Iterator[HostTransferEngine]:
    engine = HostTransferEngine("127.0.0.1")
    engine.register_buffer(pool.data_ptr(), pool.numel())
    yield engine
    engine.deregister_buffer(pool.data_ptr())


def test_bytes_arrive_where_they_are_sent(receiver: HostTransferEngine, pool: torch.Tensor) -> None:
    sent = torch.randint(0, 256, (SIZE,), dtype=torch.uint8)
    sender, to = HostTransferEngine("127.0.0.1"), receiver.session_id
    assert sender.transfer_sync(to, sent.data_ptr(), pool.data_ptr() + 7, SIZE) == 0
    assert torch.equal(pool[7 : 7 + SIZE], sent)
    assert not pool[:7].any() and not pool[7 + SIZE :].any()
    halves = [sent.data_ptr(), sent.data_ptr() + 1], [pool.data_ptr(), pool.data_ptr() + 1]
    assert sender.batch_transfer_sync(to, *halves, [1, 1]) == 0
    assert torch.equal(pool[:2], sent[:2])


@pytest.mark.parametrize("start", [-1, 11, 2 * SIZE])
def test_outside_of_a_buffer_nothing_is_written(
    receiver: HostTransferEngine, pool: torch.Tensor, start: int
) -> None:
    sent = torch.ones(SIZE, dtype=torch.uint8)
    sender, to = HostTransferEngine("127.0.0.1"), receiver.session_id
    assert sender.transfer_sync(to, sent.data_ptr(), pool.data_ptr() + start, SIZE) == -1
    assert not pool.any()


def test_nobody_is_there() -> None:
    sent = torch.ones(1, dtype=torch.uint8)
    assert HostTransferEngine("127.0.0.1").transfer_sync("127.0.0.1:1", sent.data_ptr(), 0, 1) == -1
