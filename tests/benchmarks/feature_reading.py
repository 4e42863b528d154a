"""Cached features into batches, from our store and through WebDataset: `python tests/benchmarks/feature_reading.py`.

The same arrays lie as a feature cache (written by the cache stage's own functions) and as WebDataset tars of `.npy`
(bfloat16 as its 16 bits). Both come out in stored order as bfloat16 batches: packed `(frames of all clips, width)`, and
padded `(clips, longest, width)` by the collation's own function. Ours come by `FeatureStore.load` in this process, and
are packed into one buffer that is kept; theirs by `webdataset` and a `DataLoader` whose two workers decode, lay out and
hand over shared memory. The workers are running, and have read everything once, before the clock starts.

The runs alternate, the files are in the page cache. A number is the median of the repeats, in GB of features (padding
not counted) per second. The first pass of a store maps the shards and checks every clip. "Memory" is what the same
layout takes from tensors that are there already. torch gets one thread, as in a DataLoader's worker: its threads wait
for each other at every clip, which on cores that others use as well takes ten times as long as to copy it.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "features"))

import numpy as np
import torch
import webdataset
from feature_helpers import HOP, SmallEncoder
from measuring import Comparison, machine, middle, verdict
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader

from components.features.extract import Target, _publish
from components.features.key import feature_key
from components.features.store import FeatureStore, publish_features
from components.schema import AudioManifest, ShardInfo
from models.batch import padded

WIDTH = 384
BAR = 10.0
CLIPS = 32  # in a batch
WORKERS = 2
LONGEST = 500  # frames
TITLES = {
    "first": "FeatureStore, first pass, crc32",
    "ours": "FeatureStore, later passes",
    "theirs": f"WebDataset, DataLoader({WORKERS})",
    "memory": "memory",
}
Batch = tuple[list[str], Tensor]  # keys, and features as they are laid out
Lay = Callable[[list[Tensor]], Tensor]


def write_both(folder: Path, shards: int, clips: int) -> tuple[FeatureStore, list[str]]:
    """`shards` of `clips` clips with 50 to 500 random frames, as a feature cache and as WebDataset tars."""
    encoder, root, urls = SmallEncoder(width=WIDTH), str(folder / "cache"), []
    infos = [ShardInfo(name=f"shard-{i:06d}.tar", sha256="", bytes=0, samples=clips, seconds=0) for i in range(shards)]
    random = torch.Generator().manual_seed(0)
    for info in infos:
        lengths = torch.randint(50, LONGEST + 1, (clips,), generator=random).tolist()
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


def stored(store: FeatureStore, lay: Lay) -> Iterator[Batch]:
    return laid_out(store.keys(), store.load, lay)


def laid_out(keys: list[str], load: Callable[[str], Tensor], lay: Lay) -> Iterator[Batch]:
    for start in range(0, len(keys), CLIPS):
        part = keys[start : start + CLIPS]
        yield part, lay([load(key) for key in part])


def workers(urls: list[str], lay: Lay) -> Iterable[Batch]:
    def arrays(samples: list[tuple[str, np.ndarray[Any, Any]]]) -> Batch:
        return [key for key, _ in samples], lay([torch.from_numpy(a).view(torch.bfloat16) for _, a in samples])

    dataset = webdataset.WebDataset(urls, shardshuffle=False).decode().to_tuple("__key__", "npy")
    batches = dataset.batched(CLIPS, collation_fn=arrays)
    return DataLoader(batches, batch_size=None, num_workers=WORKERS, persistent_workers=True)


def packer(frames: int) -> Lay:
    """Packs clips into a buffer of that many frames, which the next batch overwrites."""
    buffer = torch.zeros(frames, WIDTH, dtype=torch.bfloat16)
    return lambda clips: torch.cat(clips, out=buffer[: sum(map(len, clips))])


def seconds(batches: Iterable[Batch], expected: int) -> float:
    """Seconds to go through all batches and look at the last number of each; AssertionError if clips are missing."""
    began, found = time.perf_counter(), 0
    for keys, features in batches:
        features.flatten()[-1].item()
        found += len(keys)
    taken = time.perf_counter() - began
    assert found == expected, (found, expected)
    return taken


def check_same(store: FeatureStore, batches: Iterable[Batch], lay: Lay) -> None:
    """AssertionError if what WebDataset gives is not ours to the bit."""
    for keys, features in batches:
        expected = lay([store.load(key) for key in keys])
        assert torch.equal(features.view(torch.int16), expected.view(torch.int16)), keys


def measure(store: FeatureStore, urls: list[str], layout: str, repeats: int) -> dict[str, list[float]]:
    """GB/s of each way in each repeat."""
    lay = packer(CLIPS * LONGEST) if layout == "packed" else padded
    loader = workers(urls, torch.cat if layout == "packed" else padded)
    check_same(store, loader, lay)
    clips = {key: store.load(key).clone() for key in store.places}
    size = store.manifest.frames * WIDTH * 2 / 1e9
    rates: dict[str, list[float]] = {name: [] for name in TITLES}
    for _ in range(repeats):
        fresh = FeatureStore(store.root)
        ways = {
            "first": stored(fresh, lay),
            "ours": stored(fresh, lay),
            "theirs": loader,
            "memory": laid_out(list(clips), clips.__getitem__, lay),
        }
        for name, batches in ways.items():
            rates[name].append(size / seconds(batches, len(store)))
    return rates


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--clips", type=int, default=180, help="in a shard")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        store, urls = write_both(Path(folder), given.shards, given.clips)
        print(f"{len(store):,} clips, {store.manifest.frames:,} frames of {WIDTH} bfloat16, batches of {CLIPS} clips")
        print(machine())
        rates = {layout: measure(store, urls, layout, given.repeats) for layout in ("packed", "padded")}
        for layout, ways in rates.items():
            theirs = statistics.median(ways["theirs"])
            print(f"\n{layout:<36}{'GB/s':<24}x WebDataset")
            for name, found in ways.items():
                print(
                    f"{TITLES[name]:<36}{middle(found, '.2f'):<24}{statistics.median(found) / theirs:>12.1f}",
                    flush=True,
                )
    compared = Comparison(rates["packed"]["theirs"], rates["packed"]["ours"])
    return verdict("feature_reading (packed, later passes)", compared.ratio, BAR, compared.drift)


if __name__ == "__main__":
    sys.exit(main())
