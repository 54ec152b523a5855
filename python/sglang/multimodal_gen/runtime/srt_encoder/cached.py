"""The runtime's conditioning cache, for encoders whose weights another server can change."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang.multimodal_gen.runtime.srt_encoder.encoder import SrtTextEncoder

if TYPE_CHECKING:
    from sglang.multimodal_gen.runtime.cache.conditioning import ConditioningCache


def unless_changed(
    original: Callable[..., Any],
    self: ConditioningCache,
    model: object,
    method: str,
    args: Any,
    kwargs: Any,
    compute: Callable[[], Any],
    *rest: Any,
    **more: Any,
) -> Any:
    """AROUND `ConditioningCache.run`: what is found there counts while the weights are the same.

    Otherwise all is forgotten, and it is encoded anew.
    """
    if not isinstance(model, SrtTextEncoder):
        return original(self, model, method, args, kwargs, compute, *rest, **more)
    computed = False

    def noticing() -> Any:
        nonlocal computed
        computed = True
        return compute()

    output = original(self, model, method, args, kwargs, noticing, *rest, **more)
    if not computed and model.changed():
        self.clear()
        output = original(self, model, method, args, kwargs, compute, *rest, **more)
    return output
