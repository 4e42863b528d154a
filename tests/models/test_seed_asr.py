"""Seed-ASR: sizes and rates of the stand-ins, the two published prompts, and contexts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from components.batching.loader import stage_examples
from components.curriculum.tasks import question, samples_of
from components.curriculum.wordings import WORDINGS
from models.architectures import load
from models.architectures.seed_asr import PLAIN, WITH_CONTEXT, SeedASR, context_of
from models.contract import SpeechLLM
from models.encoders import build_encoder
from models.pretrained import load_tokenizer
from models.rendering import Audio, Message, Rendered

TOKENIZER: Any = load_tokenizer("bytes")
TEXTS = ("call anna please", "turn on the light", "louder", "what a thunderstorm")
ROWS: list[dict[str, Any]] = [
    {"key": f"c{i}", "text": text, "labels": {}, "translation": {}, "caption": None, "conversations": None}
    for i, text in enumerate(TEXTS)
]
CLIP = Audio({"speech": torch.zeros(20, 16)})  # three tokens


@pytest.fixture(scope="module")
def model() -> SpeechLLM:
    return load("seed_asr").build(SeedASR.preset("tiny"), TOKENIZER, seed=3)


@pytest.fixture(scope="module")
def paper() -> SpeechLLM:
    return SeedASR.on_meta(SeedASR.preset("paper"))


def rendered_of(model: SpeechLLM, task: str, answered: bool = True) -> Rendered:
    sample = samples_of(ROWS[0], task, others=ROWS[1:3])[0]
    return model.render(TOKENIZER, list(sample.messages) if answered else sample.prompt(), [CLIP])


# ---- sizes and rates ------------------------------------------------------------------------------------------------


def test_sizes_of_the_stand_ins(paper: SpeechLLM) -> None:
    named = dict(paper.named_parameters())
    count = {group: sum(named[n].numel() for n in names) for group, names in paper.parameter_groups().items()}
    assert count["connector"] == (8 * 1024 + 1) * 2048 == 16_779_264
    assert count["llm"] + count["embeddings"] == 14_315_784_192  # over ten billion
    assert 575e6 < count["encoder"] < 585e6  # published: 580 M
    assert count["lora"] == 0
    experts = paper.llm.get_decoder().layers[0].mlp.experts
    assert experts.down_proj.shape == (60, 2048, 1408)


@pytest.mark.parametrize(("seconds", "tokens"), [(30, 188), (10, 63), (1, 7)])
def test_six_and_a_quarter_tokens_a_second(paper: SpeechLLM, seconds: int, tokens: int) -> None:
    """160 ms each; the last group is filled with zeros, not dropped (10 s: 499 frames of 20 ms)."""
    with torch.device("meta"):
        encoder = build_encoder(SeedASR.preset("paper").without_weights().encoders["speech"])
    assert paper.audio_tokens({"speech": encoder.output_length(seconds * 16_000)}) == tokens


def test_the_language_model_is_frozen_throughout() -> None:
    for name in ("paper", "small", "tiny"):
        recipe = SeedASR.preset(name).recipe  # type: ignore[arg-type]
        assert [stage.train for stage in recipe.stages] == [("encoder", "connector")] * 3
        assert recipe.hears == [True] * 3
        assert [stage.loss for stage in recipe.stages] == ["ctc" if name == "small" else "lm", "lm", "mwer"]


def test_contexts_are_in_the_mix_of_the_last_stage_and_weigh_more() -> None:
    """Without them keyword recall falls from 80.6 to 75.3."""
    _, context, rl = SeedASR.preset("paper").recipe.stages
    assert set(context.tasks) == set(rl.tasks) == {"asr", "biased_asr"}
    assert rl.mwer.keyword_weight > 1


# ---- prompts --------------------------------------------------------------------------------------------------------


def spans(rendered: Rendered) -> tuple[list[int], list[int]]:
    """Ids before and behind the audio."""
    at, tokens = rendered.clip_at[0], rendered.clip_tokens[0]
    assert tokens == 3
    return rendered.ids[:at], rendered.ids[at + tokens :]


def test_the_prompt_without_context(model: SpeechLLM) -> None:
    before, after = spans(rendered_of(model, "asr"))
    assert before[0] == TOKENIZER.bos_token_id
    assert TOKENIZER.decode(before[1:]) == PLAIN == "Transcribe the speech into text:"
    assert TOKENIZER.decode(after) == " call anna please<|im_end|>"


def test_the_prompt_with_context_is_instruction_context_speech_text(model: SpeechLLM) -> None:
    before, after = spans(rendered_of(model, "biased_asr"))
    listed = "anna, call, light, louder, please, the, turn"
    assert TOKENIZER.decode(before[1:]) == f"{WITH_CONTEXT} {listed}\n"
    assert WITH_CONTEXT == "There are relevant contexts, transcribe the speech into text:"
    assert TOKENIZER.decode(after) == " call anna please<|im_end|>"


def test_a_tokenizer_without_a_beginning_token_adds_none(model: SpeechLLM) -> None:
    """Qwen's has none."""
    tokenizer = load_tokenizer("bytes")
    tokenizer.bos_token = None
    messages: list[Message] = question()
    rendered = model.render(tokenizer, messages, [CLIP])
    assert tokenizer.decode(rendered.ids[: rendered.clip_at[0]]) == PLAIN


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("words", ["anna", "anna, bob", "don't, st. john's, mr.", "q. e. d."])
def test_the_context_is_found_in_every_wording(number: int, words: str) -> None:
    assert context_of(WORDINGS["biased_asr"][number].format(words=words)) == words


@pytest.mark.parametrize("request_text", [*WORDINGS["asr"], *WORDINGS["caption"], "", "Names: ", "What is it: a or b?"])
def test_other_requests_have_no_context(request_text: str) -> None:
    assert context_of(request_text) == ""


def test_the_words_of_a_context_are_found_in_a_decoded_prompt(model: SpeechLLM) -> None:
    """Filler tokens of the audio stand right behind it."""
    prompt = TOKENIZER.decode(rendered_of(model, "biased_asr", answered=False).ids)
    assert model.keywords(prompt) == {"anna", "call", "light", "louder", "please", "the", "turn"}
    assert model.keywords(TOKENIZER.decode(rendered_of(model, "asr", answered=False).ids)) == set()


def test_a_context_holds_words_that_are_said_and_words_of_three_other_clips(model: SpeechLLM) -> None:
    stage = SeedASR.preset("paper").recipe.stages[1]
    examples = stage_examples(stage, ROWS, model, lambda key: CLIP)
    for row in ROWS:
        plain, biased = examples.samples(row, stage.tasks, stage.phrasings)
        assert plain.keys == biased.keys == (row["key"],)  # no other clip is heard
        assert len(plain.messages) == 2
        words = model.keywords(f"{WITH_CONTEXT} {context_of(str(biased.messages[0]['content'][1]['text']))}\n")
        assert words == {w for text in TEXTS for w in sorted(text.split(), key=lambda w: (-len(w), w))[:3]}
