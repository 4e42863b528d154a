from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from feature_helpers import SmallEncoder
from hypothesis import given, settings
from hypothesis import strategies as st

from components.features.key import feature_key, feature_root, fingerprint, refuse_if_trained, refuse_other_numerics
from models.recipe import Stage

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
names = st.text("abcdefgh", max_size=3)
keys = st.dictionaries(
    names, scalars | st.lists(scalars, max_size=3) | st.dictionaries(names, scalars, max_size=3), min_size=1, max_size=5
)


def reordered(value: Any, order: Any) -> Any:
    if isinstance(value, dict):
        return {name: reordered(value[name], order) for name in order(list(value))}
    return [reordered(item, order) for item in value] if isinstance(value, list) else value


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, dict) and value:
        return [path for name, item in value.items() for path in paths(item, (*at, name))]
    return [at]


def changed(value: Any, path: tuple[Any, ...]) -> Any:
    if not path:
        return f"{value!r} changed"
    return value | {path[0]: changed(value[path[0]], path[1:])}


@settings(deadline=None, max_examples=60)
@given(keys, st.randoms(use_true_random=False))
def test_fingerprint_does_not_depend_on_the_order_of_entries(key: dict[str, Any], random: Any) -> None:
    shuffled = reordered(key, lambda names: random.sample(names, len(names)))
    assert fingerprint(shuffled) == fingerprint(key)
    assert len(fingerprint(key)) == 16


@settings(deadline=None, max_examples=60)
@given(keys, st.data())
def test_fingerprint_changes_with_each_field(key: dict[str, Any], data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(paths(key)))
    assert fingerprint(changed(key, path)) != fingerprint(key)


def test_every_field_of_a_real_key_counts() -> None:
    key = feature_key(SmallEncoder())
    assert json.loads(json.dumps(key)) == key
    found = {fingerprint(changed(key, path)) for path in paths(key)}
    assert len(found) == len(paths(key)) and fingerprint(key) not in found
    named = {".".join(path) for path in paths(key)}
    assert named >= {
        "encoder.kind",
        "encoder.layer",
        "encoder.pool",
        "encoder.window",
        "weights",
        "dtype",
        "codebook",
        "numerics.device",
        "numerics.torch",
        "numerics.capability",
        "feature_version",
    }


def test_other_weights_pooling_or_codebook_miss_and_the_same_weights_by_another_name_hit() -> None:
    base = fingerprint(feature_key(SmallEncoder()))
    others = [
        feature_key(SmallEncoder(seed=1)),
        feature_key(SmallEncoder(pool=2)),
        feature_key(SmallEncoder(width=4)),
        feature_key(SmallEncoder(), codebook_digest="abc"),
    ]
    assert len({base, *map(fingerprint, others)}) == 5
    assert fingerprint(feature_key(SmallEncoder(weights="/some/folder"))) == base


def test_a_change_of_one_weight_bit_misses() -> None:
    encoder = SmallEncoder()
    before = fingerprint(feature_key(encoder))
    with torch.no_grad():
        encoder.project.weight.view(torch.int32)[0, 0] ^= 1
    assert fingerprint(feature_key(encoder)) != before


def test_other_numerics_miss_and_are_refused_by_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = SmallEncoder()
    key = feature_key(encoder)
    refuse_other_numerics(key, encoder)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "PENTIUM")
    assert fingerprint(feature_key(encoder)) != fingerprint(key)
    with pytest.raises(ValueError, match=r"capability: .* 'PENTIUM' here.*machines of one kind"):
        refuse_other_numerics(key, encoder)


def test_root_is_under_the_fingerprint() -> None:
    key = feature_key(SmallEncoder())
    assert feature_root("/lake", key, "noise", "7").endswith(f"/lake/features/{fingerprint(key)}/noise/7")


def test_a_stage_that_trains_the_encoder_is_refused_by_name() -> None:
    align, tune = Stage(name="align", train=("connector",)), Stage(name="tune", train=("connector", "encoder"))
    refuse_if_trained([align])
    with pytest.raises(ValueError, match=r"stage 'tune' trains encoder.*without the cache"):
        refuse_if_trained([align, tune])
    refuse_if_trained([tune], encoder_groups=("whisper",))
    with pytest.raises(ValueError, match="stage 'align' trains connector"):
        refuse_if_trained([align], encoder_groups=("encoder", "connector"))
