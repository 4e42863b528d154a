"""LTU and LTU-AS: published counts and recipes, audio before BOS, loss on the prompt, the transcript as text, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from models.architectures import load
from models.architectures.ltu import LTU, alpaca, over_frequency
from models.architectures.ltu_as import LTUAS
from models.batch import collate
from models.checkpoints import expected, import_into, map_state
from models.connectors.tltr import TLTR
from models.contract import SpeechLLM
from models.encoders import build_encoder
from models.encoders.base import EncoderSpec
from models.preset import LoRA
from models.pretrained import load_tokenizer
from models.rendering import IGNORED, Audio, Message
from models.sizes import WHISPER_TINY_RANDOM

TOKENIZER = load_tokenizer("bytes")
BOS, EOS = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id


def size(model: SpeechLLM, *groups: str) -> int:
    named = set(model.trained_by(groups))
    return sum(parameter.numel() for name, parameter in model.named_parameters() if name in named)


@pytest.fixture(scope="module")
def papers() -> dict[str, SpeechLLM]:
    return {name: load(name).on_meta(load(name).preset("paper")) for name in ("ltu", "ltu_as")}


@pytest.fixture(scope="module")
def ltu() -> LTU:
    return LTU.build(LTU.preset("tiny"), TOKENIZER, seed=3)


@pytest.fixture(scope="module")
def ltu_as() -> LTUAS:
    return LTUAS.build(LTUAS.preset("tiny"), TOKENIZER, seed=3)


def asked(request: str, answer: str | None = None) -> list[Message]:
    user: Message = {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": request}]}
    return [user] if answer is None else [user, {"role": "assistant", "content": answer}]


def heard(text: str, frames: int = 5) -> Audio:
    """A clip for LTU-AS's tiny preset with a transcript of our own."""
    data = torch.zeros(len(text.encode()) + 7, 1)
    data[: len(text.encode()), 0] = torch.tensor(list(text.encode()), dtype=torch.float32)
    return Audio({"speech": torch.randn(frames, 48), "transcript": data})


# ---- the published numbers -------------------------------------------------------------------------------------------


def test_ltu_trains_93_065_216_of_6_831_480_832(papers: dict[str, SpeechLLM]) -> None:
    model = papers["ltu"]
    assert size(model, "connector") == 3_149_824
    assert size(model, "encoder") == 85_721_088
    assert size(model, "lora") == 4_194_304
    assert size(model, "connector", "encoder", "lora") == 93_065_216
    assert sum(parameter.numel() for parameter in model.parameters()) == 6_831_480_832


def test_ltu_as_trains_48_793_600_of_6_787_209_216_beside_whisper(papers: dict[str, SpeechLLM]) -> None:
    model = papers["ltu_as"]
    assert size(model, "connector") == 5_246_976
    assert size(model, "tltr") == 39_352_320
    assert size(model, "connector", "tltr", "lora") == 48_793_600
    beside = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("encoders."))
    assert beside == 6_787_209_216
    groups = model.parameter_groups()
    names = [name for members in groups.values() for name in members]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    connector = model.connector
    assert isinstance(connector, TLTR)
    assert (connector.time_tr.attn.heads, connector.layer_tr.attn.heads) == (1, 8)


@pytest.mark.parametrize("seconds", [1, 10, 60])
def test_a_clip_has_32_or_25_tokens_however_long(papers: dict[str, SpeechLLM], seconds: int) -> None:
    for name, tokens in (("ltu", 32), ("ltu_as", 25)):
        model = papers[name]
        frames = {role: model.encoder(role).output_length(16_000 * seconds) for role in model.encoders}
        assert model.audio_tokens(frames) == tokens
    assert papers["ltu"].encoder("audio").output_length(16_000 * seconds) == 512


