"""Lengths known before training: those of the batches that training makes, for every task, and the same from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from components.batching.loader import batch_of, pad_id, renderer, stage_data
from components.batching.measure import alignable, collection, label_count, load_samples, measure, save_samples
from components.batching.plan import plan_stage
from components.batching.samples import Samples
from components.batching.stage_plan import lengths_only
from models.architectures import load
from models.pretrained import load_tokenizer
from models.recipe import Stage
from models.rendering import IGNORED, Audio, Rendered

FRAMES = {"a": 30, "b": 8, "c": 21, "d": 40}


def row(key: str, original: str, shard: int = 0, **given: Any) -> dict[str, Any]:
    plain = {"text": None, "labels": {}, "translation": {}, "caption": None, "conversations": None}
    place = {"key": key, "seconds": FRAMES[key] / 10, "original": original, "shard": f"shard-{shard:06d}.tar"}
    return plain | place | given


ROWS = [
    row("a", "digits/one/a.wav", text="turn on the light", labels={"intent": "on", "room": "hall"}),
    row("b", "books/b.flac", text="no", snr=12.5),
    row("c", "c.wav", shard=1, caption="a dog barks"),
    row("d", "books/d.flac", shard=1, text="geht es", translation={"en": "is it possible"}),
]


def stage(loss: Any = "lm", **tasks: float) -> Stage:
    tasks = tasks or {"asr": 1.0}
    return Stage(name="s", train=("connector",), loss=loss, tasks=tasks, batch_tokens=400)


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any]:
    architecture = load("funasr_llm")
    preset = architecture.preset("tiny")
    tokenizer = load_tokenizer(preset.backbone.tokenizer)
    return architecture.build(preset, tokenizer, encoders=False), tokenizer


def lengths(key: str) -> Audio:
    return Audio(lengths_only({"speech": FRAMES[key]}))


def content(key: str) -> Audio:
    return Audio({"speech": torch.randn(FRAMES[key], 32)})


def same(one: Samples, other: Samples) -> None:
    for name in Samples.__dataclass_fields__:
        left, right = getattr(one, name), getattr(other, name)
        if name == "measures":
            assert left.keys() == right.keys()
            assert all(left[k].tolist() == right[k].tolist() and left[k].dtype == right[k].dtype for k in left)
        elif isinstance(left, np.ndarray):
            assert (left.tolist(), left.dtype) == (right.tolist(), right.dtype), name
        else:
            assert left == right, name


def test_one_sample_for_each_task_that_a_row_has_something_for(parts: Any) -> None:
    samples = measure(stage(asr=1, labels=1, caption=1, translation=1), ROWS, lengths, renderer(*parts))
    assert samples.row.tolist() == [0, 0, 0, 1, 2, 3, 3]
    assert [samples.tasks[i] for i in samples.task] == [
        *("asr", "label:intent", "label:room", "asr", "caption", "asr", "translate:en")
    ]
    assert [samples.collections[i] for i in samples.collection] == [*["digits"] * 3, "books", "", "books", "books"]
    assert samples.shard.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert samples.seconds.tolist() == pytest.approx([3.0, 3.0, 3.0, 0.8, 2.1, 4.0, 4.0])
    assert samples.audio.all()


def test_lengths_are_those_of_the_batches(parts: Any) -> None:
    """Measured without reading a feature; the batch is made with them."""
    model, tokenizer = parts
    asked = stage(asr=1, labels=1, caption=1, translation=1)
    samples = measure(asked, ROWS, lengths, renderer(model, tokenizer))
    data = stage_data(asked, ROWS, model, tokenizer, content, seed=0)
    same(samples, data.samples)
    for number in range(len(samples)):
        alone = batch_of(data, np.array([number]))
        assert alone.ids.shape == (1, samples.tokens[number])
        assert alone.label_tokens == samples.labels[number]
    assert pad_id(tokenizer) == tokenizer.pad_token_id


def test_ctc_counts_letters_and_leaves_out_what_has_too_few_positions(parts: Any) -> None:
    model, tokenizer = parts
    samples = measure(stage("ctc"), ROWS, lengths, renderer(model, tokenizer))
    assert samples.row.tolist() == [0, 1, 3]
    # Two frames a position, a byte a label, a space before the text: 18 labels into 15, 3 into 4, 8 into 20.
    assert samples.labels.tolist() == [0, 3, 8]
    letters = sorted({*tokenizer(" turn on the light no geht es", add_special_tokens=False)["input_ids"]})
    assert samples.label_ids.tolist() == letters
    assert plan_stage(stage("ctc"), samples, 0, "packed").left_out.tolist() == [0]


@pytest.mark.parametrize(("labels", "positions", "fits"), [([5, 6], 2, True), ([5, 5], 2, False), ([5, 5], 3, True)])
def test_ctc_needs_a_position_between_equal_labels(labels: list[int], positions: int, fits: bool) -> None:
    end = 1
    rendered = Rendered().audio(positions, filler=0).tokens([*labels, end], learn=True)
    assert alignable(rendered) == fits
    assert label_count(stage("ctc"), rendered) == (len(labels) if fits else 0)


def test_the_first_token_is_never_predicted() -> None:
    rendered = Rendered().tokens([4, 5, 6], learn=True)
    assert label_count(stage(), rendered) == 2
    assert rendered.labels.count(IGNORED) == 0


def test_a_measure_orders_only_if_every_sample_has_it(parts: Any) -> None:
    samples = measure(stage(), ROWS, lengths, renderer(*parts))
    assert set(samples.measures) == {"seconds", "text_length"}  # `snr` is known of one row alone
    assert samples.measures["text_length"].tolist() == [17, 2, 7]


def test_the_data_set_of_a_row_is_its_first_folder() -> None:
    assert [collection({"original": path}) for path in ("a/b/c.wav", "c.wav", "")] == ["a", "", ""]
    assert collection({}) == ""


@pytest.mark.parametrize("loss", ["lm", "ctc"])
def test_saved_samples_are_the_same_and_so_are_their_bytes(tmp_path: Path, parts: Any, loss: str) -> None:
    samples = measure(stage(loss), ROWS, lengths, renderer(*parts))
    urls = [str(tmp_path / name) for name in ("one.parquet", "two.parquet")]
    for url in urls:
        save_samples(url, samples)
    same(samples, load_samples(urls[0]))
    assert Path(urls[0]).read_bytes() == Path(urls[1]).read_bytes()


def test_no_samples_are_saved_as_well(tmp_path: Path, parts: Any) -> None:
    url = str(tmp_path / "samples.parquet")
    save_samples(url, measure(stage(caption=1), ROWS[:2], lengths, renderer(*parts)))
    assert len(load_samples(url)) == 0


@pytest.mark.parametrize("size", [0, 10, -20])
def test_a_damaged_file_is_named(tmp_path: Path, parts: Any, size: int) -> None:
    path = tmp_path / "samples.parquet"
    save_samples(str(path), measure(stage(), ROWS, lengths, renderer(*parts)))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"samples\.parquet cannot be read .*train again"):
        load_samples(str(path))
