"""The view of what is learnt says what the training does, for every architecture, layout and tokenizer."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from components.batching.explain import (
    Explained,
    Token,
    explain_batch,
    harmless,
    label_count,
    samples_in,
    token_texts,
    trainable_groups,
    units_of,
)
from components.batching.explain_page import explain_page, show
from models.architectures import names
from models.batch import Batch, Layout, Pair, collate
from models.objectives import ConnectorCTC
from models.pretrained import load_tokenizer
from models.recipe import Optimiser, Stage
from models.rendering import IGNORED, Audio, Rendered
from models.tokenizers.bytes import byte_tokenizer
from tests.contract.conftest import ROWS, Subject, built

LAYOUTS: tuple[Layout, ...] = ("right", "left", "packed")
LM = Stage(name="lora", train=("lora",))
CTC = Stage(name="adaptor", train=("connector",), loss="ctc")
DIFFERENT = ("funasr_llm", "salmonn", "speechgpt")  # one encoder, two, units
EVIL = "<script>alert('1')</script>"


@pytest.fixture(params=DIFFERENT)
def subject(request: pytest.FixtureRequest) -> Subject:
    return built(request.param)


def pairs_of(one: Subject, stage: Stage) -> tuple[list[str], list[Pair]]:
    return [sample.key for sample in one.samples(stage.tasks)], one.rendered(stage)


def explained(one: Subject, layout: Layout, stage: Stage = LM) -> tuple[Explained, Batch]:
    keys, pairs = pairs_of(one, stage)
    batch = collate(pairs, one.tokenizer.pad_token_id, layout)
    units = units_of(one.architecture, one.preset, one.tokenizer)
    groups = trainable_groups(one.model, stage)
    whole = label_count(batch, stage, one.tokenizer)
    return explain_batch(batch, one.tokenizer, keys, whole, units, stage=stage, groups=groups), batch


def tokens_of(view: Explained) -> list[Token]:
    return [token for row in view.rows for token in row]


def learnt_texts(view: Explained) -> dict[int, str]:
    """The learnt tokens of each segment as one text, with white space as it was."""
    texts = dict.fromkeys(range(1, len(view.keys) + 1), "")
    for token in tokens_of(view):
        texts[token.segment or 1] += token.label or ""
    return {segment: text.replace("␣", " ").replace("⏎", "\n") for segment, text in texts.items()}


def small_batch(texts: list[str], tokenizer: Any) -> Batch:
    """Two audio positions, BOS, a text that is learnt, EOS; three frames a clip."""
    pairs = []
    for text in texts:
        rendered = Rendered().audio(2, tokenizer.bos_token_id).tokens([tokenizer.bos_token_id])
        rendered.text(tokenizer, text, learn=True).tokens([tokenizer.eos_token_id], learn=True)
        pairs.append((rendered, [Audio({"speech": torch.zeros(3, 4)})]))
    return collate(pairs, tokenizer.pad_token_id)


# ---- every architecture -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_shown_as_learnt_is_what_carries_loss(subject: Subject, layout: Layout) -> None:
    view, batch = explained(subject, layout)
    tokens = tokens_of(view)
    assert view.layout == layout
    assert view.labels == batch.label_tokens > 0
    assert sum(token.weight for token in tokens) == pytest.approx(1.0)
    assert all((token.weight > 0) == (token.label is not None) for token in tokens)
    targets = batch.targets()
    for r, row in enumerate(view.rows):
        assert row[0].label is None  # nothing stands before the first position
        for c, token in enumerate(row[1:], start=1):
            assert (token.label is not None) == (int(targets[r, c - 1]) != IGNORED)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_position_comes_once_and_unchanged(subject: Subject, layout: Layout) -> None:
    view, batch = explained(subject, layout)
    assert [[token.id for token in row] for row in view.rows] == batch.ids.tolist()
    assert [[token.position for token in row] for row in view.rows] == batch.positions.tolist()
    assert [[token.segment for token in row] for row in view.rows] == batch.segments.tolist()
    assert view.tokens == batch.tokens == sum(token.span != "padding" for token in tokens_of(view))
    assert view.padding == pytest.approx(1 - batch.tokens / batch.ids.numel())
    for row in view.rows:
        assert [token for _, tokens in samples_in(row) for token in tokens] == row
    assert [segment for row in view.rows for segment, _ in samples_in(row)] == [1, 2, 3]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_learnt_text_is_the_answer(subject: Subject, layout: Layout) -> None:
    view, _ = explained(subject, layout)
    texts = learnt_texts(view)
    for segment, row in enumerate(ROWS, start=1):
        if subject.architecture.loss_on_prompt:
            assert texts[segment].endswith(f"[SpeechGPT]: {row['text']}<eoa><|im_end|>")
        else:
            assert texts[segment] == f" {row['text']}<|im_end|>"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_audio_and_units_are_found_and_counted(subject: Subject, layout: Layout) -> None:
    view, batch = explained(subject, layout)
    assert [clip.key for clip in view.lengths] == view.keys == ["clip0", "clip1", "clip2"]
    for clip in view.lengths:
        audio, spans = subject.audios[clip.key], [token for token in tokens_of(view) if token.segment == clip.segment]
        if audio.units is not None:
            units = torch.unique_consecutive(audio.units).tolist()
            assert [token.text for token in spans if token.span == "unit"] == [f"<{unit}>" for unit in units]
            assert (clip.frames, clip.tokens) == ({}, len(units))
        else:
            count = subject.model.audio_tokens(audio.frames)
            names = [f"♪{clip.segment}·{i}" for i in range(1, count + 1)]
            assert [token.text for token in spans if token.span == "audio"] == names
            assert (clip.frames, clip.tokens) == (audio.frames, count)
    assert sum(token.span == "audio" for token in tokens_of(view)) == len(batch.audio_rows)


def test_groups_are_what_freeze_lets_learn(subject: Subject) -> None:
    parameters = dict(subject.model.named_parameters())
    for stage in [*subject.preset.recipe.stages, LM, Stage(name="all", train=("llm", "encoder"))]:
        before = {name: p.requires_grad for name, p in parameters.items()}
        groups = trainable_groups(subject.model, stage)
        assert {name: p.requires_grad for name, p in parameters.items()} == before
        learning = subject.model.freeze(stage.train)
        assert sum(group.tensors for group in groups if group.trainable) == len(learning)
        assert sum(group.parameters for group in groups if group.trainable) == sum(
            parameters[name].numel() for name in learning
        )
        assert sum(group.parameters for group in groups) == sum(p.numel() for p in parameters.values())
        rates = {group.rate for group in groups}
        assert rates == {stage.optimiser.lr, None}


def test_a_group_has_its_own_rate_and_an_unknown_one_is_an_error(subject: Subject) -> None:
    stage = Stage(name="both", train=("lora", "llm"), groups={"lora": Optimiser(lr=3e-3)})
    rates = {group.name: group.rate for group in trainable_groups(subject.model, stage)}
    assert (rates["lora"], rates["llm"], rates["embeddings"], rates["encoder"]) == (3e-3, 1e-4, 1e-4, None)
    with pytest.raises(ValueError, match=r"no parameters in group 'codebook'; it has: .*lora"):
        trainable_groups(subject.model, Stage(name="x", train=("lora", "codebook")))


def test_ctc_lists_the_labels_that_the_loss_counts(subject: Subject) -> None:
    if subject.model.codebook is not None:
        return  # units have no connector whose output could be aligned
    view, batch = explained(subject, "packed", CTC)
    ids = batch.labels[batch.labels != IGNORED].unique()
    _, counted = subject.model(batch, ConnectorCTC(ids, subject.tokenizer.eos_token_id))
    assert view.labels == int(counted) == sum(len(row["text"]) + 1 for row in ROWS)
    assert sum(token.weight for token in tokens_of(view)) == pytest.approx(1.0)
    texts = ["".join(each.labels).replace("␣", " ") for each in view.alignments]
    assert texts == [f" {row['text']}" for row in ROWS]
    assert [each.positions for each in view.alignments] == [clip.tokens for clip in view.lengths]
    assert "the end token is the blank" in explain_page(view)


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_both_views_of_every_architecture(name: str) -> None:
    subject = built(name)
    view, _ = explained(
        subject, "left", subject.preset.recipe.stages[0].model_copy(update={"tasks": {"asr": 1.0}, "loss": "lm"})
    )
    console = Console(file=io.StringIO(), width=100, color_system=None)
    show(view, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    page = explain_page(view)
    for text in ("clip0", "clip1", "clip2", "embeddings", "Parameter groups", "Encoder lengths"):
        assert text in printed and text in page
    assert max(len(line) for line in printed.splitlines()) <= 100
    body = printed[printed.index("\nclip0") :]
    assert body.count("⟦") == view.labels
    assert len(re.findall(r'<span class="chip \w+ learnt" ', page)) == view.labels
    assert len(re.findall(r'<span class="chip \w+(?: learnt)?" ', page)) == view.tokens + body.count("· ")
    assert page.count("<td >masked</td>") == view.tokens - view.labels
    assert not re.search(r"https?://|src=|@import|url\(|<script|<link", page)


# ---- parts of a global batch, odd batches -----------------------------------------------------------------------


def test_weights_of_the_ranks_sum_to_one() -> None:
    tokenizer = byte_tokenizer()
    parts = [small_batch(["stop", "go on"], tokenizer), small_batch(["left"], tokenizer)]
    total = sum(label_count(batch, LM, tokenizer) for batch in parts)
    views = [explain_batch(b, tokenizer, "ab"[: len(b.ids)], total, stage=LM) for b in parts]
    assert total == 16 and [view.labels for view in views] == [11, 5]
    assert sum(token.weight for view in views for token in tokens_of(view)) == pytest.approx(1.0)
    assert tokens_of(views[1])[-1].weight == 1 / 16


def test_a_rank_whose_labels_are_masked_shows_no_weight() -> None:
    tokenizer = byte_tokenizer()
    batch = small_batch(["stop"], tokenizer)
    batch.labels.fill_(IGNORED)
    view = explain_batch(batch, tokenizer, ["a"], 0, stage=LM)
    assert view.labels == 0 and sum(token.weight for token in tokens_of(view)) == 0
    assert "row 1, segment 1: 8 tokens, 0 labels<" in explain_page(view)


def test_first_token_of_a_packed_sample_is_never_learnt_even_with_a_label() -> None:
    rendered = [Rendered().tokens([10, 11, 12], learn=True) for _ in range(2)]
    batch = collate([(each, []) for each in rendered], 0, "packed")
    view = explain_batch(batch, byte_tokenizer(), ["a", "b"], batch.label_tokens, stage=LM)
    assert [token.label is not None for token in view.rows[0]] == [False, True, True, False, True, True]
    assert view.labels == batch.label_tokens == 4 and view.lengths == []


def test_text_only_samples_between_clips_keep_the_numbers_of_clips() -> None:
    tokenizer = byte_tokenizer()
    spoken = Rendered().audio(2, 1).text(tokenizer, "a", learn=True)
    written = Rendered().text(tokenizer, "ab", learn=True)
    clips = [Audio({"speech": torch.zeros(frames, 4)}) for frames in (3, 5)]
    batch = collate([(spoken, [clips[0]]), (written, []), (spoken, [clips[1]])], 0)
    view = explain_batch(batch, tokenizer, ["x", "y", "z"], 4, stage=LM)
    assert [(c.key, c.segment, c.frames["speech"], c.tokens) for c in view.lengths] == [("x", 1, 3, 2), ("z", 3, 5, 2)]
    assert [token.text for token in view.rows[2][:2]] == ["♪2·1", "♪2·2"]


def test_what_does_not_fit_is_an_error() -> None:
    tokenizer = byte_tokenizer()
    batch = small_batch(["a", "b"], tokenizer)
    with pytest.raises(ValueError, match="1 keys for a batch of 2 samples"):
        explain_batch(batch, tokenizer, ["a"], 4, stage=LM)
    with pytest.raises(ValueError, match="4 labels in a part of a global batch that has 3"):
        explain_batch(batch, tokenizer, ["a", "b"], 3, stage=LM)
    batch.lengths.clear()
    with pytest.raises(ValueError, match="places for 2 clips, but the batch holds 0"):
        explain_batch(batch, tokenizer, ["a", "b"], 4, stage=LM)


def test_ctc_says_when_a_clip_is_too_short() -> None:
    tokenizer = byte_tokenizer()
    batch = small_batch(["aa", "b"], tokenizer)
    view = explain_batch(batch, tokenizer, ["x", "y"], label_count(batch, CTC, tokenizer), stage=CTC)
    assert [(each.labels, each.needed, each.positions) for each in view.alignments] == [
        (["a", "a"], 3, 2),  # a blank has to stand between equal labels
        (["b"], 1, 2),
    ]
    assert "2: too few, no loss" in explain_page(view)


# ---- texts --------------------------------------------------------------------------------------------------------


def test_byte_tokens_print_as_signs_and_escapes() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<7>", "[Human]"])
    ids = tokenizer(" a\n\tí<7>[Human]\x1b\u202e<|im_end|>")["input_ids"]
    texts = ["␣", "a", "⏎", "⇥", "\\xc3", "\\xad", "<7>", "[Human]", "\\x1b", "\\xe2", "\\x80", "\\xae", "<|im_end|>"]
    assert token_texts(tokenizer, ids) == texts
    assert token_texts(tokenizer, [99_999]) == ["#99999"]


def test_pieces_of_byte_level_and_sentencepiece_vocabularies_keep_their_space() -> None:
    pieces = ["Ġthe", "Ġå", "Ċ", "Ã¼", "ħ"]
    level = Tokenizer(BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    level.decoder = decoders.ByteLevel()
    found = token_texts(PreTrainedTokenizerFast(tokenizer_object=level), range(5))
    assert found == ["␣the", "␣\\xe5", "⏎", "ü", "\\x85"]
    metaspace = Tokenizer(BPE(vocab={"▁the": 0, "▁▁": 1, "er": 2, "<0xE5>": 3}, merges=[]))
    metaspace.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Strip(" ", 1)])
    found = token_texts(PreTrainedTokenizerFast(tokenizer_object=metaspace), range(4))
    assert found == ["␣the", "␣␣", "er", "<0xE5>"]


def test_no_text_can_steer_the_page_or_the_terminal() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([EVIL])
    key = f"{EVIL}\x1b[2J[bold]"
    batch = small_batch([f"{EVIL}\x1b[2J"], tokenizer)
    for stage in (LM, CTC):
        view = explain_batch(batch, tokenizer, [key], label_count(batch, stage, tokenizer), stage=stage)
        page = explain_page(view)
        assert "<script" not in page and "\x1b" not in page
        assert page.count("&lt;script&gt;alert(&#x27;1&#x27;)&lt;/script&gt;") > 3
        console = Console(file=io.StringIO(), width=80, color_system=None)
        show(view, console)
        printed = console.file.getvalue()  # type: ignore[attr-defined]
        assert "\x1b" not in printed and f"{EVIL}\\x1b[2J[bold]" in printed
    assert harmless("ü 光\u202e") == "ü 光\\u202e"


def test_a_label_other_than_the_token_is_shown() -> None:
    tokenizer = byte_tokenizer()
    batch = small_batch(["ab"], tokenizer)
    batch.labels[0, 4] = tokenizer("z")["input_ids"][0]
    view = explain_batch(batch, tokenizer, ["x"], 3, stage=LM)
    assert (view.rows[0][4].text, view.rows[0][4].label) == ("b", "z")
    assert ">b→z</span>" in explain_page(view)


def test_the_same_batch_gives_the_same_page() -> None:
    tokenizer = byte_tokenizer()
    batch = small_batch(["stop"], tokenizer)
    pages = [explain_page(explain_batch(batch, tokenizer, ["x"], 5, stage=LM)) for _ in range(2)]
    assert pages[0] == pages[1]
    assert "weight 0.2" in pages[0] and "predicted at position 2" in pages[0] and "<details open>" in pages[0]


@pytest.mark.slow
def test_a_real_vocabulary_gives_back_the_text() -> None:
    tokenizer = load_tokenizer("earloom/smollm2-135m-instruct")
    text = " Turn on the light,\nplease: 21 °C"
    texts = token_texts(tokenizer, tokenizer(text)["input_ids"])
    assert texts[:6] == ["␣Turn", "␣on", "␣the", "␣light", ",", "⏎"]
    assert "".join(texts).replace("␣", " ").replace("⏎", "\n") == text
