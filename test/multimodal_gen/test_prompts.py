"""Every pipeline's own tokenization of a prompt is something that an encoder on srt takes.

With tiny tokenizers of the kinds that the pipelines have, loaded as the runtime loads them.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from configs import config_classes
from sglang.multimodal_gen.runtime.disaggregation.roles import RoleType
from sglang.multimodal_gen.runtime.loader.component_loaders.component_loader import TokenizerLoader
from sglang.multimodal_gen.runtime.pipelines_core import stages
from sglang.multimodal_gen.runtime.srt_encoder import deployment
from sglang.multimodal_gen.runtime.srt_encoder.checkpoint import Checkpoint
from sglang.multimodal_gen.runtime.srt_encoder.encoder import Noted, SrtTextEncoder
from sglang.multimodal_gen.runtime.srt_encoder.reads import reads_of
from sglang.multimodal_gen.runtime.utils import hf_diffusers_utils
from sglang.srt.encode_only.request import EncoderInfo
from transformers import PixtralImageProcessor, PixtralProcessor

import tiny_tokenizers

TOKENIZERS = {
    "CLIPTextConfig": "clip",
    "SD3CLIPTextConfig": "clip",
    "T5Config": "t5",
    "SD3T5Config": "t5",
    "LlamaConfig": "llama",
    "Gemma2Config": "gemma",
    "Gemma3Config": "gemma",
    "Qwen2_5VLConfig": "qwen",
    "Qwen3TextConfig": "qwen",
    "Reason1Config": "qwen",
    "Mistral3EncoderConfig": "qwen",
    "Flux2MistralTextConfig": "processor",
}
"""By the config of a native encoder, the tokenizer that a pipeline has beside it."""

UNSUPPORTED = {"LTX25PipelineConfig"}
"""srt has no encoder for it."""

PROMPTS = {
    "word": ["fox"],
    "empty": [""],
    "several": ["a red fox in the snow", "fox", ""],
    "long": ["two boats on a lake at dawn " * 400],
}
CHECKPOINT = Checkpoint(
    architecture="Any",
    num_layers=40,
    hidden_size=8,
    vocab_size=10**6,
    max_length=10**6,
    pooled_size=8,
)
INFO = EncoderInfo(
    model="any",
    architecture="Any",
    num_layers=40,
    hidden_size=8,
    vocab_size=10**6,
    max_length=10**6,
    dtype="float32",
    pooled_size=8,
    causal=True,
)

STAGES = Path(*stages.__path__)
DO_MORE = {
    "model_specific_stages/flux3_action.py": "Flux3ActionPipelineConfig",
    "model_specific_stages/flux3_image.py": "Flux3ImagePipelineConfig",
    "model_specific_stages/glm_image.py": "GlmImagePipelineConfig",
    "model_specific_stages/ideogram.py": "Ideogram4PipelineConfig",
    "model_specific_stages/lingbot_video_moe/text_encoding.py": "LingBotVideoMoEPipelineConfig",
    "model_specific_stages/longcat_image.py": "LongCatImagePipelineConfig",
    "model_specific_stages/qwen_image21.py": "QwenImage21PipelineConfig",
    "model_specific_stages/qwen_image_layered.py": "QwenImageLayeredPipelineConfig",
}
"""Stages that use more of a text encoder than its forward pass, and whose they are."""

CONTENT = "{{ message.content if message.content is string else message.content[0].text }}"
"""Of a message that is text, or a list of one text."""


def cases() -> list[tuple[str, int]]:
    """Each pipeline whose prompts srt encodes, and the number of the encoder."""
    found = []
    for name, kind in config_classes().items():
        with contextlib.suppress(TypeError):
            config = kind()
            for i in range(len(getattr(config, "text_encoder_configs", ()))):
                with contextlib.suppress(ValueError):
                    reads_of(config, component(i))
                    found.append((name, i))
    return [case for case in found if case[0] not in UNSUPPORTED]


def component(i: int) -> str:
    return f"text_encoder_{i + 1}" if i else "text_encoder"


def encoder_of(config: Any, i: int) -> SrtTextEncoder:
    return SrtTextEncoder(
        config.text_encoder_configs[i],
        component=component(i),
        encode=None,
        checkpoint=CHECKPOINT,
        reads=reads_of(config, component(i)),
        dtype=torch.float32,
        elsewhere=True,
    )


def write_processor(folder: Path, side: str) -> Path:
    """FLUX.2-dev's kind of tokenizer."""
    tokenizer = tiny_tokenizers.write_qwen_tokenizer(folder)
    tokenizer.chat_template = tiny_tokenizers.CHAT_TEMPLATE.replace(
        "{{ message.content }}", CONTENT
    )
    PixtralProcessor(
        image_processor=PixtralImageProcessor(),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
        image_token="<|image_pad|>",
        image_break_token="<|vision_start|>",
        image_end_token="<|vision_end|>",
    ).save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"padding_side": side}))
    return folder


