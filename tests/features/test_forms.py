"""Smaller forms of a cache: what they mean, what they lose, what they take, and that a damaged one is refused."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
import soundfile as sf
import torch
from feature_helpers import SmallEncoder, make_audio, make_cache, make_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from components.features.compact import Projection, fidelity, pack, quantise, unpack
from components.features.cost import account, estimate
from components.features.form import BF16, Form, form_of, refuse_pool
from components.features.key import feature_key, fingerprint, form_for
from components.features.store import FeatureStore, up_to_date
from components.schema import AudioManifest
from infra.storage import upload_folder
from models.connectors.linear import mean_pool
from models.encoders import build_encoder
from models.encoders.base import EncoderSpec

LENGTHS = [[0.3, 2.0, 0.05, 1.1], [1.0, 0.2, 2.4]]
NAMES = ("bf16", "int8", "pca-5-int8", "pool-2-bf16", "pool-3-int8", "pool-2-pca-5-int8")
WIDTH = 24
Made = tuple[AudioManifest, list[dict[str, Any]], dict[str, FeatureStore]]
forms = st.builds(
    lambda pool, dims, small: Form(pool=pool, dims=dims, dtype="int8" if small or dims else "bfloat16"),
    st.integers(1, 99),
    st.none() | st.integers(1, 9999),
    st.booleans(),
)


def noise(frames: int, width: int = WIDTH, seed: int = 0) -> Tensor:
    return torch.randn(frames, width, generator=torch.Generator().manual_seed(seed))


def subspace(dims: int) -> Projection:
    basis = torch.linalg.qr(noise(WIDTH, dims)).Q.T
    return Projection(basis.contiguous(), noise(1)[0])


@settings(deadline=None)
@given(forms, st.integers(1, 400), st.integers(1, 300))
def test_a_name_is_read_back_and_sizes_are_those_of_what_is_stored(form: Form, frames: int, width: int) -> None:
    assert Form.parse(str(form)) == form
    assert form.clip_bytes(frames, width) > 0
    if form.dims is None:
        stored = pack(torch.zeros(frames, width), form)
        assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == form.shapes(frames, width)
        assert sum(tensor.nbytes for tensor in stored.values()) == form.clip_bytes(frames, width)
        assert unpack(stored, frames, form).shape == (frames, width)


@pytest.mark.parametrize(
    "name", ["", "int4", "pca-0-int8", "pca-256", "pca-256-bf16", "pool-1.5-int8", "int8 ", "bf16-int8"]
)
def test_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="unknown form of features"):
        Form.parse(name)


def test_components_are_always_codes_and_always_named() -> None:
    with pytest.raises(ValidationError, match="write pca-3-int8"):
        Form(dims=3)
    with pytest.raises(ValueError, match="needs principal components"):
        Form.parse("pca-3-int8").key(None)
    with pytest.raises(ValueError, match="int8 has no principal components"):
        Form.parse("int8").key("abc")


def test_a_form_is_another_cache_and_bfloat16_is_the_one_it_was() -> None:
    encoder = SmallEncoder()
    plain = feature_key(encoder)
    assert set(plain) == {
        "encoder",
        "weights",
        "preprocessing",
        "kind",
        "codebook",
        "dtype",
        "numerics",
        "feature_version",
    }
    keys = [feature_key(encoder, form=Form.parse(name)) for name in ("bf16", "int8", "pool-2-int8", "pool-3-int8")]
    keys += [feature_key(encoder, None, Form.parse("pca-3-int8"), digest) for digest in ("a", "b")]
    assert keys[0] == plain and len(set(map(fingerprint, keys))) == 6
    assert [str(form_of(key)) for key in keys[:3]] == ["bf16", "int8", "pool-2-int8"]
    assert feature_key(encoder, "units", Form.parse("int8")) == feature_key(encoder, "units")


def test_text_as_frames_and_single_frames_are_kept_as_they_are() -> None:
    text, whole, usual = SmallEncoder(), SmallEncoder(pool=0), SmallEncoder()
    text.spec = EncoderSpec(kind="transcriber")
    small = Form.parse("int8")
    assert [form_for(encoder, small) for encoder in (text, whole, usual)] == [BF16, BF16, small]
    for encoder in (text, whole):
        with pytest.raises(ValueError, match="are kept as they are: form int8 would harm them"):
            feature_key(encoder, form=small)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.floats(-30, 30), st.integers(0, 100))
def test_a_code_is_within_half_a_step(frames: int, power: float, seed: int) -> None:
    numbers = noise(frames, seed=seed) * 2.0**power * noise(1, seed=seed + 1).exp()
    codes, scale = quantise(numbers)
    assert codes.dtype == torch.int8 and scale.dtype == torch.float16 and codes.abs().max() <= 127
    again, largest = codes.float() * scale.float(), numbers.abs().amax(0)
    bound = torch.where(largest / 127 > 65_504, largest, largest / 127 * 0.56).clamp_min(127 * 2.0**-25)
    assert ((again - numbers).abs() <= bound + 1e-30).all()


def test_channels_of_zero_and_of_very_large_numbers_stay_finite() -> None:
    codes, scale = quantise(torch.tensor([[0.0, 1e12, -1e-12], [0.0, -1e12, 1e-12]]))
    assert codes.tolist() == [[0, 127, 0], [0, -127, 0]] and scale.isfinite().all()


def test_means_read_back_are_what_a_connector_of_means_takes_anyway() -> None:
    frames = noise(47)
    form = Form.parse("pool-2-bf16")
    again = unpack(pack(frames, form), 47, form).float()
    assert again.shape == frames.shape
    length, counts = torch.tensor([47]), torch.tensor([11])  # of means over 4, the remainder dropped
    pooled = [mean_pool(given[None], length, 4, counts)[0] for given in (frames, again)]
    assert (pooled[0] - pooled[1]).abs().max() < 2**-7
    assert (again - frames).abs().max() > 0.5
    refuse_pool(form, 4, "mean of 4")
    refuse_pool(BF16, 1, "Linear")
    for means in (1, 3):
        with pytest.raises(ValueError, match=f"pool-2-bf16 keeps means over 2 .*takes means over {means}: choose"):
            refuse_pool(form, means, "MLP")


def test_fidelity_tells_what_was_planted() -> None:
    projection = subspace(5)
    flat = [noise(n, 5, seed=n) @ projection.basis + projection.mean for n in (40, 7)]
    components = fidelity(flat, Form.parse("pca-5-int8"), projection)
    assert components.frames == 47 and components.relative_error < 0.01 and components.cosine > 0.9999
    assert components.frame_bytes == pytest.approx(5 + 2 * 2 * 5 / 47)
    spread = fidelity([noise(4000) + projection.mean], Form.parse("pca-5-int8"), projection)
    assert spread.centred_error == pytest.approx((19 / 24) ** 0.5, abs=0.02)
    found = {name: fidelity([noise(400) + 3.0], Form.parse(name)) for name in ("bf16", "int8", "pool-2-int8")}
    assert found["bf16"].relative_error < found["int8"].relative_error < 0.01 < found["pool-2-int8"].relative_error
    assert found["int8"].centred_error == pytest.approx(found["int8"].relative_error * 10**0.5, rel=0.05)
    assert re.match(r"int8 +0\.\d{3}% +\d\.\d{3}% +0\.99\d+", str(found["int8"]))
    with pytest.raises(ValueError, match="no clips"):
        fidelity([], BF16)


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory,
) -> Made:
    folder = tmp_path_factory.mktemp("forms")
    audio, index = make_audio(folder / "audio", LENGTHS)
    encoder = SmallEncoder(width=WIDTH)
    stores = {name: make_cache(folder / "lake", encoder, audio, index, folder / "audio", name) for name in NAMES}
    return audio, index, stores


@pytest.mark.parametrize("name", NAMES[1:])
def test_every_form_reads_as_frames_of_bfloat16(name: str, made: Made) -> None:
    audio, _, stores = made
    store, plain = FeatureStore(stores[name].root), stores["bf16"]
    store.verify()
    assert up_to_date(store.root, audio) == store.manifest
    assert (store.manifest.frames, store.manifest.width) == (plain.manifest.frames, WIDTH)
    projection = store.projection
    for key in plain.places:
        found, whole = store.load(key), plain.load(key)
        assert found.dtype == torch.bfloat16 and found.shape == whole.shape and store.frames(key) == len(whole)
        live = unpack(pack(whole.float(), store.form, projection), len(whole), store.form, projection)
        assert (found.float() - live.float()).abs().max() < 0.05  # codes of frames before they were rounded
    remote = f"memory://form-{name}"
    upload_folder(Path(store.root), remote)
    assert all(torch.equal(FeatureStore(remote).load(key), store.load(key)) for key in list(plain.places)[:2])


@pytest.mark.parametrize("name", NAMES)
def test_the_cost_is_told_before_and_after(name: str, made: Made) -> None:
    _, index, stores = made
    store = stores[name]
    before = estimate(index, SmallEncoder(width=WIDTH), store.root, form=Form.parse(name))
    after = account(store)
    assert (after.clips, after.frames, after.payload) == (7, before.frames, sum(p.size for p in store.places.values()))
    assert after.bytes == sum((Path(store.root) / shard.name).stat().st_size for shard in store.manifest.shards)
    assert after.payload < before.bytes < after.payload + 7 * 1024
    numbers = sum(store.form.clip_bytes(place.frames, WIDTH) for place in store.places.values())
    assert 80 * 7 <= after.payload - numbers <= 160 * 7  # safetensors headers
    assert str(after).endswith("kB an hour of audio") or "MB an hour of audio" in str(after)


@pytest.mark.parametrize("name", ["int8", "pool-2-pca-5-int8"])
def test_a_flipped_bit_of_a_clip_is_refused(name: str, made: Made) -> None:
    store = made[2][name]
    place = store.place("000000-001")
    tar, draw = Path(store.root) / place.shard, random.Random(1)
    whole = tar.read_bytes()
    try:
        for _ in range(20):
            data = bytearray(whole)
            data[place.offset + draw.randrange(place.size)] ^= 1 << draw.randrange(8)
            tar.write_bytes(data)
            with pytest.raises(ValueError, match=r"'000000-001' in .* is damaged"):
                FeatureStore(store.root).load("000000-001")
    finally:
        tar.write_bytes(whole)


def test_damaged_or_missing_components_are_refused(made: Made) -> None:
    audio, _, stores = made
    root = Path(stores["pca-5-int8"].root)
    for path in sorted((root / "projection").iterdir()):
        whole = path.read_bytes()
        data = bytearray(whole)
        data[len(data) // 2] ^= 1
        for bad in (bytes(data), whole[:-20]):
            path.write_bytes(bad)
            with pytest.raises(ValueError, match="run the cache stage again"):
                FeatureStore(str(root))
            assert up_to_date(str(root), audio) is None
        path.write_bytes(whole)
    other = stores["pool-2-pca-5-int8"]  # its components are the same, kept by each cache for itself
    assert other.projection is not None
    assert FeatureStore(other.root).form.pool == 2


def test_bytes_of_a_form_are_the_same_on_every_run(tmp_path: Path) -> None:
    audio, index = make_audio(tmp_path / "audio", LENGTHS)
    encoder = SmallEncoder(width=WIDTH)
    first, second = (
        make_cache(tmp_path / name, encoder, audio, index, tmp_path / "audio", "pca-5-int8") for name in ("a", "b")
    )
    assert first.manifest == second.manifest
    assert Path(first.root).name == Path(second.root).name


@pytest.mark.slow
def test_int8_of_real_speech_is_smaller_than_its_flac_and_nearly_the_same(shared_data: Path, tmp_path: Path) -> None:
    files = sorted((shared_data / "librispeech_mini/audio").glob("*.flac"))[:6]
    audio, index = make_shards(tmp_path / "audio", [[sf.read(file, dtype="int16")[0] for file in files]])
    encoder = build_encoder(EncoderSpec(kind="moonshine", weights="earloom/moonshine-tiny-en"))
    plain, small = (
        make_cache(tmp_path / "lake", encoder, audio, index, tmp_path / "audio", n) for n in ("bf16", "int8")
    )
    found = fidelity([plain.load(key) for key in plain.places], Form.parse("int8"))
    assert found.relative_error < 0.007 and found.worst_cosine > 0.9999
    assert small.manifest.shards[0].bytes < 0.52 * plain.manifest.shards[0].bytes
    assert small.manifest.shards[0].bytes < audio.shards[0].bytes
    for key in plain.places:
        assert (small.load(key).float() - plain.load(key).float()).norm() < 0.01 * plain.load(key).float().norm()
