"""Qwen-Audio: published sizes and ids, the length formula, both ends of a span, tags and ChatML, the official names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from models.architectures.qwen_audio import QwenAudio, between, vocabulary
from models.batch import collate
from models.checkpoints import expected, import_into, map_state
from models.contract import SpeechLLM
from models.encoders import build_encoder
from models.encoders.base import EncoderSpec
from models.objectives import ConnectorCTC
from models.pretrained import load_tokenizer
from models.rendering import IGNORED, Audio, Message, Rendered
from models.sizes import WHISPER_TINY_RANDOM

TOKENIZER = load_tokenizer("bytes")
TOKENIZER.add_tokens(QwenAudio.added_tokens(QwenAudio.preset("tiny")))
QWEN_TOKENS = 151_646  # of Qwen 1.5: 151,643 of its BPE, end of text, start and end of a turn
TRANSCRIBE = "<|startoftranscript|><|en|><|transcribe|><|en|><|notimestamps|><|wo_itn|>"
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


@pytest.fixture(scope="module")
def paper() -> SpeechLLM:
    return QwenAudio.on_meta(QwenAudio.preset("paper"))


@pytest.fixture(scope="module")
def tiny() -> QwenAudio:
    return QwenAudio.build(QwenAudio.preset("tiny"), TOKENIZER, seed=3)


def size(model: SpeechLLM, *groups: str) -> int:
    named = set(model.trained_by(groups))
    return sum(parameter.numel() for name, parameter in model.named_parameters() if name in named)


def clip(frames: int = 8) -> Audio:
    return Audio({"speech": torch.randn(frames, 24)})


def user(text: str, clips: int = 1) -> Message:
    return {"role": "user", "content": [*[{"type": "audio"}] * clips, {"type": "text", "text": text}]}


def says(text: str) -> Message:
    return {"role": "assistant", "content": text}


def shown(rendered: Rendered) -> str:
    """The sequence as text, audio positions as dots."""
    audio = set(rendered.audio_at)
    parts = ["." if at in audio else TOKENIZER.decode([token]) for at, token in enumerate(rendered.ids)]
    return "".join(parts)


# ---- the published numbers -------------------------------------------------------------------------------------------


def test_published_sizes(paper: SpeechLLM) -> None:
    block = 4 * 1280**2 + 3 * 1280 + 2 * 2560 + 2 * 1280 * 5120 + 5120 + 1280
    convolutions = 3 * 80 * 1280 + 1280 + 3 * 1280**2 + 1280
    assert size(paper, "encoder") == convolutions + 32 * block
    assert size(paper, "connector") == 2560 + 1280 * 4096 + 4096  # ln_post, proj
    assert size(paper, "ends") == 2 * 4096
    assert size(paper, "encoder", "connector", "ends") == 640_119_808
    assert paper.llm.get_input_embeddings().weight.shape == (155_947, 4096)
    layer = 4 * 4096**2 + 3 * 4096 + 3 * 4096 * 11008 + 2 * 4096
    assert size(paper, "llm") == 2 * 155_947 * 4096 + 32 * layer + 4096
    total = sum(parameter.numel() for parameter in paper.parameters())
    assert total == 8_394_302_464 + size(paper, "fixed")
    assert size(paper, "fixed") == 1500 * 1280 + 2 * 1280  # positions are constants, the norm stands behind the pooling


def test_stage_one_trains_what_the_official_encoder_holds_and_stage_two_the_rest(paper: SpeechLLM) -> None:
    first, second = QwenAudio.preset("paper").recipe.stages
    assert QwenAudio.preset("paper").recipe.hears == [True, True]
    hearing, speaking = set(paper.trained_by(first.train)), set(paper.trained_by(second.train))
    assert not any(name.startswith("llm.") for name in hearing)
    assert all(name.startswith("llm.") for name in speaking)
    left = {name for name, _ in paper.named_parameters()} - hearing - speaking
    assert left == {
        f"encoders.speech.layers.{n}" for n in ("embed_positions.weight", "layer_norm.weight", "layer_norm.bias")
    }


@pytest.mark.parametrize("samples", [16_000, 16_160, 48_123, 160_000, 479_999, 480_000, 960_000])
def test_tokens_are_those_of_the_official_formula(paper: SpeechLLM, samples: int) -> None:
    mel = min(samples, 480_000) // 160
    frames = (mel - 1) // 2 + 1
    assert paper.encoder("speech").output_length(samples) == frames
    assert paper.audio_tokens({"speech": frames}) == (frames - 2) // 2 + 1 + 2
    if samples >= 480_000:
        assert paper.audio_tokens({"speech": frames}) == 752


def test_added_tokens_have_their_official_ids() -> None:
    added = QwenAudio.added_tokens(QwenAudio.preset("paper"))
    ids = {token: QWEN_TOKENS + place for place, token in enumerate(added)}
    assert len(ids) == len(added) == 155_947 - QWEN_TOKENS
    known = {
        "[[[AUDIO:modality]]]": 151851,
        "<|startoftranscript|>": 151852,
        "<|startofanalysis|>": 151853,
        "<|translate|>": 151854,
        "<|transcribe|>": 151855,
        "<|caption|>": 151856,
        "<|keyword|>": 151857,
        "<|unknown|>": 151858,
        "<|en|>": 151859,
        "<|it|>": 151866,
        "<|zh_tr|>": 151867,
        "<|notimestamps|>": 151868,
        "<|sil|>": 151869,
        "<|timestamps|>": 151870,
        "<|0.00|>": 151871,
        "<|30.00|>": 154871,
        "<|caption_audiocaps|>": 154872,
        "<|caption_clotho|>": 154873,
        "<|audioset_ontology|>": 154874,
        "<|caption_plain|>": 154875,
        "<|itn|>": 154876,
        "<|wo_itn|>": 154877,
        "<|question|>": 155152,
        "<|answer|>": 155153,
        "<|scene|>": 155155,
        "<audio>": 155163,
        "</audio>": 155164,
    }
    assert {token: ids[token] for token in known} == known
    assert set(vocabulary(numbered=False)) < set(added)


# ---- from frames to tokens -------------------------------------------------------------------------------------------


def test_ends_stand_right_at_the_clip_whatever_the_padding() -> None:
    tokens = torch.arange(12.0).reshape(2, 3, 2)
    ends = torch.tensor([[-1.0, -1.0], [-2.0, -2.0]])
    framed, counts = between(tokens, torch.tensor([3, 1]), ends)
    assert counts.tolist() == [5, 3]
    assert framed[0, :, 0].tolist() == [-1, 0, 2, 4, -2]
    assert framed[1, :3, 0].tolist() == [-1, 6, -2]


@torch.no_grad()
def test_pooling_comes_before_the_norm_and_the_encoder_leaves_its_own_out(tiny: QwenAudio) -> None:
    spec = QwenAudio.preset("paper").encoders["speech"]
    assert (spec.layer, spec.window) == (spec.config["encoder_layers"], False)
    norm: Any = tiny.connector.norm
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    last = build_encoder(EncoderSpec(kind="whisper", config=WHISPER_TINY_RANDOM))
    waves = [torch.randn(8000) * 0.1, torch.randn(5000) * 0.1]
    frames = tiny.encoder("speech")(waves)
    layers: Any = last.layers
    assert torch.allclose(layers.layer_norm(frames[0]), last(waves)[0], atol=1e-5)
    lengths = torch.tensor([len(each) for each in frames])
    tokens, counts = tiny.connect({"speech": nn.utils.rnn.pad_sequence(frames, batch_first=True)}, {"speech": lengths})
    proj: Any = tiny.connector.proj
    for each, row, count in zip(frames, tokens, counts, strict=True):
        pooled = functional.avg_pool1d(each.T[None], 2, stride=2)[0].T
        assert int(count) == len(pooled) + 2
        assert torch.allclose(row[1 : int(count) - 1], proj(norm(pooled)), atol=1e-5)
        assert torch.equal(row[[0, int(count) - 1]], tiny.ends.weight)


# ---- sequences -------------------------------------------------------------------------------------------------------


def test_a_request_in_tags_is_one_of_pre_training(tiny: QwenAudio) -> None:
    rendered = tiny.render(TOKENIZER, [user(TRANSCRIBE), says("good day")], [clip()])
    assert shown(rendered) == f"......{TRANSCRIBE}good day<|endoftext|>"
    tags = TOKENIZER.convert_tokens_to_ids(TRANSCRIBE.replace("><", "> <").split())
    assert rendered.ids[6:12] == tags and len(set(tags)) == 5
    answer = [label for label in rendered.labels if label != IGNORED]
    assert TOKENIZER.decode(answer) == "good day<|endoftext|>"
    question = "<|startofanalysis|><|en|><|question|>Who speaks?<|answer|>"
    assert shown(tiny.render(TOKENIZER, [user(question)], [clip(4)])) == f"....{question}"


def test_a_request_in_words_is_a_turn_of_chatml(tiny: QwenAudio) -> None:
    rendered = tiny.render(TOKENIZER, [user("What is said?"), says("good day")], [clip()])
    turn = "<|im_start|>user\nAudio 1:......\nWhat is said?<|im_end|>\n<|im_start|>assistant\n"
    assert shown(rendered) == f"{SYSTEM}{turn}good day<|im_end|>"
    answer = [label for label in rendered.labels if label != IGNORED]
    assert TOKENIZER.decode(answer) == "good day<|im_end|>"
    prompt = tiny.render(TOKENIZER, [user("What is said?")], [clip()])
    assert shown(prompt) == SYSTEM + turn


def test_clips_are_counted_within_a_turn_and_earlier_answers_are_read(tiny: QwenAudio) -> None:
    messages = [user("Compare.", clips=2), says("Louder."), user("And this?"), says("Quiet.")]
    rendered = tiny.render(TOKENIZER, messages, [clip(2), clip(4), clip(6)])
    first = (
        "<|im_start|>user\nAudio 1:...\nAudio 2:....\nCompare.<|im_end|>\n<|im_start|>assistant\nLouder.<|im_end|>\n"
    )
    second = "<|im_start|>user\nAudio 1:.....\nAnd this?<|im_end|>\n<|im_start|>assistant\nQuiet.<|im_end|>"
    assert shown(rendered) == SYSTEM + first + second
    assert rendered.clip_tokens == [3, 4, 5]
    assert TOKENIZER.decode([label for label in rendered.labels if label != IGNORED]) == "Quiet.<|im_end|>"


def test_answers_end_with_any_of_the_three_marks(tiny: QwenAudio) -> None:
    ends = tiny.end_tokens(TOKENIZER)
    assert TOKENIZER.convert_ids_to_tokens(ends) == ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]


# ---- files -----------------------------------------------------------------------------------------------------------


def official(blocks: int, layers: int) -> dict[str, tuple[str, ...]]:
    """Official name → ours: fact sheet, section 3A (7), with the biases that the modules have."""
    theirs, ours = "transformer.audio.", "encoders.speech.layers."
    found: dict[str, tuple[str, ...]] = {f"{theirs}positional_embedding": (f"{ours}embed_positions.weight",)}
    found[f"{theirs}audio_bos_eos_token.weight"] = ("ends.weight",)
    pairs: list[tuple[str, tuple[str, ...]]] = [(f"{theirs}conv{i}", (f"{ours}conv{i}",)) for i in (1, 2)]
    pairs += [(f"{theirs}ln_post", ("connector.norm",)), (f"{theirs}proj", ("connector.proj",))]
    names = {"attn.query": "self_attn.q_proj", "attn.value": "self_attn.v_proj", "attn.out": "self_attn.out_proj"}
    names |= {"attn_ln": "self_attn_layer_norm", "mlp.0": "fc1", "mlp.2": "fc2", "mlp_ln": "final_layer_norm"}
    for i in range(blocks):
        pairs += [(f"{theirs}blocks.{i}.{name}", (f"{ours}layers.{i}.{own}",)) for name, own in names.items()]
        found[f"{theirs}blocks.{i}.attn.key.weight"] = (f"{ours}layers.{i}.self_attn.k_proj.weight",)
    plain = {"attn.c_proj": "self_attn.o_proj", "mlp.w1": "mlp.up_proj", "mlp.w2": "mlp.gate_proj"}
    plain |= {"mlp.c_proj": "mlp.down_proj", "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm"}
    for i in range(layers):
        at = f"llm.model.layers.{i}"
        pairs.append((f"transformer.h.{i}.attn.c_attn", tuple(f"{at}.self_attn.{part}_proj" for part in "qkv")))
        found |= {f"transformer.h.{i}.{name}.weight": (f"{at}.{own}.weight",) for name, own in plain.items()}
    found |= {f"{name}.{end}": tuple(f"{o}.{end}" for o in own) for name, own in pairs for end in ("weight", "bias")}
    whole = {
        "transformer.wte": "llm.model.embed_tokens",
        "transformer.ln_f": "llm.model.norm",
        "lm_head": "llm.lm_head",
    }
    return found | {f"{name}.weight": (f"{own}.weight",) for name, own in whole.items()}


def untied() -> QwenAudio:
    """Tiny, with as many key and value heads as query heads and an output table of its own, as Qwen-7B has them."""
    preset = QwenAudio.preset("tiny")
    config = preset.backbone.config | {"num_key_value_heads": 4, "tie_word_embeddings": False}
    backbone = preset.backbone.model_copy(update={"config": config})
    return QwenAudio.build(preset.model_copy(update={"backbone": backbone}), TOKENIZER, seed=3)


def test_the_official_file_arrives_tensor_by_tensor(tmp_path: Path) -> None:
    model, names = untied(), official(2, 2)
    ours = model.state_dict()
    generator = torch.Generator().manual_seed(5)
    state: dict[str, Tensor] = {}
    for name, own in names.items():
        shape = ours[own[0]].shape
        state[name] = torch.randn(len(own) * shape[0], *shape[1:], generator=generator)
    rotary = {"transformer.h.0.attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(state | rotary, tmp_path / "model.safetensors")
    assert QwenAudio.checkpoint is not None
    report = import_into(model, QwenAudio.checkpoint, tmp_path / "model.safetensors")
    after = model.state_dict()
    for name, own in names.items():
        for part, value in zip(own, state[name].chunk(len(own)), strict=True):
            assert torch.equal(after[part], value), part
    left = {name for name, _ in model.named_parameters()} - set(report.loaded)
    assert left == {"encoders.speech.layers.layer_norm.weight", "encoders.speech.layers.layer_norm.bias"}
    assert report.fits and report.ignored == tuple(rotary)
    # the official block: c_proj(w1(x) * silu(w2(x)))
    x, at = torch.randn(3, 32), "transformer.h.1.mlp"
    half = functional.silu(x @ state[f"{at}.w2.weight"].T)
    expected_output = (x @ state[f"{at}.w1.weight"].T * half) @ state[f"{at}.c_proj.weight"].T
    mlp: Any = model.llm.get_decoder().layers[1].mlp
    assert torch.allclose(mlp(x), expected_output, rtol=1e-4, atol=1e-4)


def test_a_file_of_the_published_size_is_expected_whole(paper: SpeechLLM) -> None:
    ours, names = paper.state_dict(), official(32, 32)
    shapes = {name: (len(own) * ours[own[0]].shape[0], *ours[own[0]].shape[1:]) for name, own in names.items()}
    assert shapes["transformer.h.31.attn.c_attn.weight"] == (3 * 4096, 4096)
    assert shapes["transformer.wte.weight"] == shapes["lm_head.weight"] == (155_947, 4096)
    assert QwenAudio.checkpoint is not None
    with torch.device("meta"):
        mapped, unexpected = map_state(QwenAudio.checkpoint, {n: torch.empty(shape) for n, shape in shapes.items()})
    assert unexpected == []
    assert all(ours[name].shape == value.shape for name, value in mapped.items())
    positions = "encoders.speech.layers.embed_positions.weight"
    assert set(mapped) == expected(paper, QwenAudio.checkpoint) | {positions}
    assert sum(value.numel() for value in mapped.values()) - mapped[positions].numel() == 8_394_302_464


@pytest.mark.parametrize("request_text", [TRANSCRIBE, "What is said?"])
def test_ctc_leaves_out_the_end_whichever_token_it_is(tiny: QwenAudio, request_text: str) -> None:
    """Tagged answers end with <|endoftext|>, those of a chat with <|im_end|>: neither is spoken."""
    audio = clip(40)
    rendered = tiny.render(TOKENIZER, [user(request_text), says("yes")], [audio])
    spoken = sum(label != IGNORED for label in rendered.labels) - 1
    assert spoken == len("yes")
    batch = collate([(rendered, [audio])], TOKENIZER.pad_token_id)
    vocabulary_ids = torch.tensor(sorted({*rendered.labels, TOKENIZER.eos_token_id} - {IGNORED}))
    _, counted = ConnectorCTC(vocabulary_ids, TOKENIZER.eos_token_id)(tiny, batch)
    assert int(counted) == spoken
