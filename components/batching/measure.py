"""How long the samples of a stage are, known before the stage starts: from the index and the lengths of the features.

Every sample is rendered once, as training renders it, with audio of the right length and no content. The result is
saved with the run as `samples.parquet`, so that a stage that is resumed does not measure again.
"""

from __future__ import annotations

import io
import json
from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from components.batching.samples import Samples
from components.curriculum.examples import NONE, Examples, collection
from components.curriculum.tasks import TaskSample
from components.shards.arrays import read_parquet
from infra import storage
from models.recipe import Stage
from models.rendering import IGNORED, Audio, Rendered

ReadAudio = Callable[[str], Audio]  # key of a clip -> its cached features or units
Render = Callable[[TaskSample, Sequence[Audio]], Rendered]
LABEL_IDS = "label_ids"  # metadata of samples.parquet
ARRAYS = ("row", "task", "collection", "shard", "tokens", "labels", "seconds", "audio")
TYPES = {"row": "i4", "task": "i2", "collection": "i2", "shard": "i4", "tokens": "i4", "labels": "i4", "seconds": "f4"}
CODES = {"i4": "i", "i2": "h", "f4": "f"}  # of array, which keeps numbers of a million samples as small as numpy does


def measure(
    stage: Stage, rows: Iterable[dict[str, Any]], lengths: ReadAudio, render: Render, examples: Examples = NONE
) -> Samples:
    """All samples that the stage's tasks make of the rows; `lengths` gives audio of the right length for a key."""
    tasks: dict[str, int] = {}
    collections: dict[str, int] = {}
    shards: dict[str, int] = {}
    columns: dict[str, array[Any]] = {name: array(CODES[TYPES[name]] if name in TYPES else "b") for name in ARRAYS}
    measures: dict[str, array[float]] = {}
    label_ids: set[int] = set()
    for number, row in enumerate(rows):
        own = lengths(row["key"])
        for sample in examples.samples(row, stage.tasks, stage.phrasings):
            clips = [*map(lengths, sample.keys[:-1]), own]
            rendered = render(sample, clips)
            values = (
                number,
                tasks.setdefault(sample.task, len(tasks)),
                collections.setdefault(collection(row), len(collections)),
                shards.setdefault(row.get("shard", ""), len(shards)),
                len(rendered),
                label_count(stage, rendered),
                row["seconds"],
                bool(rendered.clip_at) or own.units is not None,
            )
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
            if stage.loss == "ctc":
                label_ids.update(ctc_labels(rendered))
            for name, measured in _measured(row):
                measures.setdefault(name, array("f")).append(measured)
    arrays = {name: np.array(columns[name], dtype=TYPES.get(name, "?")) for name in ARRAYS}
    return Samples(
        **arrays,
        tasks=tuple(tasks),
        collections=tuple(collections),
        measures={n: np.array(v, dtype="f4") for n, v in measures.items() if len(v) == len(columns["row"])},
        label_ids=np.array(sorted(label_ids), dtype=np.int64),
    )


def label_count(stage: Stage, rendered: Rendered) -> int:
    """Tokens of a sample that carry loss; 0 where CTC has too few positions for them, so that it is left out."""
    if stage.loss == "ctc":
        return len(ctc_labels(rendered)) if alignable(rendered) else 0
    if stage.loss == "letters":
        return len(ctc_labels(rendered))
    return sum(label != IGNORED for label in rendered.labels[1:])  # the first token is never predicted


def ctc_labels(rendered: Rendered) -> list[int]:
    return [label for label in rendered.labels if label != IGNORED][:-1]  # the end token is the blank


def alignable(rendered: Rendered) -> bool:
    """Whether CTC has a position for each label and one more between equal ones."""
    labels = ctc_labels(rendered)
    return len(labels) + sum(one == other for one, other in pairwise(labels)) <= len(rendered.audio_at)


def save_samples(url: str, samples: Samples) -> None:
    """Write `samples.parquet`: names of tasks and data sets as dictionaries, measures as `measure:<name>`."""
    columns: dict[str, Any] = {name: pa.array(getattr(samples, name)) for name in ARRAYS}
    for name, names in (("task", samples.tasks), ("collection", samples.collections)):
        columns[name] = pa.DictionaryArray.from_arrays(
            pa.array(getattr(samples, name), pa.int16()), pa.array(names, pa.string())
        )
    columns |= {f"measure:{name}": pa.array(values) for name, values in samples.measures.items()}
    buffer = io.BytesIO()
    table = pa.table(columns).replace_schema_metadata({LABEL_IDS: json.dumps(samples.label_ids.tolist())})
    pq.write_table(table, buffer, compression="zstd")
    storage.write_bytes(url, buffer.getvalue())


def load_samples(url: str) -> Samples:
    """What `save_samples` wrote. ValueError that names the file if it is damaged."""
    try:
        table = read_parquet(storage.read_bytes(url), coded=["task", "collection"])
        coded = {name: table.column(name).combine_chunks() for name in ("task", "collection")}
        arrays = {name: table.column(name).to_numpy() for name in ARRAYS if name not in coded}
        label_ids = np.array(json.loads(table.schema.metadata[LABEL_IDS.encode()]), dtype=np.int64)
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise ValueError(f"{url} cannot be read ({error}): remove its folder and train again") from error
    names = {name: tuple(_dictionary(column).to_pylist()) for name, column in coded.items()}
    codes = {name: np.asarray(_codes(column), dtype=TYPES[name]) for name, column in coded.items()}
    found = [name for name in table.column_names if name.startswith("measure:")]
    return Samples(
        **arrays,
        **codes,
        tasks=names["task"],
        collections=names["collection"],
        measures={name.partition(":")[2]: table.column(name).to_numpy() for name in found},
        label_ids=label_ids,
    )


def _dictionary(column: Any) -> Any:
    return column.dictionary


def _codes(column: Any) -> Any:
    return column.indices.to_numpy()


def _measured(row: dict[str, Any]) -> Sequence[tuple[str, float]]:
    """Numeric columns of the index; `text_length` also where a row has the text alone."""
    found = {name: float(v) for name, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    found.setdefault("text_length", float(len(row.get("text") or "")))
    return list(found.items())
