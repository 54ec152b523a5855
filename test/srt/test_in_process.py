"""An encoder inside the calling process: what it answers, and what it leaves alone."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sglang.srt import runtime_context
from sglang.srt.encode_only import in_process
from sglang.srt.encode_only.decoders import DecoderEncoder
from sglang.srt.encode_only.in_process import InProcessEncoder
from sglang.srt.encode_only.request import EncodeInput, EncodeSpec, RequestError
from sglang.srt.layers.packed_linear import multiplies
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig

from checkpoints import random_config, random_inputs, write_t5
from device import DEVICE, HostEncoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("umt5")
    config = random_config(random.Random(1), "UMT5", num_layers=2, d_model=32, vocab_size=90)
    write_t5(path, config, "UMT5EncoderModel")
    return path


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Iterator[InProcessEncoder]:
    encoder = HostEncoder(folder)
    yield encoder
    encoder.close()


def some_inputs(count: int = 30, vocab_size: int = 90) -> list[EncodeInput]:
    ids = random_inputs(random.Random(2), count, vocab_size, longest=100)
    return [EncodeInput(token_ids=one) for one in ids]


def test_info(encoder: InProcessEncoder, folder: Path) -> None:
    info = encoder.info
    assert info.model == str(folder)
    assert (info.architecture, info.num_layers, info.hidden_size) == ("UMT5EncoderModel", 2, 32)
    assert (info.vocab_size, info.dtype) == (90, "float32")
    assert (info.pooled_size, info.causal) == (None, False)
    assert info.max_length >= 512


def test_a_token_budget_splits_what_is_asked(encoder: InProcessEncoder, folder: Path) -> None:
    inputs = some_inputs()
    whole = encoder.encode(inputs)
    small = HostEncoder(folder, max_tokens=64)
    for one, other in zip(small.encode(inputs), whole, strict=True):
        torch.testing.assert_close(one.last_hidden_state, other.last_hidden_state)
    small.close()
    assert encoder.encode([]) == []


def test_encoders_are_independent(encoder: InProcessEncoder, tmp_path: Path) -> None:
    inputs = some_inputs()
    before = encoder.encode(inputs)
    config = random_config(random.Random(9), "T5", num_layers=3, d_model=48, vocab_size=90)
    model = write_t5(tmp_path, config)
    other = HostEncoder(tmp_path, dtype=torch.bfloat16)
    states = other.encode(inputs[:1])[0].last_hidden_state
    assert states.dtype == torch.bfloat16
    with torch.no_grad():
        expected = model(torch.tensor([inputs[0].token_ids])).last_hidden_state[0]
    assert (states.float() - expected).norm() < 1e-2 * expected.norm()
    for one, again in zip(before, encoder.encode(inputs), strict=True):
        assert torch.equal(one.last_hidden_state, again.last_hidden_state)
    other.close()
    encoder.encode(inputs[:1])


def test_threads_may_share_encoders(encoder: InProcessEncoder, folder: Path) -> None:
    half = HostEncoder(folder, dtype="float16")
    inputs = some_inputs()
    expected = {one: one.encode(inputs) for one in (encoder, half)}
    wrong: list[str] = []

    def work(one: InProcessEncoder) -> None:
        for _ in range(10):
            for out, right in zip(one.encode(inputs), expected[one], strict=True):
                if not torch.equal(out.last_hidden_state, right.last_hidden_state):
                    wrong.append(one.info.dtype)

    threads = [threading.Thread(target=work, args=(one,)) for one in (encoder, half) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    half.close()
    assert not wrong


def test_bad_input_names_the_input(encoder: InProcessEncoder) -> None:
    good = EncodeInput(token_ids=[1, 2, 3])
    for bad, message in (
        (EncodeInput(token_ids=[]), "Input 1: An input has no tokens"),
        (EncodeInput(token_ids=[1, 90]), "Input 1: Token id 90 is out of range"),
        (EncodeInput(token_ids=[1] * 3000), "Input 1: An input has 3000 tokens"),
        (EncodeInput(token_ids=[1], spec=EncodeSpec(layers=(3,))), "Input 1: `layers` holds 3"),
        (EncodeInput(token_ids=[1], spec=EncodeSpec(attend=2)), "Input 1: `attend` is 2"),
    ):
        with pytest.raises(RequestError, match=message):
            encoder.encode([good, bad])
    assert len(encoder.encode([good])) == 1


@pytest.fixture
def current_gpu(monkeypatch: pytest.MonkeyPatch) -> list[torch.device | None]:
    """What `torch.cuda.device` makes the current GPU, where there is none."""
    current: list[torch.device | None] = [None]

    @contextlib.contextmanager
    def device(place: torch.device) -> Iterator[None]:
        current.append(place)
        try:
            yield
        finally:
            current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    return current


def test_its_gpu_is_the_current_one(
    folder: Path, current_gpu: list[torch.device | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a model is loaded and while it runs, whatever the thread's current one is."""
    seen: list[torch.device | None] = []

    class Enough(Exception):
        pass

    def load(**_: object) -> None:
        seen.append(current_gpu[-1])
        raise Enough

    gpu = torch.device("cuda:1")
    with monkeypatch.context() as patch:
        patch.setattr(in_process, "get_model", load)
        with pytest.raises(Enough):
            InProcessEncoder(str(folder), device=gpu)
        # Of another thread, the current one is another.
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "current_device", lambda: 2)
        with pytest.raises(Enough):
            InProcessEncoder(str(folder), device="cuda")
    assert seen == [gpu, torch.device("cuda:2")]
    encoder = HostEncoder(folder)
    run = encoder._run
    monkeypatch.setattr(encoder, "_run", lambda batch: seen.append(current_gpu[-1]) or run(batch))
    place, encoder.device = encoder.device, gpu
    pack = in_process.pack
    monkeypatch.setattr(in_process, "pack", lambda batch, _: pack(batch, place))
    encoder.encode(some_inputs(2))
    assert seen[2:] == [gpu]
    assert current_gpu == [None]
    encoder.close()


