"""What `--srt-encoders` may say, and what it then means."""

from __future__ import annotations

import pytest
from sglang.multimodal_gen.runtime.srt_encoder.placement import (
    Beside,
    InWorker,
    Native,
    Option,
    Placements,
    Servers,
    read,
)

FLUX = {"text_encoder": "CLIPTextModel", "text_encoder_2": "T5EncoderModel"}
MIXED = {"text_encoder": "Gemma4UnifiedModel", "text_encoder_2": "T5EncoderModel"}
"""The first of a class that srt does not serve."""
ONE, TWO = "http://10.0.0.7:30000", "https://encoders.example/t5"


@pytest.mark.parametrize(
    ("option", "read_as"),
    [
        ("native", Placements(Native())),
        ("srt", Placements(InWorker())),
        (["srt"], Placements(InWorker())),
        ("server", Placements(Beside())),
        ("text_encoder=server:30010", Placements(None, {"text_encoder": Beside(30010)})),
        (ONE, Placements(Servers((ONE,)))),
        (f"{ONE}/,{TWO}", Placements(Servers((ONE, TWO)))),
        ("http://[::1]:30000", Placements(Servers(("http://[::1]:30000",)))),
        # As a worker is told where such a server is.
        (
            f"text_encoder=server:{ONE}",
            Placements(None, {"text_encoder": Servers((ONE,), local=True)}),
        ),
        (
            f"text_encoder=srt text_encoder_2={ONE},{TWO}",
            Placements(None, {"text_encoder": InWorker(), "text_encoder_2": Servers((ONE, TWO))}),
        ),
        (
            ["srt", "text-encoder-2=native"],
            Placements(InWorker(), {"text_encoder_2": Native()}),
        ),
        (
            {"text_encoder": "native", "text_encoder_2": [ONE, TWO]},
            Placements(None, {"text_encoder": Native(), "text_encoder_2": Servers((ONE, TWO))}),
        ),
    ],
)
def test_every_form_is_read(option: Option, read_as: Placements):
    assert read(option) == read_as


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("sgl", "'sgl' is no place for a text encoder; give native, srt, server"),
        ("text_encoder=gpu", "--srt-encoders text_encoder=: 'gpu' is no place"),
        ("server:0", "'server:0': a port is a number of 1 to 65535"),
        ("server:65536", "'server:65536': a port is"),
        ("server:", "'server:' is no place"),
        ("servers", "'servers' is no place"),
        ("text_encoder=", "--srt-encoders text_encoder=: '' is no place"),
        ("10.0.0.7:30000", "without its scheme; write http://10.0.0.7:30000"),
        ("text_encoder=localhost:30000", "without its scheme; write http://localhost:30000"),
        (f"{ONE},localhost:30000", "without its scheme; write http://localhost:30000"),
        ("ftp://10.0.0.7", "'ftp://10.0.0.7' is no place"),
        ("http://", "'http://' is no place"),
        ("http://10.0.0.7:0", "'http://10.0.0.7:0' is no place"),
        ("http://10.0.0.7:3OOOO", "or the port of 'http://10.0.0.7:3OOOO' cannot be read"),
        ("text_encoder=http://localhost:99999", "text_encoder=: the host or the port of"),
        ("http://[::1", "the host or the port of 'http://\\[::1' cannot be read"),
        ("text_encoder=srt text_encoder=native", "a place for text_encoder twice"),
        ("text_encoder=srt text-encoder=srt", "a place for text_encoder twice"),
        ("srt native", "a place for every encoder twice"),
        ([1], r"got \[1\]; give native, srt, server"),
        (3, "got 3; give native, srt, server"),
        ({"text_encoder": True}, "got True; give native, srt, server"),
    ],
)
def test_what_is_no_place_is_refused(option: Option, message: str):
    with pytest.raises(ValueError, match=message):
        read(option)


def test_nobody_is_shown_a_password():
    place = "http://user:p@ss@10.0.0.7:30000,https://:key@encoders.example/t5"
    (servers,) = (read(place).every,)
    assert isinstance(servers, Servers) and "p@ss" in servers.urls[0]
    assert str(servers) == "srt at http://10.0.0.7:30000, https://encoders.example/t5"
    for said in (place, f"text_encoder={place}", f"{place},ftp://user:p@ss@10.0.0.7"):
        with pytest.raises(ValueError, match="--srt-encoders") as raised:
            read(said).check("mixed", {"text_encoder": "Gemma4UnifiedModel"})
        assert "ss@" not in str(raised.value) and "key" not in str(raised.value)


@pytest.mark.parametrize(
    ("option", "places"),
    [
        ("srt", (Native(), InWorker())),
        ("native", (Native(), Native())),
        ("text_encoder_2=srt", (Native(), InWorker())),
        ("text_encoder=native", (Native(), Native())),
        (f"srt text_encoder_2={ONE}", (Native(), Servers((ONE,)))),
        ("server", (Native(), Beside())),
    ],
)
def test_a_place_for_every_encoder_is_for_those_that_srt_serves(option: Option, places: tuple):
    placements = read(option)
    placements.check("mixed", MIXED)
    assert tuple(placements.of(*encoder) for encoder in MIXED.items()) == places


@pytest.mark.parametrize(
    ("option", "native"),
    [
        ("native", True),
        ({}, True),
        ("native text_encoder_2=native", True),
        ("native text_encoder_2=srt", False),
        (ONE, False),
    ],
)
def test_whether_all_is_as_stock_has_it(option: Option, native: bool):
    assert read(option).native == native


def test_srt_serves_every_encoder_of_flux():
    placements = read("srt")
    placements.check("flux", FLUX)
    assert [placements.of(*encoder) for encoder in FLUX.items()] == [InWorker()] * 2


def test_a_url_for_the_encoder_that_is_left():
    placements = read(f"{ONE} text_encoder=srt")
    placements.check("flux", FLUX)
    assert placements.of("text_encoder_2", FLUX["text_encoder_2"]) == Servers((ONE,))


@pytest.mark.parametrize(
    ("option", "encoders", "message"),
    [
        (
            "text_encoder_3=srt",
            FLUX,
            "'text_encoder_3', but the text encoders of flux are text_encoder, text_encoder_2",
        ),
        ("vae=native", FLUX, "a place for 'vae', but the text encoders"),
        ("text_encoder=srt", MIXED, "text_encoder=srt: srt does not serve Gemma4UnifiedModel. It"),
        (f"text_encoder={ONE}", MIXED, "does not serve Gemma4UnifiedModel"),
        ("server:30010", FLUX, "gives one port to several servers; give each its own"),
        ("text_encoder=server:1 text_encoder_2=server:1", FLUX, "one port to several servers"),
        ("text_encoder=server", MIXED, "text_encoder=server: srt does not serve Gemma4Unified"),
        (
            "srt",
            {"text_encoder": "Gemma4UnifiedModel"},
            r"none of the text encoders of flux: text_encoder \(Gemma4UnifiedModel\)",
        ),
        (ONE, {}, "none of the text encoders of flux: none"),
        (
            f"{ONE},{TWO}",
            FLUX,
            "is for text_encoder, text_encoder_2 of flux, but a server has one encoder. Give each",
        ),
    ],
)
def test_what_does_not_fit_the_pipeline_is_refused(
    option: Option, encoders: dict[str, str], message: str
):
    with pytest.raises(ValueError, match=message):
        read(option).check("flux", encoders)
