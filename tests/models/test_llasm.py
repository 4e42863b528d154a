"""LLaSM: published sizes, the chat template with its repeated system block, and where the clip stands in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.architectures.llasm import END, PATCH, START, SYSTEM, Llasm
from models.batch import collate
from models.checkpoints import import_into
from models.encoders import build_encoder
from models.pretrained import load_tokenizer
from models.rendering import IGNORED, Audio, Rendered

POSITIONS = 8  # of the tiny preset


TOKENIZER = load_tokenizer("bytes")
TOKENIZER.add_tokens([PATCH, START, END])


def tiny(system: str = SYSTEM, untied: bool = False) -> Llasm:
    preset = Llasm.preset("tiny")
    backbone = preset.backbone.model_copy(
        update={"config": preset.backbone.config | {"tie_word_embeddings": not untied}}
    )
    changes = {"connector": preset.connector | {"system": system}, "backbone": backbone}
    return Llasm.build(preset.model_copy(update=changes), TOKENIZER, encoders=False, seed=1)


def clip(seed: int = 0) -> Audio:
    return Audio({"speech": torch.randn(POSITIONS, 24, generator=torch.Generator().manual_seed(seed))})


def user(text: str, audio: bool = True) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    return {"role": "user", "content": [{"type": "audio"}, *parts] if audio else parts}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def shown(rendered: Rendered) -> str:
    """The sequence as text: special tokens by name, patches counted."""
    count = len(rendered.audio_at)
    return str(TOKENIZER.decode(rendered.ids)).replace(PATCH * max(1, count), f"({count})")


def learnt(rendered: Rendered) -> str:
    return str(TOKENIZER.decode([label for label in rendered.labels if label != IGNORED]))


BOS, EOS = TOKENIZER.bos_token, TOKENIZER.eos_token
BLOCK = f"<<SYS>>\n{SYSTEM}\n<</SYS>>\n\n"


# ---- published sizes -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paper() -> Llasm:
    return Llasm.on_meta(Llasm.preset("paper"))


def size(model: Llasm, *groups: str) -> int:
    named = set(model.trained_by(groups))
    return sum(p.numel() for name, p in model.named_parameters() if name in named)


def test_the_projector_has_5_246_976_and_stage_2_the_whole_of_llama_2(paper: Llasm) -> None:
    adapt, instruct = Llasm.preset("paper").recipe.stages
    assert size(paper, *adapt.train) == 5_246_976
    assert paper.llm.config.vocab_size == 32_003
    llama = 6_738_415_616 + 3 * 2 * 4096  # three tokens in both tables
    assert size(paper, *instruct.train) == 5_246_976 + llama
    assert not paper.parameter_groups()["lora"]


def test_64_tokens_whatever_the_clip_out_of_the_whole_of_whisper(paper: Llasm) -> None:
    with torch.device("meta"):
        encoder = build_encoder(Llasm.preset("paper").without_weights().encoders["speech"])
    assert sum(p.numel() for p in encoder.parameters()) == 1_543_304_960
    for seconds in (1, 10, 30, 60):
        assert paper.audio_tokens({"speech": encoder.output_length(seconds * 16_000)}) == 64
    assert encoder.width == 1280


# ---- template --------------------------------------------------------------------------------------------------


def test_the_system_block_stands_twice_with_bos_behind_the_first() -> None:
    """As tokenize_Cllama2 has it: raw ids at the very beginning, then the first turn, which holds the block again."""
    rendered = tiny().render(TOKENIZER, [user(""), assistant("Yes.")], [clip()])
    assert shown(rendered) == f"{BLOCK}{BOS}[INST] {BLOCK}{START}(8){END} [/INST] Yes. {EOS}"
    block = len(TOKENIZER(BLOCK)["input_ids"])
    assert [at for at, token in enumerate(rendered.ids) if token == TOKENIZER.bos_token_id] == [block]
    assert learnt(rendered) == f"Yes. {EOS}"


@pytest.mark.parametrize(
    ("request_text", "turn"),
    [
        ("Write.", f"Write.\n{START}(8){END} [/INST] "),  # six letters
        ("Write it", f"Write it\n{START}(8){END} [/INST] "),
        ("Write!!", f"{START}(8){END}\nWrite!! [/INST] "),  # seven
        ("", f"{START}(8){END} [/INST] "),
    ],
)
def test_the_instruction_stands_before_or_behind_the_audio(request_text: str, turn: str) -> None:
    rendered = tiny(system="").render(TOKENIZER, [user(request_text)], [clip()])
    assert shown(rendered) == f"{BOS}[INST] {turn}"
    assert rendered.clip_tokens == [POSITIONS]


def test_the_wordings_of_recognition_have_both_orders() -> None:
    from components.curriculum.wordings import WORDINGS

    model = tiny(system="")
    before = [shown(model.render(TOKENIZER, [user(text)], [clip()])).startswith(f"{BOS}[INST] {START}")
              for text in WORDINGS["asr"]]  # fmt: skip
    assert set(before) == {True, False}


def test_each_turn_begins_with_bos_and_every_answer_is_learnt() -> None:
    messages = [
        user("Hi", audio=False),
        assistant("Hello."),
        user("Say"),
        assistant("Well."),
        user("Go on", audio=False),
    ]
    rendered = tiny().render(TOKENIZER, messages, [clip()])
    assert shown(rendered) == (
        f"{BLOCK}{BOS}[INST] {BLOCK}Hi [/INST] Hello. {EOS}"
        f"{BOS}[INST] {START}(8){END}\nSay [/INST] Well. {EOS}"
        f"{BOS}[INST] Go on [/INST] "
    )
    assert learnt(rendered) == f"Hello. {EOS}Well. {EOS}"


def test_a_conversation_in_text_alone_has_no_audio() -> None:
    model = tiny(system="")
    rendered = model.render(TOKENIZER, [user("Hi", audio=False), assistant("Hello.")], [clip()])
    assert rendered.clip_at == rendered.audio_at == []
    batch = collate([(rendered, [clip()])], int(TOKENIZER.pad_token_id))
    assert batch.features == {}
    assert model(batch)[0].isfinite()


# ---- embeddings ------------------------------------------------------------------------------------------------


def test_only_the_patches_are_overwritten() -> None:
    model, audio = tiny(system=""), clip()
    rendered = model.render(TOKENIZER, [user("Write.")], [audio])
    batch = collate([(rendered, [audio])], int(TOKENIZER.pad_token_id))
    embedded, _ = model.embed(batch)
    expected = model.llm.get_input_embeddings()(batch.ids).clone()
    start, end = TOKENIZER.convert_tokens_to_ids([START, END])
    first = rendered.ids.index(start) + 1
    assert rendered.ids[first + POSITIONS] == end
    weight, bias = model.connector.proj.weight, model.connector.proj.bias  # type: ignore[union-attr]
    expected[0, first : first + POSITIONS] = audio.features["speech"] @ weight.T + bias  # type: ignore[operator, union-attr]
    assert torch.allclose(embedded, expected, atol=1e-5)


@pytest.mark.parametrize("untied", [False, True])
def test_new_tokens_start_as_the_mean_of_the_old(untied: bool) -> None:
    model = tiny(untied=untied)
    new = TOKENIZER.convert_tokens_to_ids([PATCH, START, END])
    assert new == [259, 260, 261]
    for table in (model.llm.get_input_embeddings().weight, model.llm.get_output_embeddings().weight):
        assert len(table) == 262
        assert torch.allclose(table[new], table[:259].mean(0).expand(3, -1), atol=1e-7)
    tables = model.llm.get_input_embeddings().weight, model.llm.get_output_embeddings().weight
    assert (tables[0] is tables[1]) != untied


# ---- official checkpoint ---------------------------------------------------------------------------------------


def official(model: Llasm) -> dict[str, Tensor]:
    """A state in the layout of LinkSoul/LLaSM-Cllama2, with values of its own."""
    generator = torch.Generator().manual_seed(9)
    shapes = {name.removeprefix("llm."): p.shape for name, p in model.named_parameters() if name.startswith("llm.")}
    shapes |= {"model.mm_projector.weight": torch.Size((32, 24)), "model.mm_projector.bias": torch.Size((32,))}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_the_official_folder_arrives_tensor_by_tensor(tmp_path: Path) -> None:
    model = tiny(untied=True)
    state = official(model)
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} < state.keys()
    save_file(state, tmp_path / "model.safetensors")
    report = import_into(model, Llasm.checkpoint, tmp_path)
    assert report.fits
    assert len(report.loaded) == len(state)
    ours = model.state_dict()
    assert torch.equal(ours["connector.proj.weight"], state["model.mm_projector.weight"])
    assert torch.equal(ours["connector.proj.bias"], state["model.mm_projector.bias"])
    for name, value in state.items():
        assert "mm_projector" in name or torch.equal(ours[f"llm.{name}"], value)


def test_a_folder_without_the_projector_is_refused(tmp_path: Path) -> None:
    model = tiny(untied=True)
    state = official(model)
    del state["model.mm_projector.bias"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 missing: connector\.proj\.bias"):
        import_into(model, Llasm.checkpoint, tmp_path)
