"""Numbers of the fact sheets, computed on the meta device: nothing is downloaded, nothing takes memory."""

from __future__ import annotations

import pytest

from models.architectures import load
from models.contract import SpeechLLM
from models.encoders import build_encoder


def trainable(model: SpeechLLM, *groups: str) -> int:
    named = set(model.freeze(groups))
    return sum(p.numel() for name, p in model.named_parameters() if name in named)


@pytest.fixture(scope="module")
def paper() -> dict[str, SpeechLLM]:
    return {name: load(name).on_meta(load(name).preset("paper")) for name in ("funasr_llm", "salmonn", "speechgpt")}


def test_salmonn_trains_33_332_992(paper: dict[str, SpeechLLM]) -> None:
    model = paper["salmonn"]
    assert trainable(model, "connector", "lora") == 33_332_992
    assert trainable(model, "lora") == 6_553_600
    sizes = {name: p.numel() for name, p in model.connector.named_parameters()}
    assert sum(n for name, n in sizes.items() if name.startswith("qformer.encoder")) == 22_835_712
    assert sum(n for name, n in sizes.items() if name.startswith("qformer.layernorm")) == 1_536
    assert sizes["query_tokens"] == 768
    assert sum(n for name, n in sizes.items() if name.startswith("proj")) == 3_937_280
    assert sum(n for name, n in sizes.items() if name.startswith("ln_")) == 4_096


def test_salmonn_gives_88_tokens_a_clip(paper: dict[str, SpeechLLM]) -> None:
    spec = load("salmonn").preset("paper").without_weights().encoders["speech"]
    import torch

    with torch.device("meta"):
        whisper = build_encoder(spec)
    for seconds in (1, 10, 30):
        assert whisper.output_length(seconds * 16_000) == 1500
        assert paper["salmonn"].audio_tokens({"speech": 1500, "audio": 50 * seconds}) == 88


def test_funasr_adaptor_has_21_50_million_and_ten_tokens_a_second(paper: dict[str, SpeechLLM]) -> None:
    model = paper["funasr_llm"]
    assert trainable(model, "connector") == 21_501_952
    assert trainable(model, "lora") == 8_388_608  # r 16 on q and v of 32 layers of width 4096
    assert model.audio_tokens({"speech": 1500}) == 300


def test_speechgpt_backbone_has_6_746_656_768_with_33_006_tokens(paper: dict[str, SpeechLLM]) -> None:
    model = paper["speechgpt"]
    assert model.llm.config.vocab_size == 33_006
    assert trainable(model, "llm") == 6_746_656_768
    assert trainable(model, "lora") == 4_194_304