def test_recipes_are_those_of_the_scripts() -> None:
    ltu = LTU.preset("paper").recipe
    assert [stage.name for stage in ltu.stages] == ["proj_cla", "all_cla", "all_close", "all_mix"]
    assert [stage.optimiser.lr for stage in ltu.stages] == [1e-3, 1e-4, 1e-4, 1e-4]
    assert [stage.epochs for stage in ltu.stages] == [2, 2, 1, 1]
    assert [stage.train for stage in ltu.stages] == [("connector",)] + 3 * [("connector", "encoder", "lora")]
    assert ltu.hears == [False, True, True, True]
    ltu_as = LTUAS.preset("paper").recipe
    assert [stage.optimiser.lr for stage in ltu_as.stages] == [1e-3, 2e-4, 2e-4]
    assert [stage.epochs for stage in ltu_as.stages] == [2, 2, 1]
    assert [stage.train for stage in ltu_as.stages] == [("connector",)] + 2 * [("connector", "tltr", "lora")]
    assert not any(ltu_as.hears)
    for recipe, tokens in ((ltu, 140), (ltu_as, 133)):  # 108 of text, and the audio
        for stage in recipe.stages:
            step = stage.optimiser
            assert (step.warmup, step.schedule, step.clip, step.weight_decay) == (100, "linear", 1.0, 0.0)
            assert (stage.max_tokens, stage.batch_tokens) == (tokens, 256 * tokens)


# ---- sequences -------------------------------------------------------------------------------------------------------


def test_audio_stands_before_bos_and_the_prompt_is_learnt(ltu: LTU) -> None:
    clip = Audio({"audio": torch.randn(16, 32)})
    rendered = ltu.render(TOKENIZER, asked("Name the room.", "kitchen"), [clip])
    assert rendered.audio_at == [0, 1, 2, 3] and rendered.ids[4] == BOS
    assert rendered.labels[:5] == [IGNORED] * 5
    assert rendered.labels[5:] == rendered.ids[5:]
    assert rendered.ids[-1] == EOS
    text = "### Instruction:\nName the room.\n\n### Response:\nkitchen"
    assert TOKENIZER.decode(rendered.ids[5:-1]) == text
    assert alpaca("Q", "words") == "### Instruction:\nQ\n\n### Input:\nwords\n\n### Response:\n"


def test_small_learns_answers_alone() -> None:
    tiny = LTU.preset("tiny")
    assert LTU.preset("small").connector["learn_prompt"] is False
    changed = tiny.model_copy(update={"connector": tiny.connector | {"learn_prompt": False}})
    model = LTU.build(changed, TOKENIZER, encoders=False)
    rendered = model.render(TOKENIZER, asked("Name it.", "hall"), [Audio({"audio": torch.randn(16, 32)})])
    assert TOKENIZER.decode([label for label in rendered.labels[:-1] if label != IGNORED]) == "hall"


def test_the_transcript_is_text_in_the_input_block(ltu_as: LTUAS) -> None:
    said = "turn it on"
    rendered = ltu_as.render(TOKENIZER, asked("What is meant?", "a lamp"), [heard(said)])
    text = f"### Instruction:\nWhat is meant?\n\n### Input:\n{said}\n\n### Response:\na lamp"
    assert rendered.audio_at == [0, 1, 2, 3, 4] and rendered.ids[5] == BOS
    assert TOKENIZER.decode(rendered.ids[6:-1]) == text
    assert rendered.labels[6:] == rendered.ids[6:]


@pytest.mark.parametrize("nothing", ["", "Thanks for watching!"])
def test_without_words_there_is_no_input_block(ltu_as: LTUAS, nothing: str) -> None:
    rendered = ltu_as.render(TOKENIZER, asked("What is it?"), [heard(nothing)])
    assert TOKENIZER.decode(rendered.ids[6:]) == "### Instruction:\nWhat is it?\n\n### Response:\n"


@torch.no_grad()
def test_the_transcript_takes_no_part_in_connecting(ltu_as: LTUAS) -> None:
    clips = [heard("one"), heard("one and more")]
    lengths = {"speech": torch.tensor([5]), "transcript": torch.tensor([9])}
    features = clips[0].features
    one, counts = ltu_as.connect({role: frames[None] for role, frames in features.items()}, lengths)
    other, _ = ltu_as.connect({"speech": features["speech"][None]}, {"speech": lengths["speech"]})
    assert torch.equal(one, other) and counts.tolist() == [5]
    assert ltu_as.audio_tokens({"speech": 5, "transcript": 999}) == 5
    lengths_of = [len(ltu_as.render(TOKENIZER, asked("Q"), [clip])) for clip in clips]
    assert lengths_of[1] - lengths_of[0] == len(" and more")
    assert LTUAS.read_roles == ("transcript",)


