"""Weights that are updated while an encoder serves."""

from __future__ import annotations

from typing import Any


def update_or_go_back(
    original: Any, updater: Any, model_path: str, *args: Any, **kwargs: Any
) -> tuple[bool, str]:
    """AROUND `WeightUpdater.update_weights_from_disk`: a folder that does not load changes nothing.

    Upstream goes back by loading from the same folder, whose second failure ends the scheduler.
    """
    before = updater.model_config.model_path
    try:
        return original(updater, model_path, *args, **kwargs)
    except Exception as error:
        original(updater, before, *args, **kwargs)
        return False, f"{error} The weights of {before} are loaded again."
