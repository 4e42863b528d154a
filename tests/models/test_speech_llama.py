"""Speech-LLaMA: published sizes, and clips that become shorter by what the CTC head hears in them."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest
import torch
from torch import Tensor

from models.architectures.speech_llama import SpeechLlama
from models.batch import Batch, Layout, Pair, collate
from models.encoders import build_encoder
from models.objectives import LetterCTC
from models.pretrained import load_tokenizer
from models.recipe import Decoding
from models.rendering import IGNORED, Audio

TOKENIZER = load_tokenizer("bytes")
WIDTH = 24
BLANK = 0
ANSWERS = ("abba", "c", "bad")
HEARD = ([0, 0, 1, 1, 1, 2, 0, 0, 2, 1, 0], [0, 3, 3, 3], [2, 2, 1, 1, 0, 4])  # best class of each frame
METHODS = ("average", "blank_removal", "blank_probability")


def tiny(**connector: Any) -> SpeechLlama:
    """The tiny model without encoders; its head says class k where the k-th value of a frame is the largest."""
    preset = SpeechLlama.preset("tiny")
    preset = preset.model_copy(update={"connector": preset.connector | connector})
    model = SpeechLlama.build(preset, TOKENIZER, encoders=False, seed=1)
    with torch.no_grad():
        model.compressor.bias.fill_(-50.0)
        model.compressor.bias[:WIDTH] = 0.0
        model.compressor.weight.zero_()
        model.compressor.weight[range(WIDTH), range(WIDTH)] = 1.0
    return model


def clip(heard: list[int], seed: int) -> Audio:
    frames = torch.rand(len(heard), WIDTH, generator=torch.Generator().manual_seed(seed))
    frames[range(len(heard)), heard] += 8.0
    return Audio({"speech": frames})


def asked(text: str, answer: str | None = None) -> list[dict[str, Any]]:
    question: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": text}]},
    ]
    return question if answer is None else [*question, {"role": "assistant", "content": answer}]


def pairs(model: SpeechLlama, answers: bool = True) -> list[Pair]:
    made: list[Pair] = []
    for number, (heard, answer) in enumerate(zip(HEARD, ANSWERS, strict=True)):
        audio = clip(heard, number)
        made.append((model.render(TOKENIZER, asked("Say it.", answer if answers else None), [audio]), [audio]))
    return made


def batch_of(samples: list[Pair], layout: Layout = "right") -> Batch:
    return collate(samples, int(TOKENIZER.pad_token_id), layout)


def left(heard: list[int], method: str) -> int:
    """Tokens that a clip leaves, counted by hand."""
    return len(list(groupby(heard))) if method == "average" else max(1, sum(label != BLANK for label in heard))


# ---- published sizes -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paper() -> SpeechLlama:
    return SpeechLlama.on_meta(SpeechLlama.preset("paper"))


def size(model: SpeechLlama, *groups: str) -> int:
    named = set(model.trained_by(groups))
    return sum(p.numel() for name, p in model.named_parameters() if name in named)


def test_rank_two_on_four_projections_is_2_10_million(paper: SpeechLlama) -> None:
    assert size(paper, "lora") == 32 * 4 * 2 * 8192 == 2_097_152
    assert size(paper, "llm") == 6_738_415_616
    assert size(paper, "compressor") == 1025 * 257
    layer = 4 * 4096 * 4096 + 3 * 4096 + 2 * 4096 * 4096 + 2 * 4096 + 4 * 4096
    assert size(paper, "connector") == 1025 * 4096 + 4 * layer + 2 * 4096 == 407_007_232


def test_frames_come_every_40_ms_and_are_the_most_a_clip_takes(paper: SpeechLlama) -> None:
    with torch.device("meta"):
        encoder = build_encoder(SpeechLlama.preset("paper").without_weights().encoders["speech"])
    assert (encoder.frame_rate, encoder.width, encoder.output_length(160_000)) == (25.0, 1024, 250)
    assert sum(p.numel() for p in encoder.parameters()) == 315_437_696
    assert paper.audio_tokens({"speech": 250}) == 250
    assert not paper.exact_tokens


def test_a_stage_trains_what_the_paper_says() -> None:
    stages = SpeechLlama.preset("paper").recipe.stages
    assert [(s.name, s.train, s.loss) for s in stages] == [
        ("compressor", ("compressor",), "letters"),
        ("encoder", ("connector",), "lm"),
        ("lora", ("connector", "lora"), "lm"),
    ]


# ---- sequence --------------------------------------------------------------------------------------------------


def test_audio_stands_between_bos_and_the_instruction() -> None:
    model = tiny()
    rendered, _ = pairs(model)[0]
    bos, eos = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id
    assert rendered.ids[0] == bos
    assert rendered.audio_at == list(range(1, 1 + len(HEARD[0])))
    rest = rendered.ids[1 + len(HEARD[0]) :]
    assert TOKENIZER.decode(rest) == f"Say it.\nabba{TOKENIZER.eos_token}"
    learnt = [label for label in rendered.labels if label != IGNORED]
    assert learnt == [*TOKENIZER("abba")["input_ids"], eos]


# ---- compression -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_becomes_as_short_as_its_clips(method: str) -> None:
    model = tiny(method=method)
    samples = pairs(model)
    expected = [left(heard, method) for heard in HEARD]
    layouts: tuple[Layout, ...] = ("right", "left", "packed")
    for layout in layouts:
        batch = batch_of(samples, layout)
        states, shorter = model.run(batch)
        assert shorter.clip_tokens.tolist() == expected
        assert shorter.tokens == batch.tokens - sum(map(len, HEARD)) + sum(expected)
        assert states.shape[:2] == shorter.ids.shape
        assert shorter.ids.shape[1] < batch.ids.shape[1]
        assert [row.tolist() for row in shorter.label_sequences()] == [
            [IGNORED] * n + row.tolist()[len(heard) :]
            for n, heard, row in zip(expected, HEARD, batch.label_sequences(), strict=True)
        ]


def test_the_connector_reads_the_means_of_runs() -> None:
    model = tiny()
    features = {"speech": torch.nn.utils.rnn.pad_sequence([clip(h, i).features["speech"] for i, h in enumerate(HEARD)])}
    features = {"speech": features["speech"].transpose(0, 1)}
    tokens, counts = model.connect(features, {"speech": torch.tensor([len(heard) for heard in HEARD])})
    for number, heard in enumerate(HEARD):
        frames = clip(heard, number).features["speech"]
        runs = [[at for at, _ in run] for _, run in groupby(enumerate(heard), key=lambda pair: pair[1])]
        means = torch.stack([frames[run].mean(0) for run in runs])
        alone, _ = model.connector(means[None], torch.tensor([len(runs)]))
        assert int(counts[number]) == len(runs)
        assert torch.allclose(tokens[number, : len(runs)], alone[0], atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_alone_padded_and_packed_agree_when_positions_are_dropped(method: str) -> None:
    model = tiny(method=method)
    samples = pairs(model)
    model.freeze(("connector", "lora"))

    def result(batches: list[Batch]) -> tuple[float, Tensor]:
        model.zero_grad(set_to_none=True)
        loss = sum(model(batch)[0] for batch in batches)
        assert isinstance(loss, Tensor)
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        return float(loss.detach()), torch.cat([g.flatten() for g in grads if g is not None])

    alone, gradient = result([batch_of([sample]) for sample in samples])
    layouts: tuple[Layout, ...] = ("right", "left", "packed")
    for layout in layouts:
        loss, other = result([batch_of(samples, layout)])
        assert loss == pytest.approx(alone, rel=2e-5)
        assert torch.allclose(other, gradient, atol=1e-3 * float(gradient.abs().max()))


def test_packed_samples_that_became_shorter_do_not_see_each_other() -> None:
    model = tiny()
    samples = pairs(model)
    before, batch = model.run(batch_of(samples, "packed"))
    other = clip([3, 0, 3, 0, 3], 9)
    changed: list[Pair] = [(model.render(TOKENIZER, asked("Who?", "dad"), [other]), [other]), *samples[1:]]
    after, changed_batch = model.run(batch_of(changed, "packed"))
    behind, changed_behind = batch.segments[0] > 1, changed_batch.segments[0] > 1
    assert torch.allclose(before[0, behind], after[0, changed_behind], atol=1e-5)
    assert int(behind.sum()) == int(changed_behind.sum()) > 0


@pytest.mark.parametrize("method", METHODS)
def test_answers_do_not_depend_on_the_batch(method: str) -> None:
    model = tiny(method=method)
    prompts = pairs(model, answers=False)
    for decoding in (Decoding(), Decoding(beams=2)):
        together = model.generate(batch_of(prompts, "left"), decoding, TOKENIZER, 5)
        alone = [model.generate(batch_of([prompt], "left"), decoding, TOKENIZER, 5)[0] for prompt in prompts]
        assert together == alone


@pytest.mark.parametrize("method", METHODS)
def test_silence_keeps_one_position(method: str) -> None:
    model = tiny(method=method)
    silence = clip([BLANK] * 7, 5)
    sample: Pair = (model.render(TOKENIZER, asked("Say it.", "a"), [silence]), [silence])
    _, shorter = model.run(batch_of([sample]))
    assert shorter.clip_tokens.tolist() == [1]
    assert shorter.tokens == len(sample[0]) - 6


def test_the_head_is_a_group_of_its_own_that_only_letters_reach() -> None:
    model = tiny()
    model.freeze(("compressor", "connector", "lora"))
    batch = batch_of(pairs(model))
    model(batch)[0].backward()
    assert model.compressor.weight.grad is None
    model.zero_grad(set_to_none=True)
    model(batch, LetterCTC(TOKENIZER))[0].backward()
    received = {name for name, p in model.named_parameters() if p.grad is not None}
    assert received == {"compressor.weight", "compressor.bias"} == set(model.trained_by(("compressor",)))


def test_a_head_that_learnt_letters_makes_clips_shorter() -> None:
    """From random weights: three clips whose letters last three to five frames, sixty steps of Adam on the letters."""
    preset = SpeechLlama.preset("tiny")
    model = SpeechLlama.build(preset, TOKENIZER, encoders=False, seed=1)
    generator = torch.Generator().manual_seed(4)
    sounds = {letter: torch.randn(WIDTH, generator=generator) for letter in "abcd"}
    samples: list[Pair] = []
    for word in ("abcd", "dcab", "bad"):
        frames = torch.stack([sounds[letter] for i, letter in enumerate(word) for _ in range(3 + i % 3)])
        audio = Audio({"speech": frames + 0.7 * torch.randn(frames.shape, generator=generator)})
        samples.append((model.render(TOKENIZER, asked("Say it.", word), [audio]), [audio]))
    batch = batch_of(samples)
    before = int(model.run(batch)[1].clip_tokens.sum())
    optimiser = torch.optim.Adam(
        [p for name, p in model.named_parameters() if name in model.freeze(("compressor",))], lr=0.05
    )
    objective = LetterCTC(TOKENIZER)
    for _ in range(60):
        optimiser.zero_grad()
        model(batch, objective)[0].backward()
        optimiser.step()
    after = model.run(batch)[1]
    logits, counts = model.spell(batch.features, batch.lengths)
    heard = [
        "".join(chr(label - 1) for label, _ in groupby(row[:n].tolist()) if label != BLANK)
        for row, n in zip(logits.argmax(-1), counts, strict=True)
    ]
    assert heard == ["abcd", "dcab", "bad"]
    assert int(after.clip_tokens.sum()) < before
    assert int(after.clip_tokens.sum()) <= 2 * sum(map(len, heard)) + 3  # each letter, and blanks between


def test_causal_is_a_choice_of_the_audio_encoder() -> None:
    for causal in (False, True):
        model = tiny(causal=causal)
        frames = clip([1, 2, 3, 4], 0).features["speech"][None]
        later = frames.clone()
        later[0, 3] += torch.randn(WIDTH, generator=torch.Generator().manual_seed(2))
        lengths = {"speech": torch.tensor([4])}
        one, other = model.connect({"speech": frames}, lengths)[0], model.connect({"speech": later}, lengths)[0]
        assert torch.allclose(one[:, :3], other[:, :3], atol=1e-6) == causal


def test_an_unknown_method_is_refused() -> None:
    model = tiny(method="softmax")
    with pytest.raises(ValueError, match="average, blank_removal or blank_probability"):
        model.run(batch_of(pairs(model)))
