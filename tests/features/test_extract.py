from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from feature_helpers import SmallEncoder, make_audio, make_cache, rows_of
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load
from torch import Tensor

import components.features.extract as extract
from components.digest import digest_file
from components.features.extract import Target, encode_clips, extract_all, extract_shard, plan_batches
from components.features.form import BF16, Form
from components.features.key import form_for
from components.features.store import FeatureStore
from components.features.units import assign
from components.schema import ShardInfo
from components.shards.reader import ShardReader
from models.encoders import EncoderSpec, build_encoder
from models.encoders.encodec import codes_of

LENGTHS = [[0.3, 2.0, 0.05, 1.1, 1.1, 3.7, 0.9, 0.31], [1.0, 0.2, 2.4]]


def tar_digest(root: Path) -> str:
    return digest_file(root / "shard-000000.tar")


@given(st.lists(st.integers(1, 30 * 16_000), max_size=60), st.integers(1, 60))
def test_batches_hold_each_clip_once_within_the_budget(samples: list[int], budget: int) -> None:
    batches = plan_batches(samples, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(samples)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(samples[i] for i in batch) <= budget * 16_000
    order = [samples[i] for batch in batches for i in batch]
    assert order == sorted(order, reverse=True)


def test_padding_is_nearly_none(tmp_path: Path) -> None:
    audio, index = make_audio(tmp_path / "audio", [[1 + 7 * (i * 37 % 64) / 64 for i in range(64)]])
    encoder = SmallEncoder()
    extract_shard(audio.shards[0], index, str(tmp_path / "audio"), encoder, str(tmp_path / "features"))
    assert encoder.padded_samples / sum(row["samples"] for row in index) < 1.06
    assert encoder.calls < 20


def test_cached_is_live_to_the_rounding_of_bf16(tmp_path: Path) -> None:
    audio, index = make_audio(tmp_path / "audio", LENGTHS)
    encoder = SmallEncoder(pool=3)
    store = make_cache(tmp_path / "lake", encoder, audio, index, tmp_path / "audio")
    reader = ShardReader(str(tmp_path / "audio"))
    assert store.keys() == [row["key"] for row in index]
    for row in index:
        cached = store.load(row["key"])
        live = encode_clips(encoder, [torch.from_numpy(reader.waveform(row))])[0]
        assert cached.dtype == torch.bfloat16
        assert len(cached) == store.frames(row["key"]) == encoder.output_length(row["samples"])
        assert ((cached.float() - live).abs() <= live.abs() * 2**-8 + 1e-6).all()


def test_the_bytes_are_the_same_on_every_run_alone_or_with_another_encoder(tmp_path: Path) -> None:
    audio, index = make_audio(tmp_path / "audio", LENGTHS[:1])
    shard, source = audio.shards[0], str(tmp_path / "audio")
    encoder, other = SmallEncoder(), SmallEncoder(seed=1, pool=2)
    parts = [extract_shard(shard, index, source, encoder, str(tmp_path / name)) for name in ("a", "b")]
    both = extract_all(shard, index, source, [Target(other, str(tmp_path / "c")), Target(encoder, str(tmp_path / "d"))])
    assert parts[0] == parts[1] == both[1]
    assert tar_digest(tmp_path / "a") == tar_digest(tmp_path / "d") == parts[0].shard.sha256 == both[1].shard.sha256
    records = [(tmp_path / name / "parts/shard-000000.json").read_bytes() for name in "abd"]
    assert records == records[:1] * 3
    assert both[0].frames == sum(other.output_length(row["samples"]) for row in index)


def test_audio_is_decoded_once_for_several_encoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    audio, index = make_audio(tmp_path / "audio", LENGTHS[:1])
    decoded: list[str] = []
    whole = ShardReader.waveform
    monkeypatch.setattr(ShardReader, "waveform", lambda self, row: decoded.append(row["key"]) or whole(self, row))
    targets = [Target(SmallEncoder(seed=i), str(tmp_path / str(i))) for i in range(3)]
    extract_all(audio.shards[0], index, str(tmp_path / "audio"), targets)
    assert sorted(decoded) == sorted(row["key"] for row in index)


def test_a_finished_part_is_reused_until_its_audio_or_tar_changes(tmp_path: Path) -> None:
    audio, index = make_audio(tmp_path / "audio", LENGTHS[:1])
    encoder, root = SmallEncoder(), tmp_path / "features"

    def run(shard: ShardInfo, rows: list[dict[str, Any]]) -> tuple[bool, bool]:
        calls = encoder.calls
        return extract_shard(shard, rows, str(tmp_path / "audio"), encoder, str(root)).reused, encoder.calls > calls

    assert run(audio.shards[0], index) == (False, True)
    assert run(audio.shards[0], index) == (True, False)
    before = tar_digest(root)
    (root / "shard-000000.tar").write_bytes((root / "shard-000000.tar").read_bytes()[:-512])
    assert run(audio.shards[0], index) == (False, True)
    assert tar_digest(root) == before
    other, other_index = make_audio(tmp_path / "audio", LENGTHS[:1], seed=5)
    assert run(other.shards[0], other_index) == (False, True)
    assert tar_digest(root) != before


@pytest.mark.parametrize("point", ["start", "write_tar", "upload", "write_part"])
def test_a_kill_at_any_point_and_a_second_run_give_the_same_bytes(
    point: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audio, index = make_audio(tmp_path / "audio", [[2.0, 30.0, 1.0, 14.0, 20.0]])
    shard, source, encoder = audio.shards[0], str(tmp_path / "audio"), SmallEncoder()
    undisturbed = extract_shard(shard, index, source, encoder, str(tmp_path / "whole"))
    calls = 0
    real = getattr(extract, point)

    def killed(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if point != "start" or calls == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(extract, point, killed)
        with pytest.raises(KeyboardInterrupt):
            extract_shard(shard, index, source, encoder, str(tmp_path / "killed"))
    assert not (tmp_path / "killed/parts/shard-000000.json").exists()
    again = extract_shard(shard, index, source, encoder, str(tmp_path / "killed"))
    assert again == undisturbed
    assert not again.reused
    assert list((tmp_path / "killed/.scratch").iterdir()) == []
    assert tar_digest(tmp_path / "killed") == tar_digest(tmp_path / "whole")


def test_units_are_int32_of_the_live_frames(tmp_path: Path) -> None:
    audio, index = make_audio(tmp_path / "audio", LENGTHS[:1])
    encoder, codebook = SmallEncoder(), torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    part = extract_shard(audio.shards[0], index, str(tmp_path / "audio"), encoder, str(tmp_path / "units"), codebook)
    assert (part.kind, part.width) == ("units", 5)
    tar, reader = (tmp_path / "units/shard-000000.tar").read_bytes(), ShardReader(str(tmp_path / "audio"))
    for row, source in zip(part.rows, index, strict=True):
        units = load(tar[row.offset : row.offset + row.size])["units"]
        live = encode_clips(encoder, [torch.from_numpy(reader.waveform(source))])[0]
        assert units.dtype == torch.int32 and units.tolist() == assign(live, codebook).tolist()


def test_full_windows_divide_a_batch_of_short_clips(tmp_path: Path) -> None:
    class Window(SmallEncoder):
        largest = 0

        def frames_of(self, samples: int) -> int:
            return 1500

        def encode(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
            self.largest = max(self.largest, len(waveforms))
            return torch.ones(len(waveforms), 1500, self.width)

    audio, index = make_audio(tmp_path / "audio", [[0.5] * 20])
    encoder = Window()
    extract_shard(audio.shards[0], index, str(tmp_path / "audio"), encoder, str(tmp_path / "features"))
    assert encoder.largest == 1


def test_damaged_audio_is_named_with_the_remedy(tmp_path: Path) -> None:
    audio, index = make_audio(tmp_path / "audio", LENGTHS[:1])
    tar = tmp_path / "audio/shard-000000.tar"
    data = bytearray(tar.read_bytes())
    data[3000] ^= 1
    tar.write_bytes(data)
    with pytest.raises(ValueError, match=r"shard-000000.tar is damaged.*ingest"):
        extract_shard(audio.shards[0], index, str(tmp_path / "audio"), SmallEncoder(), str(tmp_path / "features"))


def test_an_encoder_that_breaks_its_promise_is_refused(tmp_path: Path) -> None:
    class Liar(SmallEncoder):
        def output_length(self, samples: int) -> int:
            return super().output_length(samples) + 1

    with pytest.raises(ValueError, match=r"gave features of \(50, 8\) for 16000 samples.*promises \(51, 8\)"):
        encode_clips(Liar(), [torch.zeros(16_000)])
    broken = SmallEncoder()
    torch.nn.init.constant_(broken.project.bias, float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        encode_clips(broken, [torch.zeros(16_000)])


def test_rows_in_any_grouping_of_shards_keep_the_index_order(tmp_path: Path) -> None:
    audio, index = make_audio(tmp_path / "audio", LENGTHS)
    parts = [
        extract_shard(shard, rows_of(index, shard), str(tmp_path / "audio"), SmallEncoder(), str(tmp_path / "f"))
        for shard in reversed(audio.shards)
    ]
    assert [row.key for part in reversed(parts) for row in part.rows] == [row["key"] for row in index]
    assert all(row.offset % 512 == 0 for part in parts for row in part.rows)


def test_an_unfinished_cache_is_never_read(tmp_path: Path) -> None:
    audio, index = make_audio(tmp_path / "audio", LENGTHS[:1])
    extract_shard(audio.shards[0], index, str(tmp_path / "audio"), SmallEncoder(), str(tmp_path / "features"))
    with pytest.raises(FileNotFoundError, match="run the cache stage"):
        FeatureStore(str(tmp_path / "features"))


def test_a_cache_holds_codec_tokens_to_the_bit(tmp_path: Path) -> None:
    audio, index = make_audio(tmp_path / "audio", [[0.3, 1.1, 0.02]])
    encoder = build_encoder(EncoderSpec(kind="encodec", config={"num_filters": 4, "hidden_size": 16}))
    store = make_cache(tmp_path, encoder, audio, index, tmp_path / "audio")
    assert form_for(encoder, Form.parse("int8")) == BF16
    for row in index:
        wave = torch.from_numpy(ShardReader(str(tmp_path / "audio")).waveform(row))
        live = encode_clips(encoder, [wave])[0]
        assert torch.equal(codes_of(store.load(row["key"])), codes_of(live))