def test_kernels_are_compiled_before_the_first_prompt(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a language model, which has no graphs that would be recorded."""
    passes: list[int] = []
    forward = DecoderEncoder.forward

    def counted(self: Any, input_ids: torch.Tensor, *args: Any, **options: Any) -> Any:
        passes.append(len(input_ids))
        return forward(self, input_ids, *args, **options)

    monkeypatch.setattr(DecoderEncoder, "forward", counted)
    monkeypatch.setattr(in_process, "compiles", lambda _: True)
    encoder = HostEncoder(llama_folder)
    assert len(passes) == 1 and passes[0] % 16
    encoder.close()


@pytest.mark.skipif(DEVICE.type != "cuda", reason="the host waits for a GPU alone")
@pytest.mark.parametrize("graphs", ["breakable", "disabled"])
def test_the_host_waits_for_nothing_within_a_forward_pass(folder: Path, graphs: str) -> None:
    encoder = InProcessEncoder(str(folder), device="cuda", cuda_graph_backend_prefill=graphs)
    batch = [EncodeInput(token_ids=[3 + i] * (5 + i)) for i in range(4)]
    for _ in range(3):
        # What is compiled, recorded and kept waits.
        encoder.encode(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        encoder.encode(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        encoder.close()


def test_what_is_no_encoder(tmp_path: Path) -> None:
    BertConfig(architectures=["BertModel"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"BertModel.*T5EncoderModel"):
        HostEncoder(tmp_path)


def test_arguments_that_contradict_the_mode(folder: Path) -> None:
    with pytest.raises(ValueError, match="--chunked-prefill-size 64 contradicts"):
        HostEncoder(folder, chunked_prefill_size=64)


def test_closing_gives_the_memory_back(folder: Path) -> None:
    encoder = HostEncoder(folder)
    [output] = encoder.encode([EncodeInput(token_ids=[1, 2])])
    weights = [weakref.ref(param) for param in encoder._model.parameters()]
    encoder.close()
    encoder.close()
    assert all(weight() is None for weight in weights)
    assert output.last_hidden_state.shape == (2, 32)
    with pytest.raises(ValueError, match="is closed"):
        encoder.encode([EncodeInput(token_ids=[1, 2])])


def test_memory_is_kept_between_passes_and_given_back_at_the_end(folder: Path) -> None:
    code = """
import sys
import psutil, torch
from sglang.srt.encode_only.in_process import InProcessEncoder

def held():
    print(psutil.Process().memory_info().rss)

encoder = InProcessEncoder(sys.argv[1], device="cpu")
held()
tensors = [torch.ones(10_000_000) for _ in range(4)]
del tensors
held()
encoder.close()
held()
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True
    )
    before, kept, after = map(int, run.stdout.split()[-3:])
    assert kept > before + 120e6 > after + 80e6, (before, kept, after)


