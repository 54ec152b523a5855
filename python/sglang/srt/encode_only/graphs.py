"""CUDA graphs of an encoder's forward pass: all its kernels launched as one.

A batch is padded to a number of tokens and of sequences that there is a graph for. The tokens
beyond its own are a sequence that is attended to by nobody, and their rows are cut off. A graph
saves the time by which kernels take longer to launch than to run, and to record it takes more than
two passes. So there is none of a batch that keeps the GPU busy anyway, and that of another is
recorded when its size is seen for the second time, where need be in place of one that has not been
used for long. Those that are recorded before the first prompt comes stay.

That needs an attention backend that reads on the GPU where sequences lie, which
`encode_only_triton` does. srt's `--cuda-graph-backend-prefill disabled` turns it off. srt's own
graphs of prompts (breakable ones) are cut at every layer's attention, which costs an encoder of
short prompts more than its products.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from sglang.srt.encode_only.batch import pack
from sglang.srt.encode_only.outputs import LayerCapture, States
from sglang.srt.encode_only.request import EncodeInput, EncodeSpec
from sglang.srt.layers.attention.encode_only.triton_backend import Sequences, TritonEncodeBackend
from sglang.srt.model_executor.cuda_graph_config import Backend
from sglang.srt.model_executor.forward_context import (
    ForwardContext,
    forward_context,
    get_attn_backend,
)
from sglang.srt.runtime_context import get_exec, get_parallel
from torch import nn

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

logger = logging.getLogger(__name__)

MAX_TOKENS = 8192
"""Most tokens of a graph,"""
MAX_WORK = 200e9
"""and most multiply-adds of a block, one a token and weight: twice what an H200 does in the 0.37 ms
for which the kernels of a block were measured to be launched. So T5-XXL, which gained 5 % at 616
tokens, has graphs of up to 1,024, and CLIP-L of up to MAX_TOKENS."""
MAX_GRAPHS = 128
IDLE = 1024
"""After how many forward passes without it a graph gives way. Where the sizes in use are more than
there can be graphs, recording each anew would cost more than none."""
MAX_SEEN = 1024
"""Of how many sizes it is remembered that they were seen once."""
USUAL_LENGTH = 512
"""Up to which prompts have their graphs before the first one comes."""


class Run(Protocol):
    """A forward pass that offers states."""

    def __call__(
        self,
        to: States,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
    ) -> None: ...


class Shape(NamedTuple):
    """What a graph is for: so many tokens and sequences, and who wants what."""

    tokens: int
    sequences: int
    wanted: frozenset[int]
    pooled: bool

    @classmethod
    def holding(cls, capture: States, tokens: int, sequences: int) -> Shape:
        """The smallest for a batch. Beyond 128 tokens, products take their rows 128 at a time, so
        that those on top cost little."""
        step = min(max(16, _power_of_2(tokens) // 8), 128)
        padded = -(-tokens // step) * step
        # One more for the tokens that are not the batch's.
        return cls(
            padded,
            _power_of_2(sequences + (padded > tokens)),
            capture.wanted,
            capture.wants_pooled,
        )


def _power_of_2(number: int) -> int:
    """The smallest that is not below."""
    return 1 << (number - 1).bit_length()


class _Graph:
    """A forward pass over inputs that always lie in the same place."""

    def __init__(self, shape: Shape, like: torch.Tensor):
        self.shape = shape
        self.input_ids = torch.zeros(shape.tokens, dtype=like.dtype, device=like.device)
        self.positions = torch.zeros_like(self.input_ids)
        numbers = like.new_zeros(2 * shape.sequences + 1, dtype=torch.int32)
        self.sequences = Sequences(*numbers.split([shape.sequences + 1, shape.sequences]))
        self.replay: Callable[[], None] | None = None
        # The number of the pass that did so; of one that is kept for good, infinity.
        self.last_used = 0.0

    def take(self, input_ids: torch.Tensor, positions: torch.Tensor, sequences: Sequences) -> None:
        tokens, count = len(input_ids), len(sequences.attend)
        self.input_ids[:tokens].copy_(input_ids)
        self.positions[:tokens].copy_(positions)
        self.sequences.starts[: count + 1].copy_(sequences.starts)
        self.sequences.starts[count + 1 :].fill_(self.shape.tokens)
        self.sequences.attend[:count].copy_(sequences.attend)
        self.sequences.attend[count:].zero_()


class Graphs:
    """The forward passes of one model.

    Args:
        run: the model's forward pass, with parameters that stay where they are.
        blocks: of the model, all of a size; their weights need not be loaded.
        quantized: whether its weights are.
        max_length: most tokens of an input; None for any.

    Attributes:
        replayed: whether the last forward pass was a graph.
    """

    def __init__(
        self, run: Run, blocks: nn.ModuleList, *, quantized: bool, max_length: int | None = None
    ):
        self._run = run
        self._num_layers = len(blocks)
        self._max_length = max_length
        self._max_tokens = most_tokens(blocks)
        self._usable = (
            get_exec().graph.cuda_graph_config.prefill.backend != Backend.DISABLED
            # Rows that are not the batch's would count for scales of a whole product,
            and not quantized
            # and ranks would have to record together.
            and get_parallel().tp_size == 1
        )
        self._graphs: dict[Shape, _Graph] = {}
        self._passes = 0
        # The pass from which on graphs are recorded, where there was no memory for one.
        self._record_from = 0
        self.replayed = False
        # Sizes that there is no graph for, in the order in which they were seen.
        self._seen: dict[Shape, None] = {}
        # What graphs give, by layer, `[most tokens, hidden]`: read before the next one runs.
        self._states: dict[int | None, torch.Tensor] = {}
        self._recorder = Recorder()
        self._turn = _Turn()

    def run(
        self,
        to: States,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        *,
        for_good: bool = False,
    ) -> None:
        """Offers `to` what it wants of a batch, by a graph where there is one, or should be.

        Args:
            input_ids: `[tokens]` int64, the sequences end to end.
            positions: `[tokens]` int64.
            for_good: whether there is to be a graph from now on, which is never given up.
        """
        self.replayed = False
        backend = get_attn_backend()
        if not (
            self._usable
            and recordable(input_ids.device)
            and isinstance(backend, TritonEncodeBackend)
            and len(input_ids) > 0
        ):
            self._run(to, input_ids, positions, forward_batch)
            return
        shape = Shape.holding(to, len(input_ids), len(backend.sequences.attend))
        self._passes += 1
        if shape not in self._graphs and not (
            shape.tokens <= self._max_tokens
            and self._passes >= self._record_from
            and (for_good or self._seen_before(shape))
            and self._make_room()
        ):
            self._run(to, input_ids, positions, forward_batch)
            return
        # What is kept is written again, also by callers in another mode than the first.
        with self._turn, torch.inference_mode(False), torch.no_grad():
            graph = self._graphs.get(shape) or _Graph(shape, input_ids)
            graph.take(input_ids, positions, backend.sequences)
            replay = graph.replay
            if replay is None:
                try:
                    replay = self._record(graph, backend, forward_batch)
                except torch.OutOfMemoryError as error:
                    logger.warning("No memory for a CUDA graph of %s: %s", shape, error)
                    self._record_from = self._passes + IDLE
                    self._run(to, input_ids, positions, forward_batch)
                    return
                except RuntimeError as error:
                    logger.warning(
                        "No CUDA graphs: kernels are launched one by one from here on. %s", error
                    )
                    self._usable = False
                    self._graphs.clear()
                    self._states.clear()
                    self._run(to, input_ids, positions, forward_batch)
                    return
            graph.last_used = math.inf if for_good else max(graph.last_used, self._passes)
            replay()
            self.replayed = True
            # The next one writes where this one has written.
            for layer in shape.wanted:
                to.offer(layer, self._states[layer][: len(input_ids)].clone())
            if None in self._states and shape.pooled:
                to.to_pool = self._states[None][: len(input_ids)].clone()

    def prepare(self, model_runner: Any, usual: Iterable[EncodeSpec]) -> None:
        """Records what a single prompt needs, so that nobody waits for that; on a GPU alone.

        Args:
            model_runner: with the attention backend of the model, for which it may be an encoder
                in a process without a model runner.
            usual: what is asked of the model most.
        """
        backend, device = model_runner.attn_backend, torch.device(model_runner.device)
        if not (self._usable and recordable(device) and isinstance(backend, TritonEncodeBackend)):
            return
        longest = min(self._max_length or USUAL_LENGTH, USUAL_LENGTH)
        shapes = [Shape.holding(States((), 0, pooled=False), n, 1) for n in range(1, longest + 1)]
        # Few prompts fill a graph, but that of the longest, to which pipelines cut.
        lengths = {*(min(shape.tokens - 1, longest) for shape in shapes), longest}
        for spec in usual:
            for length in sorted(lengths):
                batch = pack([EncodeInput(token_ids=[0] * length, spec=spec)], device)
                backend.init_forward_metadata(batch)
                with forward_context(ForwardContext(backend), forward_batch=batch):
                    capture = LayerCapture(batch, self._num_layers)
                    self.run(capture, batch.input_ids, batch.positions, batch, for_good=True)

    def _seen_before(self, shape: Shape) -> bool:
        """Whether it is asked for again; from now on it has been seen."""
        seen = shape in self._seen
        self._seen[shape] = None
        if len(self._seen) > MAX_SEEN:
            del self._seen[next(iter(self._seen))]
        return seen

    def _make_room(self) -> bool:
        """Whether there is room for another graph, if need be in place of one."""
        if len(self._graphs) < MAX_GRAPHS:
            return True
        oldest = min(self._graphs.values(), key=lambda graph: graph.last_used)
        if self._passes - oldest.last_used <= IDLE:
            return False
        del self._graphs[oldest.shape]
        return True

    def _record(
        self,
        graph: _Graph,
        backend: TritonEncodeBackend,
        forward_batch: ForwardBatch,
    ) -> Callable[[], None]:
        shape = graph.shape

        def run() -> None:
            states = States(shape.wanted, self._num_layers, pooled=shape.pooled)
            with backend.using(graph.sequences):
                self._run(states, graph.input_ids, graph.positions, forward_batch)
            for layer, rows_th in {**states.states, None: states.to_pool}.items():
                if rows_th is None:
                    continue
                if layer not in self._states:
                    self._states[layer] = rows_th.new_empty(self._max_tokens, rows_th.shape[1])
                self._states[layer][: shape.tokens].copy_(rows_th)

        try:
            graph.replay = self._recorder.record(run)
        except torch.OutOfMemoryError:
            # What lies free in torch's cache, a recording cannot take.
            torch.cuda.empty_cache()
            graph.replay = self._recorder.record(run)
        self._graphs[shape] = graph
        self._seen.pop(shape, None)
        return graph.replay


def most_tokens(blocks: nn.ModuleList) -> int:
    """How many tokens a graph may have that is of use, for a model of such blocks."""
    weights = sum(param.numel() for param in blocks.parameters()) / max(1, len(blocks))
    return int(min(MAX_TOKENS, MAX_WORK // max(1, weights)))


class _Turn:
    """One forward pass of a model after the other, on whichever streams they are."""

    def __init__(self) -> None:
        self._done: torch.cuda.Event | None = None

    def __enter__(self) -> None:
        if self._done is not None:
            self._done.wait()

    def __exit__(self, *_: object) -> None:
        if torch.cuda.is_initialized():
            self._done = self._done or torch.cuda.Event()
            self._done.record()


def recordable(device: torch.device) -> bool:
    """Whether what runs there can be a graph."""
    return device.type == "cuda"


class Recorder:
    """Makes CUDA graphs that do not run at the same time, so that they share their memory.

    And the stream they are recorded on: cuBLAS keeps tens of megabytes for each it has been on.
    """

    def __init__(self) -> None:
        self._aside: torch.cuda.Stream | None = None
        self._pool: Any = None

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """
        Args:
            run: launches kernels on the current stream, always on the same memory.

        Returns:
            What launches them as one.

        Raises:
            RuntimeError: they cannot be recorded. The current stream is as it was.
        """
        current = torch.cuda.current_stream()
        aside = self._aside = self._aside or torch.cuda.Stream(current.device)
        graph = torch.cuda.CUDAGraph()
        aside.wait_stream(current)
        # Around both: from a recording that fails, torch does not come back.
        with torch.cuda.stream(aside):
            # Kernels are compiled and loaded, and what is kept is made, before it is recorded.
            run()
            # Also where there is no recording in the end, what it read is not written before.
            current.wait_stream(aside)
            # Not by `torch.cuda.graph`, which has the whole device stand still, and gives back what
            # torch has cached on it and of pinned memory. Other threads may go on to allocate.
            pool = () if self._pool is None else (self._pool,)
            graph.capture_begin(*pool, capture_error_mode="thread_local")
            try:
                run()
            except BaseException:
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        current.wait_stream(aside)
        self._pool = graph.pool()
        return graph.replay
