"""What a stage encodes goes to each encoder in one call, and to encoders on servers at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from families import FAMILIES
from relay import Relay
from sglang.multimodal_gen.configs.models.encoders import T5Config
from sglang.multimodal_gen.runtime.cache.conditioning import ConditioningCache
from sglang.multimodal_gen.runtime.managers.memory_managers.component_manager import (
    ComponentResidencyManager,
    ComponentUse,
)
from sglang.multimodal_gen.runtime.platforms.plugins import apply_plugin_hooks
from sglang.multimodal_gen.runtime.srt_encoder import together
from sglang.multimodal_gen.runtime.srt_encoder.checkpoint import Checkpoint
from sglang.multimodal_gen.runtime.srt_encoder.early import Early
from sglang.multimodal_gen.runtime.srt_encoder.encoder import EncoderError, SrtTextEncoder
from sglang.multimodal_gen.runtime.srt_encoder.reads import Reads, reads_of
from sglang.multimodal_gen.runtime.srt_encoder.servers import EncodeServers
from sglang.srt.encode_only.in_process import InProcessEncoder
from sglang.srt.encode_only.local_server import LocalServer
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


def test_prompts_that_wait_are_not_encoded_where_they_come_as_others(make) -> None:
    """As those of a pipeline whose first stage writes them anew."""
    made = make(True)
    for encoder, asked in zip(made.stage.text_encoders, made.asked, strict=True):
        encoder._encode = Early(cast("Any", lambda inputs, _, asked=asked: asked(inputs)))
    made.stage.forward(request("a fox", None), made.server_args)
    for came in ("two boats", ["two boats"], "two boats at dawn"):
        assert together.elsewhere().keys() == {0, 1, 2}
        waiting = request("two boats", None)
        waiting.request_id = "boats"
        together.lead([waiting], [0])
        waiting.prompt = came
        made.stage.forward(waiting, made.server_args)
    assert not together.elsewhere()


def test_the_order_in_which_components_are_used_is_the_stage_s(make) -> None:
    """By it, what comes next is brought to the device."""
    made = make(True)
    later = ComponentUse("denoise", "transformer", memory_intensive=True)
    denoise = SimpleNamespace(component_uses=lambda *_: [later])
    modules = dict(zip(FAMILIES["SD3"].components, made.stage.text_encoders, strict=True))
    pipeline: Any = SimpleNamespace(
        component_residency_strategies={},
        modules=modules,
        _stage_name_mapping={"text": made.stage, "denoise": denoise},
    )
    manager = ComponentResidencyManager(pipeline, made.server_args)
    manager.refresh_pipeline(pipeline)
    one = request("a fox", None)
    stages: Any = [made.stage, denoise]
    manager.begin_request(stages, one, made.server_args)
    manager.before_stage(made.stage, 0, one, made.server_args)
    made.stage.set_component_residency_manager(manager)
    made.stage.forward(one, made.server_args)
    assert made.calls() == [[1]] * 3
    assert manager.state.future_uses == (later,)


def test_a_start_up_s_warm_up_waits_for_servers_that_are_started_with_it(
    t5_folder: Path, t5_server: LocalServer
) -> None:
    """Its failure would end the start. Any other request is told at once."""
    relay = Relay()
    checkpoint = Checkpoint.read(str(t5_folder))
    encoder = SrtTextEncoder(
        T5Config(),
        component="text_encoder",
        encode=Early(EncodeServers("text_encoder", [relay.url], checkpoint, WAIT)),
        checkpoint=checkpoint,
        reads=Reads(last=True),
        dtype=torch.float32,
        elsewhere=True,
    )
    stage: Any = SimpleNamespace(text_encoders=[encoder])

    def encode(self: Any, batch: Any, server_args: Any) -> Any:
        return encoder(input_ids=torch.tensor([[3, 4, 1]])).last_hidden_state

    asked = request("a fox", None)
    for warmup in ({}, {"is_warmup": True}):
        vars(asked).update(warmup)
        with pytest.raises(EncoderError, match="refused"):
            together.one(encode, stage, asked, None)
    asked.extra["server_based_warmup"] = True
    with ThreadPoolExecutor(1) as pool:
        warm = pool.submit(together.one, encode, stage, asked, None)
        time.sleep(0.5)
        assert not warm.done()
        with relay.to(t5_server.url):
            assert warm.result().shape == (1, 3, encoder.checkpoint.hidden_size)
    with pytest.raises(EncoderError, match="refused"):
        together.one(encode, stage, request("a fox", None), None)


def test_a_prompt_that_is_refused_fails_alone(make) -> None:
    stage = make(False)
    t5 = stage.stage.tokenizers[2]
    t5.add_tokens(["<unheard-of>"])
    with pytest.raises(EncoderError, match=r"text_encoder_3 on srt refused .*: Input 0: Token"):
        stage.run("a fox", "<unheard-of>")
    stage.run("a fox", "two boats")
