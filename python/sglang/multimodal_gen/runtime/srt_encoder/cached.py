"""The runtime's conditioning cache, for encoders whose weights another server can change."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang.multimodal_gen.runtime.srt_encoder.encoder import SrtTextEncoder

if TYPE_CHECKING:
    from sglang.multimodal_gen.runtime.cache.conditioning import ConditioningCache
    from sglang.multimodal_gen.runtime.distributed.group_coordinator import GroupCoordinator


def unless_changed(
    original: Callable[..., Any],
    self: ConditioningCache,
    model: object,
    method: str,
    args: Any,
    kwargs: Any,
    compute: Callable[[], Any],
    group: GroupCoordinator | None = None,
    **more: Any,
) -> Any:
    """AROUND `ConditioningCache.run`: what is found there counts while the weights are the same.

    Otherwise all is forgotten, and it is encoded anew.

    Args:
        group: the ranks that agree on whether it is found.
    """
    if not isinstance(model, SrtTextEncoder):
        return original(self, model, method, args, kwargs, compute, group, **more)
    if model.alone:
        group = None
    computed = False

    def noticing() -> Any:
        nonlocal computed
        computed = True
        return compute()

    output = original(self, model, method, args, kwargs, noticing, group, **more)
    if not computed and model.changed():
        self.clear()
        output = original(self, model, method, args, kwargs, compute, group, **more)
    return output
