"""Training on expected word errors: the weighted distance, the closed form, what it shares and what it leaves alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import jiwer
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from components.curriculum.tasks import samples_of
from components.training import expected_errors
from components.training.expected_errors import ExpectedWordErrors, weighted_errors
from models.architectures import load
from models.batch import Batch, Layout, Pair, collate
from models.contract import SpeechLLM
from models.objectives import Objective, next_token
from models.pretrained import load_tokenizer
from models.recipe import ExpectedErrors
from models.rendering import IGNORED, Audio

TOKENIZER: Any = load_tokenizer("bytes")
ROWS: list[dict[str, Any]] = [
    {"key": f"c{i}", "text": text, "labels": {}, "translation": {}, "caption": None, "conversations": None}
    for i, text in enumerate(["stop now", "turn on the light", "go"])
]
WORDS = st.lists(st.sampled_from("abc"), max_size=5)


# ---- the distance -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "hypothesis", "weights", "cost"),
    [
        ("call anna now", "call anna now", (1, 3, 1), 0),
        ("call anna now", "call hannah now", (1, 3, 1), 3),  # a wrong word costs what the right one weighs
        ("call anna now", "call now", (1, 3, 1), 3),  # so does a missing one
        ("call anna now", "please call anna now", (1, 3, 1), 1),  # one too many costs 1, whichever it is
        ("call anna now", "call anna anna now", (1, 3, 1), 1),
        ("anna call", "anna", (5, 1), 1),
        ("anna call", "call", (5, 1), 5),
        ("anna call", "bob", (5, 1), 6),
        ("anna", "bob call", (4,), 5),  # wrong and one too many
        ("anna call bob", "", (5, 1, 2), 8),
        ("", "call bob", (), 2),
        ("a b c", "b c a", (2, 1, 1), 3),  # `a` is missing in front and too many behind
        ("a b c", "b c a", (9, 1, 1), 4),  # cheaper: keep `a`, lose `b c` behind it, two too many in front
        ("", "", (), 0),
    ],
)
def test_weighted_errors_by_hand(reference: str, hypothesis: str, weights: tuple[float, ...], cost: float) -> None:
    assert weighted_errors(reference.split(), hypothesis.split(), [float(w) for w in weights]) == cost


@given(WORDS.filter(bool), WORDS)
def test_with_weights_of_one_they_are_the_word_errors_of_jiwer(reference: list[str], said: list[str]) -> None:
    counted = jiwer.process_words(" ".join(reference), " ".join(said))
    edits = counted.substitutions + counted.deletions + counted.insertions
    assert weighted_errors(reference, said, [1.0] * len(reference)) == edits


def least_cost(reference: list[str], said: list[str], weights: list[float]) -> float:
    """The least over all alignments, by trying each first edit."""

    @cache
    def rest(i: int, j: int) -> float:
        found = []
        if i < len(reference):
            found.append(weights[i] + rest(i + 1, j))
        if j < len(said):
            found.append(1.0 + rest(i, j + 1))
        if i < len(reference) and j < len(said):
            found.append((0.0 if reference[i] == said[j] else weights[i]) + rest(i + 1, j + 1))
        return min(found, default=0.0)

    return rest(0, 0)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 4)), max_size=5), WORDS)
def test_weighted_errors_are_the_least_over_all_alignments(weighed: list[tuple[str, int]], said: list[str]) -> None:
    reference, weights = [word for word, _ in weighed], [float(weight) for _, weight in weighed]
    assert weighted_errors(reference, said, weights) == least_cost(reference, said, weights)


# ---- the loss ---------------------------------------------------------------------------------------------------


@dataclass
class Clips:
    """A tiny model with clips that its encoder has heard."""

    model: SpeechLLM
    waves: list[Tensor]
    audios: list[Audio]

    def pairs(self, task: str = "asr", rows: tuple[int, ...] = (0, 1, 2)) -> list[Pair]:
        found: list[Pair] = []
        for i in rows:
            sample = samples_of(ROWS[i], task, others=[row for row in ROWS if row is not ROWS[i]])[0]
            clips = [self.audios[int(key[1:])] for key in sample.keys]
            found.append((self.model.render(TOKENIZER, list(sample.messages), clips), clips))
        return found


def clips_of(architecture: str) -> Clips:
    kind = load(architecture)
    model = kind.build(kind.preset("tiny"), TOKENIZER, seed=2)
    generator = torch.Generator().manual_seed(5)
    waves = [torch.randn(6000 + 3000 * i, generator=generator) * 0.1 for i in range(len(ROWS))]
    return Clips(model, waves, model.listen(waves))


@pytest.fixture
def funasr() -> Clips:
    return clips_of("funasr_llm")


@pytest.fixture
def seed_asr() -> Clips:
    """Its clips are waveforms: the encoder learns."""
    made = clips_of("seed_asr")
    encoder = made.model.encoder("speech")
    made.audios = [Audio(waveform=w, counts={"speech": encoder.output_length(len(w))}) for w in made.waves]
    return made


def batch_of(pairs: list[Pair], layout: Layout = "right") -> Batch:
    return collate(pairs, TOKENIZER.pad_token_id, layout)


def says(monkeypatch: pytest.MonkeyPatch, *groups: list[str]) -> None:
    """Let the samples of a batch be these answers."""
    ids = [[list(TOKENIZER(text, add_special_tokens=False)["input_ids"]) for text in group] for group in groups]
    monkeypatch.setattr(ExpectedWordErrors, "_sample", lambda *_: ids)


def objective(**settings: float) -> ExpectedWordErrors:
    return ExpectedWordErrors(TOKENIZER, ExpectedErrors.model_validate({"cross_entropy": 0.0} | settings))


def value(loss: Objective, clips: Clips, batch: Batch) -> float:
    return float(loss(clips.model, batch)[0].detach())


def log_probability(clips: Clips, row: int, answer: str) -> Tensor:
    """Of an answer and its end, token by token."""
    ((rendered, audio),) = clips.pairs(rows=(row,))
    first = next(i for i, label in enumerate(rendered.labels) if label != IGNORED)
    ids = [*TOKENIZER(answer, add_special_tokens=False)["input_ids"], TOKENIZER.eos_token_id]
    rendered.ids, rendered.labels = rendered.ids[:first] + ids, [IGNORED] * first + ids
    states = clips.model.hidden(batch_of([(rendered, audio)]))[0]
    logs = clips.model.llm.get_output_embeddings()(states).log_softmax(-1)
    return torch.stack([logs[first + i - 1, token] for i, token in enumerate(ids)]).sum()


def test_two_hypotheses_give_the_closed_form(funasr: Clips, monkeypatch: pytest.MonkeyPatch) -> None:
    """(2p - 1) (e1 - e2) / 2 a clip, times its labels, beside the weighed next-token loss."""
    texts = [(" stop now", " shop naw"), (" turn on thy light", " turn on the light"), (" go", " no")]
    says(monkeypatch, *map(list, texts))
    errors = [(0, 2), (1, 0), (0, 1)]
    batch = batch_of(funasr.pairs())
    loss, count = objective(cross_entropy=0.25)(funasr.model, batch)
    expected = torch.zeros(())
    for row, (one, other) in enumerate(texts):
        p = torch.sigmoid(log_probability(funasr, row, one) - log_probability(funasr, row, other))
        assert 0.01 < p < 0.99
        labels = len(f" {ROWS[row]['text']}") + 1
        expected = expected + labels * (2 * p - 1) * (errors[row][0] - errors[row][1]) / 2
    cross_entropy, labels_of = next_token(funasr.model, batch)
    assert float(loss.detach()) == pytest.approx(float(expected.detach() + 0.25 * cross_entropy.detach()), rel=1e-4)
    assert int(count) == int(labels_of) == sum(len(f" {row['text']}") + 1 for row in ROWS)


def test_a_step_makes_the_better_hypothesis_likelier(funasr: Clips, monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, [" stop naw", " stop now"])
    funasr.model.freeze(("connector", "lora"))

    def advantage() -> Tensor:
        return log_probability(funasr, 0, " stop now") - log_probability(funasr, 0, " stop naw")

    before = float(advantage().detach())
    objective()(funasr.model, batch_of(funasr.pairs(rows=(0,))))[0].backward()
    with torch.no_grad():
        for parameter in funasr.model.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad
    assert float(advantage().detach()) > before + 1e-3


def test_answers_with_the_same_errors_teach_nothing(funasr: Clips, monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, [" stop naw", " shop now", " stop not"])
    assert value(objective(), funasr, batch_of(funasr.pairs(rows=(0,)))) == pytest.approx(0, abs=1e-6)


def test_errors_on_words_of_the_context_count_more(seed_asr: Clips, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of the first clip holds both of its words, that of a plain prompt none."""
    says(monkeypatch, [" stop now", " stop naw"])
    found = {}
    for task in ("asr", "biased_asr"):
        batch = batch_of(seed_asr.pairs(task, (0,)))
        found[task] = [value(objective(keyword_weight=w), seed_asr, batch) for w in (1.0, 3.0)]
    assert found["asr"][0] == pytest.approx(found["asr"][1])
    assert found["biased_asr"][1] == pytest.approx(3 * found["biased_asr"][0], rel=1e-4)
    assert abs(found["biased_asr"][0]) > 1e-4


