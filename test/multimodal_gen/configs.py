"""The configs of sglang's pipelines."""

from __future__ import annotations

import importlib
from pathlib import Path

CONFIGS = "sglang.multimodal_gen.configs.pipeline_configs"


def config_classes() -> dict[str, type]:
    """By name, with those of their parts."""
    found = {}
    for path in importlib.import_module(CONFIGS).__path__:
        for file in Path(path).glob("*.py"):
            for name, value in vars(importlib.import_module(f"{CONFIGS}.{file.stem}")).items():
                if isinstance(value, type) and name.endswith("Config"):
                    found[name] = value
    return found