@torch.no_grad()
def test_loss_is_that_of_the_text_without_the_hidden_states_of_the_audio(ltu: LTU) -> None:
    """As the official code has it: logits and labels of the text alone, shifted by one."""
    clips = [Audio({"audio": torch.randn(16, 32)}) for _ in range(2)]
    messages = [asked("Name it.", "hall"), asked("What room is it?", "the kitchen")]
    rendered = [ltu.render(TOKENIZER, turn, [clip]) for turn, clip in zip(messages, clips, strict=True)]
    loss, count = ltu(
        collate([(each, [clip]) for each, clip in zip(rendered, clips, strict=True)], TOKENIZER.pad_token_id)
    )
    total, tokens = torch.tensor(0.0), 0
    for each, clip in zip(rendered, clips, strict=True):
        audio, _ = ltu.connect({"audio": clip.features["audio"][None]}, {"audio": torch.tensor([16])})
        text = torch.tensor(each.ids[4:])
        states = torch.cat([audio, ltu.llm.get_input_embeddings()(text)[None]], dim=1)
        logits = ltu.llm(inputs_embeds=states).logits[0, 4:]
        total += functional.cross_entropy(logits[:-1], text[1:], reduction="sum")
        tokens += len(text) - 1
    assert int(count) == tokens
    assert float(loss) == pytest.approx(float(total), rel=1e-5)


# ---- from frames to tokens -------------------------------------------------------------------------------------------


def test_the_grid_lies_row_after_row() -> None:
    rows, steps = 8, 64
    grid = (100.0 * torch.arange(rows)[:, None] + torch.arange(steps)).reshape(1, rows * steps, 1)
    assert torch.equal(over_frequency(grid, rows)[0, :, 0], 350.0 + torch.arange(steps))


@torch.no_grad()
def test_connect_is_mean_pool_division_norm_and_projection() -> None:
    preset = LTU.preset("tiny").model_copy(update={"connector": {"width": 32, "rows": 8, "pool": 2}})
    model = LTU.build(preset, TOKENIZER, encoders=False, seed=1)
    frames = torch.randn(2, 512, 32)
    tokens, counts = model.connect({"audio": frames}, {"audio": torch.tensor([512, 512])})
    steps = frames.reshape(2, 8, 64, 32).mean(dim=1)
    pooled = functional.avg_pool1d(steps.transpose(1, 2), 2).transpose(1, 2) / 50
    norm = functional.layer_norm(pooled, (32,))
    proj: Any = model.connector.proj
    assert torch.allclose(tokens, functional.linear(norm, proj.weight, proj.bias), atol=1e-5)
    assert tokens.shape == (2, 32, 32) and counts.tolist() == [32, 32]


@torch.no_grad()
def test_ltu_as_keeps_what_each_block_gives_before_the_last_norm() -> None:
    preset = LTUAS.preset("paper").encoders["speech"]
    assert preset.layers == tuple(range(1, 33)) and preset.config["max_source_positions"] == 500
    spec = EncoderSpec(kind="whisper", config=WHISPER_TINY_RANDOM, layers=(1, 2), window=True)
    kept, last = build_encoder(spec), build_encoder(spec.model_copy(update={"layers": ()}))
    clip = [torch.randn(9000) * 0.1]
    layers: Any = last.layers
    assert torch.allclose(layers.layer_norm(kept(clip)[0][:, 24:]), last(clip)[0], atol=1e-5)


# ---- files -----------------------------------------------------------------------------------------------------------