def test_the_process_is_as_before(folder: Path) -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    context, threads = runtime_context.get_context(), torch.get_num_threads()
    encoder = HostEncoder(folder, dtype="float16")
    encoder.encode([EncodeInput(token_ids=[1, 2])])
    encoder.close()
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads
    assert torch.get_default_dtype() == torch.float32
    assert runtime_context.get_context() is context
    assert not torch.distributed.is_initialized()


class Precisions(TorchDispatchMode):
    """Of the products of float32 matrices that this thread computes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default):
            self.seen.add(torch.backends.mkldnn.matmul.fp32_precision)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shares_process", [True, False])
def test_products_of_a_program_are_left_alone_unless_it_says_so(
    folder: Path, shares_process: bool
) -> None:
    setting = torch.backends.mkldnn.matmul.fp32_precision
    encoder = InProcessEncoder(
        str(folder), device="cpu", dtype="bfloat16", shares_process=shares_process
    )
    with Precisions() as precisions:
        encoder.encode([EncodeInput(token_ids=[1] * 400)])
    encoder.close()
    assert torch.backends.mkldnn.matmul.fp32_precision == setting
    own = set() if shares_process or not multiplies(torch.bfloat16) else {"bf16"}
    assert precisions.seen - {setting} == own


HOST = """
import os, sys
import torch
from sglang.multimodal_gen.runtime.distributed import parallel_state as host
from sglang.srt.distributed import parallel_state as srt
from sglang.srt.runtime_context import get_parallel

host.maybe_init_distributed_environment_and_model_parallel(tp_size=2, sp_size=1)

def seen():
    names = ("_WORLD", "_TP", "_ATTN_TP", "_MOE_TP", "_MOE_EP", "_PP")
    parallel = get_parallel()
    return [getattr(srt, name) for name in names], parallel.tp_group, parallel.tp_size

if os.environ["RANK"] == "0":
    from sglang.srt.encode_only.in_process import InProcessEncoder
    from sglang.srt.encode_only.request import EncodeInput

    before = seen()
    encoder = InProcessEncoder(sys.argv[1], device="cpu")
    [output] = encoder.encode([EncodeInput(token_ids=[1, 2, 3])])
    torch.save(output.last_hidden_state, sys.argv[2])
    assert seen() == before
assert get_parallel().tp_group.all_reduce(torch.ones(1)) == 2
"""


def test_one_rank_of_a_parallel_host(
    folder: Path, encoder: InProcessEncoder, tmp_path: Path
) -> None:
    """In one of two diffusion workers that share a tensor-parallel group, and use it afterwards."""
    result = tmp_path / "states.pt"
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, str(folder), str(result)],
            env=os.environ
            | {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        for worker in workers:
            _, errors = worker.communicate(timeout=240)
            assert worker.returncode == 0, errors
    finally:
        for worker in workers:
            worker.kill()
    [expected] = encoder.encode([EncodeInput(token_ids=[1, 2, 3])])
    torch.testing.assert_close(torch.load(result), expected.last_hidden_state)
