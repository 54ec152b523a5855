"""`ForwardMode.ENCODE_ONLY`: a batch whose sequences are seen once and leave no KV cache.

It counts as an extend everywhere srt asks what to do with prompt tokens.
"""

from __future__ import annotations

from aenum import extend_enum
from sglang.srt.model_executor.forward_batch_info import ForwardMode

NAME = "ENCODE_ONLY"


def encode_only_mode() -> ForwardMode:
    """The mode; the first call in a process adds it to upstream's enumeration."""
    if NAME not in ForwardMode.__members__:
        extend_enum(ForwardMode, NAME, max(ForwardMode) + 1)
    return ForwardMode[NAME]


def counts_as_extend(result: bool, self: ForwardMode, *args, **kwargs) -> bool:
    """AFTER hook of the predicates of ForwardMode that are true of an extend."""
    return result or self.name == NAME