FRONT = "base_model.model.model."
ENDS = ("weight", "bias")
NORMS = [f"{norm}{branch}" for norm in ("norm1", "norm2") for branch in ("", "_a", "_v")]
VIT = [*NORMS, "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
WHISPER = ["attn.query", "attn.value", "attn.out", "attn_ln", "mlp.0", "mlp.2", "mlp_ln"]  # attn.key has no bias


def lora(layers: int, default: str) -> dict[str, str]:
    """Official name → ours; older versions of peft write `.default`."""
    places = [f"layers.{i}.self_attn.{part}_proj.lora_{x}" for i in range(layers) for part in "qv" for x in "AB"]
    return {f"{FRONT}{place}{default}.weight": f"llm.model.{place}.default.weight" for place in places}


def ltu_file(own_blocks: int, layers: int, default: str = "") -> dict[str, str]:
    """Fact sheet, section 1 (7): class CAVMAEFTAudio, projection behind a LayerNorm without parameters, LoRA."""
    blocks = [f"blocks_a.{i}" for i in range(own_blocks)] + ["blocks_u.0"]
    modules = [f"{block}.{part}" for block in blocks for part in VIT] + ["patch_embed_a.proj", "norm_a"]
    tensors = ["pos_embed_a", "modality_a", *(f"{module}.{end}" for module in modules for end in ENDS)]
    found = {f"{FRONT}audio_encoder.{tensor}": f"encoders.audio.layers.{tensor}" for tensor in tensors}
    return found | {f"{FRONT}audio_proj.1.{end}": f"connector.proj.{end}" for end in ENDS} | lora(layers, default)


def ltu_as_file(layers: int, default: str = "") -> dict[str, str]:
    """Fact sheet, section 2 (7): class ATModel in the names of openai-whisper, projection, LoRA."""
    tensors = [f"{tr}.{part}.{end}" for tr in ("time_tr", "layer_tr") for part in WHISPER for end in ENDS]
    tensors += [f"{tr}.attn.key.weight" for tr in ("time_tr", "layer_tr")]
    found = {f"{FRONT}audio_encoder.{tensor}": f"connector.{tensor}" for tensor in tensors}
    found |= {f"{FRONT}audio_proj.1.{end}": f"connector.audio_proj.proj.{end}" for end in ENDS}
    return found | lora(layers, default)


@pytest.mark.parametrize("default", [".default", ""])
@pytest.mark.parametrize("name", ["ltu", "ltu_as"])
def test_official_files_arrive_tensor_by_tensor(tmp_path: Path, name: str, default: str) -> None:
    architecture = load(name)
    assert architecture.checkpoint is not None
    model = architecture.build(architecture.preset("tiny"), TOKENIZER, seed=3)
    names = ltu_file(1, 2, default) if name == "ltu" else ltu_as_file(2, default)
    ours = model.state_dict()
    generator = torch.Generator().manual_seed(5)
    state = {official: torch.randn(ours[own].shape, generator=generator) for official, own in names.items()}
    before = {own: value.clone() for own, value in ours.items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    report = import_into(model, architecture.checkpoint, tmp_path / "pytorch_model.bin")
    after = model.state_dict()
    for official, own in names.items():
        assert torch.equal(after[own], state[official]), official
    moved = set(names.values())
    assert all(torch.equal(after[own], before[own]) for own in after if own not in moved)
    assert sorted(report.loaded) == sorted(moved) and report.fits


@pytest.mark.parametrize(
    ("name", "names", "parameters"),
    [("ltu", ltu_file(11, 32), 93_065_216), ("ltu_as", ltu_as_file(32), 48_793_600)],
)
def test_files_of_the_published_size_are_expected_whole(
    papers: dict[str, SpeechLLM], name: str, names: dict[str, str], parameters: int
) -> None:
    model, checkpoint = papers[name], load(name).checkpoint
    assert checkpoint is not None
    ours: dict[str, Tensor] = model.state_dict()
    mapped, unexpected = map_state(checkpoint, {official: ours[own] for official, own in names.items()})
    assert unexpected == []
    assert expected(model, checkpoint) == set(names.values())
    assert sum(value.numel() for value in mapped.values()) == parameters


def test_presets_name_the_published_parts() -> None:
    for preset in (LTU.preset("paper"), LTUAS.preset("paper")):
        assert preset.lora == LoRA(rank=8, alpha=16, dropout=0.05, targets=("q_proj", "v_proj"))
        assert preset.backbone.config["vocab_size"] == 32_000
