"""Cached features into batches, from our store and through WebDataset: `python tests/benchmarks/feature_reading.py`.

The same arrays lie as a feature cache (written by the cache stage's own functions) and as WebDataset tars of `.npy`
(bfloat16 as its 16 bits). Both come out as the batches of the collation, `(clips, longest, width)` bfloat16, in stored
order: ours by `FeatureStore.load` in this process, theirs by `webdataset` and a `DataLoader` whose two workers decode,
pad, and hand over shared memory. The workers are running, and have read everything once, before the clock starts.

The runs alternate, the files are in the page cache. A number is the median of the repeats, in GB of features (padding
not counted) per second. The first pass of a store maps the shards and checks every clip.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

for folder in (".", "tests/features"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / folder))

import numpy as np
import torch
import webdataset
from feature_helpers import HOP, SmallEncoder
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader

from components.features.extract import Target, _publish
from components.features.key import feature_key
from components.features.store import FeatureStore, publish_features
from components.schema import AudioManifest, ShardInfo
from models.batch import padded

WIDTH = 384
CLIPS = 32  # in a batch
WORKERS = 2
Batch = tuple[list[str], Tensor]  # keys, and features `(clips, longest, width)`


def write_both(folder: Path, shards: int, clips: int) -> tuple[FeatureStore, list[str]]:
    """`shards` of `clips` clips with 50 to 500 random frames, as a feature cache and as WebDataset tars."""
    encoder, root, urls = SmallEncoder(width=WIDTH), str(folder / "cache"), []
    infos = [ShardInfo(name=f"shard-{i:06d}.tar", sha256="", bytes=0, samples=clips, seconds=0) for i in range(shards)]
    random = torch.Generator().manual_seed(0)
    for info in infos:
        lengths = torch.randint(50, 501, (clips,), generator=random).tolist()
        keys = [f"{info.name[6:12]}-{i:04d}" for i in range(clips)]
        features = [torch.randn(n, WIDTH, generator=random).bfloat16() for n in lengths]
        urls.append(write_webdataset(folder / info.name, keys, features))
        write_shard(info, keys, features, Target(encoder, root), folder)
    audio = AudioManifest(
        dataset="noise",
        version="0",
        digest="",
        shards=tuple(infos),
        samples=shards * clips,
        seconds=0,
        rejected=0,
        splits={},
        config={},
        sources=(),
        licences={},
    )
    publish_features(root, feature_key(encoder), audio)
    return FeatureStore(root), urls


def write_shard(shard: ShardInfo, keys: list[str], features: list[Tensor], target: Target, folder: Path) -> None:
    """What the cache stage does once the features of a shard are there."""
    places = []
    with open(folder / "spool", "w+b") as spool:
        for frames in features:
            places.append((spool.tell(), spool.write(save({"features": frames}))))
        rows = [{"key": key, "samples": HOP * len(frames)} for key, frames in zip(keys, features, strict=True)]
        _publish(shard, rows, target, spool, places, folder)


def write_webdataset(path: Path, keys: list[str], features: list[Tensor]) -> str:
    with webdataset.TarWriter(str(path)) as tar:
        for key, frames in zip(keys, features, strict=True):
            tar.write({"__key__": key, "npy": frames.view(torch.int16).numpy()})
    return str(path)


def ours(store: FeatureStore) -> Iterator[Batch]:
    keys = store.keys()
    for start in range(0, len(keys), CLIPS):
        part = keys[start : start + CLIPS]
        yield part, padded([store.load(key) for key in part])


def resident(clips: dict[str, Tensor]) -> Iterator[Batch]:
    """What memory gives: the same batches from tensors that are there already."""
    keys = list(clips)
    for start in range(0, len(keys), CLIPS):
        part = keys[start : start + CLIPS]
        yield part, padded([clips[key] for key in part])


def theirs(urls: list[str]) -> Iterable[Batch]:
    dataset = webdataset.WebDataset(urls, shardshuffle=False).decode().to_tuple("__key__", "npy")
    batches = dataset.batched(CLIPS, collation_fn=pad_arrays)
    return DataLoader(batches, batch_size=None, num_workers=WORKERS, persistent_workers=True)


def pad_arrays(samples: list[tuple[str, np.ndarray[Any, Any]]]) -> Batch:
    return [key for key, _ in samples], padded([torch.from_numpy(a).view(torch.bfloat16) for _, a in samples])


def seconds(batches: Iterable[Batch], expected: int) -> float:
    """Seconds to go through all batches; the last frame of each batch is looked at."""
    began, found = time.perf_counter(), 0
    for keys, features in batches:
        features[-1, -1, -1].item()
        found += len(keys)
    taken = time.perf_counter() - began
    assert found == expected, (found, expected)
    return taken


def check_same(store: FeatureStore, batches: Iterable[Batch]) -> None:
    """Both give the same numbers to the bit."""
    for keys, features in batches:
        for key, row in zip(keys, features, strict=True):
            clip = store.load(key)
            assert torch.equal(row[: len(clip)].view(torch.int16), clip.view(torch.int16)), key
            assert not row[len(clip) :].any(), key


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--clips", type=int, default=180, help="in a shard")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store, urls = write_both(Path(folder), given.shards, given.clips)
        size = store.manifest.frames * WIDTH * 2 / 1e9
        print(f"{len(store):,} clips of 50 to 500 frames, width {WIDTH} bfloat16: {size:.2f} GB; batches of {CLIPS}")
        loader = theirs(urls)
        check_same(store, loader)
        check_same(store, ours(store))
        clips = {key: store.load(key).clone() for key in store.keys()}
        taken: dict[str, list[float]] = {name: [] for name in ("first", "ours", "theirs", "memory")}

        def run(name: str, batches: Callable[[], Iterable[Batch]]) -> None:
            taken[name].append(size / seconds(batches(), len(store)))

        for _ in range(given.repeats):
            fresh = FeatureStore(store.root)
            run("first", lambda: ours(fresh))
            run("ours", lambda: ours(fresh))
            run("theirs", lambda: loader)
            run("memory", lambda: resident(clips))
    report({name: statistics.median(rates) for name, rates in taken.items()}, taken)


def report(rate: dict[str, float], taken: dict[str, list[float]]) -> None:
    titles = {
        "first": "FeatureStore, first pass (crc32)",
        "ours": "FeatureStore, later passes",
        "theirs": f"WebDataset + DataLoader({WORKERS})",
        "memory": "tensors in memory",
    }
    for name, title in titles.items():
        spread = f"{min(taken[name]):.2f} to {max(taken[name]):.2f}"
        print(f"{title:<34}{rate[name]:>7.2f} GB/s  ({spread}){rate[name] / rate['theirs']:>8.1f} x WebDataset")


if __name__ == "__main__":
    main()
