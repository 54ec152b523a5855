"""What encoders are asked for: batches of prompts as token ids, and prompts that arrive by chance.

Ids are random, since a model of random weights has no tokenizer.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

Batch = list[list[int]]
Arrangement = Literal["as they are", "equal", "whole"]

PROMPTS = Path(__file__).with_name("prompts.txt")
"""A few prompts of our own."""
LONGEST = 512
"""Most tokens of a text: diffusion pipelines cut the rest off."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """A batch.

    Attributes:
        group: what it has in common with other sizes of itself.
        prompts: the token ids of each.
    """

    group: str
    prompts: Batch

    @cached_property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.prompts]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def label(self) -> str:
        shortest, longest = min(self.lengths), max(self.lengths)
        each = f"{shortest}" if shortest == longest else f"{shortest} to {longest}"
        count = len(self.prompts)
        return f"{count} prompt{'s' * (count > 1)} of {each} tokens, {self.tokens} in all"

    @cached_property
    def arranged(self) -> dict[Arrangement, Batch]:
        """The same tokens in other prompts: as many of equal length, and all in one."""
        ids = [token for prompt in self.prompts for token in prompt]
        size = self.tokens // len(self.prompts)
        same = len(set(self.lengths)) == 1
        starts = range(0, size * len(self.prompts), size)
        return {
            "as they are": self.prompts,
            "equal": self.prompts if same else [ids[start : start + size] for start in starts],
            "whole": [ids],
        }


def ragged_lengths(prompts: int, tokens: int, rng: random.Random) -> list[int]:
    """`prompts` lengths of at least 2 that add up to `tokens`."""
    if tokens < 2 * prompts:
        raise ValueError(f"{prompts} prompts have at least {2 * prompts} tokens, not {tokens}.")
    cuts = sorted(rng.sample(range(tokens - 2 * prompts + prompts - 1), prompts - 1))
    edges = [-1, *cuts, tokens - 2 * prompts + prompts - 1]
    return [b - a - 1 + 2 for a, b in itertools.pairwise(edges)]


def text_lengths(path: Path, prompts: int, rng: random.Random, longest: int = LONGEST) -> list[int]:
    """The lengths of `prompts` lines, as one token for every four characters and one for the end.

    An estimate: a model of random weights has no tokenizer. Lines repeat where there are too few.
    """
    lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} holds no prompts; give a file with one on each line.")
    drawn = rng.sample(lines, prompts) if prompts <= len(lines) else rng.choices(lines, k=prompts)
    return [min(longest, -(-len(line) // 4) + 1) for line in drawn]


def token_ids(lengths: Sequence[int], rng: random.Random) -> Batch:
    """Below every vocabulary; T5's end of a text comes last."""
    return [[rng.randrange(3, 30000) for _ in range(n - 1)] + [1] for n in lengths]


@dataclasses.dataclass(frozen=True)
class Arrivals:
    """Prompts that come by themselves, however long the answers take.

    Attributes:
        rate: prompts a second, on average.
        times: seconds from the beginning.
        prompts: one for each.
    """

    rate: float
    times: list[float]
    prompts: Batch

    @property
    def mean_length(self) -> int:
        return round(sum(map(len, self.prompts)) / len(self.prompts))

    @classmethod
    def poisson(
        cls, rate: float, seconds: float, path: Path, rng: random.Random, longest: int = LONGEST
    ) -> Arrivals:
        """The first at once, then with independent exponential gaps; lengths are a text's."""
        times = [0.0]
        while times[-1] < seconds:
            times.append(times[-1] + rng.expovariate(rate))
        times = times[:-1]
        lengths = text_lengths(path, 1000, rng, longest)
        return cls(rate, times, token_ids([rng.choice(lengths) for _ in times], rng))
