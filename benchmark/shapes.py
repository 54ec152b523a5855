"""Encoders at real shapes with random weights, written as Hugging Face folders.

What a forward pass over them computes is here as well; how fast a machine could is in roofline.py.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers


@dataclasses.dataclass(frozen=True)
class Shape:
    """A text encoder without its weights.

    Attributes:
        name: for people.
        architecture: the class in transformers.
        settings: of its config.
        cut: whether it has fewer layers than the model of its name.
    """

    name: str
    architecture: str
    settings: dict[str, Any]
    cut: bool = False

    @property
    def model_class(self) -> Any:
        return getattr(transformers, self.architecture)

    @property
    def config(self) -> Any:
        return self.model_class.config_class(**self.settings)

    @property
    def layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def hidden(self) -> int:
        return self.config.hidden_size

    @property
    def is_t5(self) -> bool:
        return "d_model" in self.settings

    @property
    def causal(self) -> bool:
        return not self.is_t5

    @property
    def max_length(self) -> int | None:
        """Most tokens of a prompt; None for relative positions."""
        return None if self.is_t5 else self.config.max_position_embeddings

    @property
    def label(self) -> str:
        return f"{self.name}, cut to {self.layers} layers" if self.cut else self.name

    def with_layers(self, layers: int) -> Shape:
        """The first `layers` blocks of it.

        Raises:
            ValueError: it has fewer.
        """
        if not 1 <= layers <= self.layers:
            raise ValueError(f"{self.name} has 1 to {self.layers} layers, not {layers}.")
        key = "num_layers" if self.is_t5 else "num_hidden_layers"
        return dataclasses.replace(self, settings={**self.settings, key: layers}, cut=True)

    def block(self) -> list[tuple[int, int]]:
        """`(out_features, in_features)` of every matrix product of one block, in order."""
        c = self.config
        if self.is_t5:
            inner = c.num_heads * c.d_kv
            attention = [(inner, c.d_model)] * 3 + [(c.d_model, inner)]
            return attention + [(c.d_ff, c.d_model)] * 2 + [(c.d_model, c.d_ff)]
        hidden, wide = c.hidden_size, c.intermediate_size
        if "num_key_value_heads" not in self.settings:
            return [(hidden, hidden)] * 4 + [(wide, hidden), (hidden, wide)]
        keys = c.num_key_value_heads * hidden // c.num_attention_heads
        attention = [(hidden, hidden), *[(keys, hidden)] * 2, (hidden, hidden)]
        return attention + [(wide, hidden)] * 2 + [(hidden, wide)]

    def products(self) -> list[tuple[int, int]]:
        """The same of one forward pass."""
        return self.block() * self.layers

    def operations(self, lengths: Sequence[int]) -> int:
        """Additions and multiplications of a forward pass: of its products and its attention."""
        products = 2 * sum(lengths) * sum(a * b for a, b in self.products())
        attention = 4 * self.layers * self.block()[0][0] * sum(n * n for n in lengths)
        return products + (attention // 2 if self.causal else attention)

    def parameters(self) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in self.model_class(self.config).parameters())


def _t5(**settings: Any) -> dict[str, Any]:
    return {"feed_forward_proj": "gated-gelu", "dropout_rate": 0.0, "d_kv": 64, **settings}


def _clip(hidden: int, **settings: Any) -> dict[str, Any]:
    return {
        "vocab_size": 49408,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "projection_dim": hidden,
        "max_position_embeddings": 77,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
        **settings,
    }


# The config.json of each, on https://huggingface.co: google/t5-v1_1-base, -large and -xxl,
# google/umt5-xxl, openai/clip-vit-large-patch14 and laion/CLIP-ViT-bigG-14-laion2B-39B-b160k (their
# text_config), Qwen/Qwen2.5-VL-7B-Instruct (without its vision tower and the positions of images,
# which a text does not have), meta-llama/Meta-Llama-3-8B.
SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            "t5-base",
            "T5EncoderModel",
            _t5(vocab_size=32128, d_model=768, d_ff=2048, num_layers=12, num_heads=12),
        ),
        Shape(
            "t5-large",
            "T5EncoderModel",
            _t5(vocab_size=32128, d_model=1024, d_ff=2816, num_layers=24, num_heads=16),
        ),
        Shape(
            "t5-xxl",
            "T5EncoderModel",
            _t5(vocab_size=32128, d_model=4096, d_ff=10240, num_layers=24, num_heads=64),
        ),
        Shape(
            "umt5-xxl",
            "UMT5EncoderModel",
            _t5(vocab_size=256384, d_model=4096, d_ff=10240, num_layers=24, num_heads=64),
        ),
        Shape(
            "clip-l",
            "CLIPTextModel",
            _clip(768, num_hidden_layers=12, num_attention_heads=12, hidden_act="quick_gelu"),
        ),
        Shape(
            "clip-bigg",
            "CLIPTextModelWithProjection",
            _clip(1280, num_hidden_layers=32, num_attention_heads=20, hidden_act="gelu"),
        ),
        Shape(
            "qwen2.5-vl-7b",
            "Qwen2Model",
            {
                "vocab_size": 152064,
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
                "max_position_embeddings": 128000,
                "rms_norm_eps": 1e-6,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            },
        ),
        Shape(
            "llama-8b",
            "LlamaModel",
            {
                "vocab_size": 128256,
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "max_position_embeddings": 8192,
                "rms_norm_eps": 1e-5,
                "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            },
        ),
    )
}


def place(shape: Shape, folder: Path, dtype: torch.dtype) -> Path:
    """Where in `folder` its checkpoint is."""
    layers = f"-{shape.layers}-layers" if shape.cut else ""
    return folder / f"{shape.name}{layers}-{str(dtype).removeprefix('torch.')}"


def write(shape: Shape, path: Path, dtype: torch.dtype) -> None:
    """Writes a checkpoint of `shape` to `path`; one that is there is kept.

    Its weights are made in `dtype`, so that they are in memory once, and on a GPU where there is
    one, which takes seconds where a CPU takes minutes.

    Raises:
        ValueError: it does not fit in memory, or on the disk.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    size = shape.parameters() * dtype.itemsize
    free = shutil.disk_usage(path.parent).free
    require(f"The weights of {shape.label}", size, psutil.virtual_memory().available, "of memory")
    require(f"The checkpoint of {shape.label}", size, free, "on the disk")
    torch.manual_seed(0)
    unfinished = path.with_name(f"{path.name}.unfinished")
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = shape.model_class._from_config(shape.config, dtype=dtype)
    model.save_pretrained(unfinished)
    unfinished.rename(path)


def require(what: str, size: float, free: float, where: str) -> None:
    """Raises ValueError where `size` bytes are not free."""
    if size > free:
        raise ValueError(
            f"{what} takes {size / 1e9:.1f} GB, but {free / 1e9:.1f} GB {where} are free; "
            "give fewer --layers, fewer --contenders, or a smaller --shape."
        )
