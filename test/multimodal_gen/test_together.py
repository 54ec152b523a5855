"""What a stage encodes goes to each encoder in one call, and to encoders on servers at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from sglang.multimodal_gen.runtime.cache.conditioning import ConditioningCache
from sglang.multimodal_gen.runtime.platforms.plugins import apply_plugin_hooks
from sglang.multimodal_gen.runtime.srt_encoder import together
from sglang.multimodal_gen.runtime.srt_encoder.checkpoint import Checkpoint
from sglang.multimodal_gen.runtime.srt_encoder.encoder import EncoderError, SrtTextEncoder
from sglang.multimodal_gen.runtime.srt_encoder.reads import reads_of
from sglang.srt.encode_only.in_process import InProcessEncoder
from sglang.srt.encode_only.request import EncodeInput, EncodeOutput
from transformers import AutoTokenizer

WAIT = 60.0


class Asked:
    """Who encodes for one component, and what it was asked."""

    def __init__(self, folder: Path, meeting: threading.Barrier | None = None):
        self.encoder = InProcessEncoder(str(folder), dtype=torch.float32, device="cpu")
        self.meeting = meeting
        self.calls: list[int] = []

    def __call__(self, inputs: list[EncodeInput]) -> list[EncodeOutput]:
        self.calls.append(len(inputs))
        if self.meeting is not None:
            self.meeting.wait(WAIT)
        return self.encoder.encode(inputs)


class Stage:
    """The stage of the tiny SD3, with its three encoders."""

    def __init__(self, folder: Path, elsewhere: bool, meeting: threading.Barrier | None = None):
        from sglang.multimodal_gen.runtime.pipelines_core.stages.text_encoding import (
            TextEncodingStage,
        )
        from sglang.multimodal_gen.runtime.server_args import ServerArgs, set_global_server_args

        self.server_args = ServerArgs.from_kwargs(
            model_path=str(folder), **FAMILIES["SD3"].options, srt_encoders="srt"
        )
        set_global_server_args(self.server_args)
        config = self.server_args.pipeline_config
        self.asked = []
        encoders = []
        for component, native in zip(
            FAMILIES["SD3"].components, config.text_encoder_configs, strict=True
        ):
            checkpoint = Checkpoint.read(str(folder / component))
            self.asked.append(Asked(folder / component, meeting))
            encoder = SrtTextEncoder(
                native,
                component=component,
                encode=self.asked[-1],
                checkpoint=checkpoint,
                reads=reads_of(config, component),
                dtype=torch.float32,
                elsewhere=elsewhere,
            )
            encoders.append(encoder.eval())
        tokenizers = [
            AutoTokenizer.from_pretrained(folder / component.replace("text_encoder", "tokenizer"))
            for component in FAMILIES["SD3"].components
        ]
        self.stage = TextEncodingStage(encoders, tokenizers)

    def run(self, *prompts: str, negative: str | None = None) -> list:
        return self.stage.run_grouped_requests(
            [request(prompt, negative) for prompt in prompts], self.server_args
        )

    def calls(self) -> list[list[int]]:
        """How many inputs each call of each encoder had; then forgets them."""
        calls = [asked.calls.copy() for asked in self.asked]
        for asked in self.asked:
            asked.calls.clear()
        return calls


def request(prompt: str, negative: str | None):
    from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
    from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req

    made = Req(sampling_params=SamplingParams(prompt=prompt, negative_prompt=negative))
    made.do_classifier_free_guidance = negative is not None
    return made


@pytest.fixture
def make(family_folders: dict[str, Path]) -> Iterator[Callable[..., Stage]]:
    apply_plugin_hooks()
    made: list[Stage] = []

    def make(elsewhere: bool, meeting: threading.Barrier | None = None) -> Stage:
        made.append(Stage(family_folders["SD3"], elsewhere, meeting))
        return made[-1]

    with torch.no_grad():
        yield make
    for stage in made:
        for asked in stage.asked:
            asked.encoder.close()


@pytest.mark.parametrize("elsewhere", [True, False], ids=["on servers", "in the worker"])
def test_a_batch_of_requests_is_one_call_an_encoder(make, elsewhere: bool) -> None:
    stage = make(elsewhere)
    together = stage.run("a fox", "two boats", "a fox", "a stormy sea", negative="blurry")
    assert stage.calls() == [[4]] * 3
    for one, prompt in zip(together, ("a fox", "two boats", "a fox", "a stormy sea"), strict=True):
        (alone,) = stage.run(prompt, negative="blurry")
        for field in ("prompt_embeds", "pooled_embeds", "negative_prompt_embeds"):
            for found, expected in zip(getattr(one, field), getattr(alone, field), strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-6)
    assert stage.calls() == [[2] * 4] * 3


def test_encoders_on_servers_work_at_the_same_time(make) -> None:
    """Each waits until all three have been asked."""
    stage = make(True, threading.Barrier(3))
    stage.run("a fox")
    assert stage.calls() == [[1]] * 3


def test_what_the_cache_holds_is_not_asked_for(make) -> None:
    stage = make(True)
    with ConditioningCache(1 << 24).scope():
        stage.run("a fox", negative="blurry")
        assert stage.calls() == [[2]] * 3
        stage.run("a fox", "two boats", negative="blurry")
        assert stage.calls() == [[1]] * 3
        stage.run("a fox", negative="blurry")
        assert stage.calls() == [[]] * 3


def test_a_stage_that_changes_prompts_is_asked_for_what_it_makes_of_them(make) -> None:
    """Not for the prompts as they came."""
    from sglang.multimodal_gen.runtime.pipelines_core.stages import text_encoding

    class Changing(text_encoding.TextEncodingStage):
        deduplicated_output_fields = ()

        def forward(self, batch, server_args):
            batch.prompt = f"{batch.prompt}, at dawn"
            return super().forward(batch, server_args)

    made = make(True)
    plain = make(True)
    made.stage = Changing(made.stage.text_encoders, made.stage.tokenizers)
    found = made.run("a fox", "two boats", negative="blurry")
    assert made.calls() == [[2, 2]] * 3 and not together.elsewhere()
    for one, prompt in zip(found, ("a fox, at dawn", "two boats, at dawn"), strict=True):
        (alone,) = plain.run(prompt, negative="blurry")
        torch.testing.assert_close(one.prompt_embeds, alone.prompt_embeds, rtol=1e-5, atol=5e-6)


def test_a_prompt_that_is_refused_fails_alone(make) -> None:
    stage = make(False)
    t5 = stage.stage.tokenizers[2]
    t5.add_tokens(["<unheard-of>"])
    with pytest.raises(EncoderError, match="text_encoder_3 on srt: Input 0: Token id"):
        stage.run("a fox", "<unheard-of>")
    stage.run("a fox", "two boats")