def test_empty_answers_are_hypotheses_like_others(funasr: Clips, monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, ["", " stop now"])
    with torch.no_grad():
        p = torch.sigmoid(log_probability(funasr, 0, "") - log_probability(funasr, 0, " stop now"))
    expected = (len(" stop now") + 1) * float(2 * p - 1) * (2 - 0) / 2
    assert value(objective(), funasr, batch_of(funasr.pairs(rows=(0,)))) == pytest.approx(expected, rel=1e-4)


# ---- sampling ---------------------------------------------------------------------------------------------------


def drawn(clips: Clips, monkeypatch: pytest.MonkeyPatch, answers: list[list[int]], **settings: float) -> float:
    """The loss of one clip whose samples are these ids."""
    monkeypatch.setattr(clips.model, "generate", lambda *_: answers)
    return value(objective(**settings), clips, batch_of(clips.pairs(rows=(0,))))


def test_answers_that_are_drawn_twice_count_once(funasr: Clips, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = (" stop now", " stop naw", " shop naw")
    one, other, third = (TOKENIZER(text, add_special_tokens=False)["input_ids"] for text in texts)
    each = drawn(funasr, monkeypatch, [one, other, third], hypotheses=3)
    assert abs(each) > 1e-3
    assert drawn(funasr, monkeypatch, [one, one, other, third, one], hypotheses=5) == pytest.approx(each)


def test_without_a_second_answer_there_is_next_token_loss_alone(funasr: Clips, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_of(funasr.pairs(rows=(0,)))
    alone = value(next_token, funasr, batch)
    assert drawn(funasr, monkeypatch, [[10]] * 4, cross_entropy=0.5) == pytest.approx(0.5 * alone)


def test_a_batch_without_labels_samples_nothing(funasr: Clips, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a worker without samples of a step has it: loss 0, and a gradient."""
    pairs = funasr.pairs()
    for rendered, _ in pairs:
        rendered.labels = [IGNORED] * len(rendered)
    monkeypatch.setattr(funasr.model, "generate", lambda *_: pytest.fail("nothing is to be answered"))
    funasr.model.freeze(("connector",))
    loss, count = objective(cross_entropy=1.0)(funasr.model, batch_of(pairs))
    loss.backward()
    assert float(loss.detach()) == int(count) == 0


def test_samples_follow_the_random_state_and_leave_the_mode_as_it_was(funasr: Clips) -> None:
    funasr.model.freeze(("connector",))
    funasr.model.train()
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(value(objective(), funasr, batch_of(funasr.pairs())))
    assert losses[0] == losses[1] != losses[2]
    assert funasr.model.training


# ---- what it shares ---------------------------------------------------------------------------------------------


def test_the_encoder_runs_once_and_learns(seed_asr: Clips, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = seed_asr.model.encoder("speech")
    runs: list[int] = []
    encoder.register_forward_hook(lambda _, inputs, output: runs.append(len(inputs[0])))
    seed_asr.model.freeze(("encoder", "connector"))
    torch.manual_seed(0)
    objective(hypotheses=3)(seed_asr.model, batch_of(seed_asr.pairs()))[0].backward()
    assert runs == [3]
    learning = {name: p for name, p in seed_asr.model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in learning.values())
    reached = [n for n, p in learning.items() if n.startswith("encoders") and p.grad is not None and p.grad.abs().max()]
    assert len(reached) > 20


def test_waveforms_give_the_loss_that_their_frames_give(seed_asr: Clips, monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, [" stop naw", " stop now"], [" turn on", " burn on"], [" go", " no"])
    live = value(objective(), seed_asr, batch_of(seed_asr.pairs()))
    with torch.no_grad():
        frames = seed_asr.model.encoder("speech")(seed_asr.waves)
    seed_asr.audios = [Audio({"speech": each}) for each in frames]
    assert value(objective(), seed_asr, batch_of(seed_asr.pairs())) == pytest.approx(live, rel=1e-4)


def test_layouts_agree(funasr: Clips, monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, [" stop naw", " stop now"], [" turn on", " burn on"], [" go", " no"])
    layouts: tuple[Layout, ...] = ("right", "left", "packed")
    found = [value(objective(cross_entropy=0.1), funasr, batch_of(funasr.pairs(), kind)) for kind in layouts]
    assert found == pytest.approx([found[0]] * 3, rel=1e-4)


def test_prompts_keep_their_clips_and_their_request() -> None:
    """Several clips a prompt (COSMIC), and a request that is read apart (WavLLM)."""
    pairs = clips_of("cosmic").pairs(rows=(0, 2))
    asked = expected_errors._asked(batch_of(pairs, "packed"))
    assert [each.clips.tolist() for each in asked] == [[0, 1, 2], [3, 4, 5]]
    for each, (rendered, _) in zip(asked, pairs, strict=True):
        assert each.prompt.ids + each.answer == rendered.ids
        assert each.prompt.clip_at == rendered.clip_at
        assert TOKENIZER.decode(each.prompt.ids).endswith("[/INST]")
    requests = clips_of("wavllm").pairs(rows=(0, 2))
    asked = expected_errors._asked(batch_of(requests))
    assert [each.prompt.instruction for each in asked] == [rendered.instruction for rendered, _ in requests]
    assert all(each.prompt.instruction for each in asked)
