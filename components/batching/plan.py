"""The order of a stage, computed before it starts: seed and sample lengths → one array of global batches.

The plan does not know how many workers there are: ranks take slices of a global batch (`rank_slice`), so a run that is
resumed on another number of workers sees the batches that it would have seen. The loader's whole state is one integer.
"""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from components.batching.mixture import draw, sample_weights
from components.batching.order import base_order, curriculum_order, difficulty
from components.batching.packing import bucket, pack
from components.batching.samples import Ints, Samples
from infra import storage
from infra.stores import shown
from models.recipe import Stage

Layout = Literal["bucketed", "packed"]
ARRAYS = {"order": ("I32", np.int32), "starts": ("I64", np.int64), "epochs": ("I32", np.int32)}
ARRAYS["left_out"] = ARRAYS["order"]


@dataclass(frozen=True)
class Plan:
    """Batch b is `order[starts[b]:starts[b + 1]]`: indices into the stage's samples.

    order: `(entries,)`, epoch after epoch. starts: `(batches + 1,)`. epochs: `(batches,)`, of each batch.
    left_out: samples that no batch may take: longer than `max_tokens` or `batch_tokens`, or without labels.
    """

    order: NDArray[np.int32]
    starts: NDArray[np.int64]
    epochs: NDArray[np.int32]
    left_out: NDArray[np.int32]
    layout: Layout

    def __len__(self) -> int:
        return len(self.epochs)

    def batch(self, step: int) -> NDArray[np.int32]:
        """The samples of a step, a view. IndexError if the plan has no such step."""
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of a plan of {len(self)} batches")
        return self.order[self.starts[step] : self.starts[step + 1]]


def plan_stage(stage: Stage, samples: Samples, seed: int, layout: Layout) -> Plan:
    """Order the samples of a stage into global batches of at most `stage.batch_tokens` tokens.

    The same inputs give the same plan. A fraction of an epoch is cut from its random order, so a curriculum still goes
    from easy to hard in it. ValueError for a curriculum order that there is not.
    """
    usable = (samples.tokens <= min(stage.max_tokens, stage.batch_tokens)) & (samples.labels > 0)
    weights = sample_weights(stage, samples, usable)
    ordered = stage.curriculum.order != "random" and stage.curriculum.epochs > 0
    scores = difficulty(stage, samples) if ordered else None
    orders, sizes, epochs = [], [], []
    left = stage.max_steps
    for epoch in range(math.ceil(stage.epochs)):
        scores = scores if epoch < stage.curriculum.epochs else None
        order, size = _plan_epoch(stage, samples, weights, scores, epoch, seed, layout, left)
        orders.append(order)
        sizes.append(size)
        epochs.append(np.full(len(size), epoch, dtype=np.int32))
        left = None if left is None else left - len(size)
        if left == 0:
            break
    return Plan(
        np.concatenate(orders),
        np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(np.concatenate(sizes))]),
        np.concatenate(epochs),
        np.flatnonzero(~usable).astype(np.int32),
        layout,
    )


def rank_slice(batch: Ints, rank: int, world: int) -> Ints:
    """The part of a global batch that one of `world` ranks computes; may be empty if the batch is small."""
    return batch[rank::world]


def _plan_epoch(
    stage: Stage,
    samples: Samples,
    weights: NDArray[np.float64],
    scores: NDArray[np.floating] | None,
    epoch: int,
    seed: int,
    layout: Layout,
    most: int | None,
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Order of an epoch and sizes of its batches, at most `most` of them; `scores`: what the curriculum sorts by."""
    rng = np.random.default_rng([seed, epoch])
    order = base_order(draw(weights, epoch), samples.shard, stage.mixing, rng)
    if stage.epochs < epoch + 1 and len(order):
        order = order[: max(1, round(len(order) * (stage.epochs - epoch)))]
    if scores is not None:
        order = curriculum_order(stage.curriculum, order, scores)
    tokens = samples.tokens[order]
    if layout == "packed":
        places, starts = pack(tokens, stage.batch_tokens, most)
    else:
        places, starts = bucket(tokens, stage.batch_tokens, rng if scores is None else None)
    starts = starts if most is None else starts[: most + 1]
    return order[places[: starts[-1]]], np.diff(starts)


# ---- files ----------------------------------------------------------------------------------------------------------


def save_plan(url: str, plan: Plan) -> None:
    """Write a plan as one safetensors file, in one atomic step; the same plan gives the same bytes."""
    with tempfile.TemporaryDirectory(dir=storage.scratch(url)) as folder:
        path = Path(folder) / "plan.safetensors"
        arrays = {name: np.ascontiguousarray(getattr(plan, name), dtype=kind) for name, (_, kind) in ARRAYS.items()}
        save_file(arrays, path, metadata={"layout": plan.layout})  # one entry only: of more the order is not fixed
        storage.upload(path, url)


def load_plan(url: str) -> Plan:
    """A saved plan; a local file is mapped into memory, so that opening it takes as long for every size.

    FileNotFoundError if there is none; ValueError for a file that is no plan or not all of one.
    """
    if storage.is_local(url):
        path = storage.local_path(url)
        empty = path.stat().st_size == 0  # which cannot be mapped
        data = np.zeros(0, dtype=np.uint8) if empty else np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
    else:
        data = np.frombuffer(storage.read_bytes(url), dtype=np.uint8)
    try:
        return _parse(data)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{shown(url)} is no whole plan ({error}): remove it and run the stage again") from error


def _parse(data: NDArray[np.uint8]) -> Plan:
    """The arrays in the bytes of a safetensors file, as views. Raises as `load_plan` expects."""
    size = int.from_bytes(data[:8].tobytes(), "little")
    if not 0 < size <= len(data) - 8:
        raise ValueError("its header is cut off")
    header = json.loads(data[8 : 8 + size].tobytes())
    layout = header.pop("__metadata__")["layout"]
    arrays = {name: _array(data[8 + size :], name, header[name]) for name in ARRAYS}
    order, starts, epochs = arrays["order"], arrays["starts"], arrays["epochs"]
    if layout not in get_args(Layout) or len(starts) != len(epochs) + 1 or starts[0] != 0 or starts[-1] != len(order):
        raise ValueError("its arrays do not belong together")
    return Plan(**arrays, layout=layout)


def _array(body: NDArray[np.uint8], name: str, entry: dict[str, Any]) -> NDArray[Any]:
    code, kind = ARRAYS[name]
    start, end = entry["data_offsets"]
    found = body[start:end]
    if entry["dtype"] != code or len(found) != end - start or entry["shape"] != [len(found) // np.dtype(kind).itemsize]:
        raise ValueError(f"array {name} is cut off or of another type")
    array: NDArray[Any] = found.view(kind)
    if not array.flags.aligned:  # our files always are; slow or fatal on some machines where not
        raise ValueError(f"array {name} does not begin at a multiple of its item size")
    return array