def load(folder: Path, architecture: str) -> Any:
    """As the runtime does."""
    loader = TokenizerLoader()
    loader.component_architecture = architecture
    return loader.load_customized(str(folder), None, "tokenizer")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("tokenizers")
    for kind in ("clip", "t5", "llama", "gemma", "qwen"):
        getattr(tiny_tokenizers, f"write_{kind}_tokenizer")(root / kind)
    loaded = {kind: load(root / kind, "Tokenizer") for kind in ("clip", "t5", "llama", "gemma")}
    return loaded | {
        "qwen": load(root / "qwen", "Qwen2Tokenizer"),
        "processor": load(write_processor(root / "processor", "right"), "PixtralProcessor"),
    }


def take(name: str, i: int, prompts: list[str], tokenizers: dict[str, Any]) -> None:
    """Raises where the encoder does not take what the pipeline makes of `prompts`."""
    config = config_classes()[name]()
    native = config.text_encoder_configs[i]
    # Some have theirs pad on another side from then on.
    tokenizer = copy.deepcopy(tokenizers[TOKENIZERS[type(native).__name__]])
    extra = config.text_encoder_extra_args
    arguments = native.tokenizer_kwargs | ((extra[i] or {}) if i < len(extra) else {})
    preprocess = config.preprocess_text_funcs[i] or (lambda text: text)
    tokens = config.tokenize_prompt([preprocess(one) for one in prompts], tokenizer, arguments)
    mask = config.get_text_encoder_attention_mask(tokens, i)
    encoder = encoder_of(config, i)
    with encoder.noting() as inputs, contextlib.suppress(Noted):
        encoder(input_ids=tokens["input_ids"], attention_mask=mask)
    for one in inputs:
        one.check(INFO)


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_its_own_tokenization_is_encoded(prompts: list[str], tokenizers: dict[str, Any]) -> None:
    failures = {}
    for case in cases():
        one_by_one = "Hunyuan" in case[0]  # Not padded, so that no call has several.
        try:
            for some in [[one] for one in prompts] if one_by_one else [prompts]:
                take(*case, some, tokenizers)
        except Exception as error:
            failures[case] = f"{type(error).__name__}: {error}"
    assert not failures


@pytest.mark.parametrize(("side", "place"), [("left", "srt"), ("left", "native"), ("right", "srt")])
def test_pads_on_the_left_that_are_read_end_the_start(
    side: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_processor(tmp_path / "tokenizer", side)
    index = {
        "_class_name": "Flux2Pipeline",
        "_diffusers_version": "0.36.0",
        "tokenizer": ["transformers", "PixtralProcessor"],
        "text_encoder": ["transformers", "Mistral3ForConditionalGeneration"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "text_encoder").mkdir()
    config = config_classes()["Flux2PipelineConfig"]()
    config.srt_encoders = place
    server_args: Any = SimpleNamespace(
        model_path=str(tmp_path),
        model_subfolder=None,
        pipeline_class_name="Flux2Pipeline",
        revision=None,
        pipeline_config=config,
        component_paths={},
        component_precisions={},
        disagg_role=RoleType.MONOLITHIC,
        host=None,
        port=30000,
        scheduler_ports=[5555],
        master_port=30005,
        base_gpu_id=0,
    )
    # It has no weights.
    monkeypatch.setattr(hf_diffusers_utils, "maybe_download_model", lambda path, **_: path)
    launched = []
    expected: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if (side, place) == ("left", "srt"):
        expected = pytest.raises(ValueError, match=r"text_encoder=srt: its tokenizer .* left")
    with expected:
        deployment.launch(launched.append, server_args)
    assert bool(launched) == isinstance(expected, contextlib.nullcontext)


def test_stages_that_do_more_than_encode_are_those_of_pipelines_that_are_refused() -> None:
    uses = re.compile(r"text_encoder(?:s\[\w+\])?\.(?!to\b|eval\b|forward\b)[a-z_]\w*\(?")
    found = {
        str(file.relative_to(STAGES))
        for file in STAGES.rglob("*.py")
        if any(uses.search(line) for line in file.read_text().splitlines() if "import" not in line)
    }
    assert found - {"text_encoding.py"} == DO_MORE.keys()
    for name in DO_MORE.values():
        with pytest.raises(ValueError, match=f"{name} .*Leave .* native"):
            reads_of(config_classes()[name](), "text_encoder")
