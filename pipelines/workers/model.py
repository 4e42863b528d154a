"""What training and evaluation workers share: the model, and its audio as cached features or as it is."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

from components.batching.stage_plan import lengths_only
from components.features.store import FeatureStore
from components.shards.index import Rows
from components.shards.reader import ShardReader
from components.training.compute import Compute
from components.training.fit import Fit, device_name, find_fit, fit_key
from components.training.precision import compute_dtype
from models.architectures import load
from models.contract import SpeechLLM
from models.preset import Preset
from models.pretrained import load_tokenizer
from models.recipe import Stage
from models.rendering import Audio

UNITS = "units"


class CachedAudio:
    """What a model takes from the feature caches, by role; the role 'units' is discrete.

    `read_roles` are those whose content decides how a sequence looks, so that measuring reads them too.
    """

    def __init__(self, inputs: dict[str, str], read_roles: tuple[str, ...] = ()) -> None:
        self.stores = {role: FeatureStore(root) for role, root in inputs.items()}
        self.read_roles = {UNITS, *read_roles}

    def read(self, key: str) -> Audio:
        """Features or units of a clip."""
        if UNITS in self.stores:
            return Audio(units=self.stores[UNITS].load(key).long())
        return Audio({role: store.load(key) for role, store in self.stores.items()})

    def measure(self, key: str) -> Audio:
        """The same in length: features are not read for it, units are, as equal neighbours may be merged."""
        if UNITS in self.stores:
            return self.read(key)
        known = {role: store.load(key) for role, store in self.stores.items() if role in self.read_roles}
        frames = {role: store.frames(key) for role, store in self.stores.items() if role not in known}
        return Audio(lengths_only(frames) | known)


class HeardAudio:
    """The waveforms themselves, for stages that train an encoder and those after them."""

    def __init__(self, audio_root: str, rows: Rows, model: SpeechLLM) -> None:
        self.reader, self.rows = ShardReader(audio_root, whole_shards=True), rows
        self.encoders = {role: model.encoder(role) for role in model.encoders}
        self.number = {key: n for n, key in enumerate(rows.table["key"].to_pylist())}

    def read(self, key: str) -> Audio:
        """The waveform of a clip, and the frames that it will give."""
        row = self.rows[self.number[key]]
        return Audio(waveform=torch.from_numpy(self.reader.waveform(row)), counts=self._counts(int(row["samples"])))

    def measure(self, key: str) -> Audio:
        """The frames alone."""
        return Audio(counts=self._counts(self.rows.table["samples"][self.number[key]].as_py()))

    def _counts(self, samples: int) -> dict[str, int]:
        return {role: encoder.output_length(samples) for role, encoder in self.encoders.items()}


class StageAudio:
    """Where the stages of a recipe get their audio from, as `Recipe.hears` says; each source is opened once.

    Settings: arch, preset, inputs, audio_root. `rows`: the whole index.
    """

    def __init__(self, settings: dict[str, Any], rows: Rows) -> None:
        self.settings, self.rows = settings, rows
        self.hears = Preset.model_validate(settings["preset"]).recipe.hears
        self.heard: HeardAudio | None = None

    def of(self, stage: int, model: SpeechLLM) -> CachedAudio | HeardAudio:
        """The audio of a stage by its number; -1 for what the trained model takes."""
        if not self.hears[stage]:
            return self.cached
        self.heard = self.heard or HeardAudio(self.settings["audio_root"], self.rows, model)
        return self.heard

    @cached_property
    def cached(self) -> CachedAudio:
        return CachedAudio(self.settings["inputs"], load(self.settings["arch"]).read_roles)


def trainable_model(settings: dict[str, Any]) -> tuple[SpeechLLM, Any]:
    """The model, without encoders if no stage trains them, and its tokenizer with the architecture's new tokens."""
    preset = Preset.model_validate(settings["preset"])
    architecture = load(settings["arch"])
    tokenizer = load_tokenizer(preset.backbone.tokenizer)
    tokenizer.add_tokens(architecture.added_tokens(preset))
    return architecture.build(preset, tokenizer, encoders=any(preset.recipe.hears), seed=settings["seed"]), tokenizer


def on_device(built: tuple[SpeechLLM, Any]) -> tuple[SpeechLLM, Any]:
    model, tokenizer = built
    if torch.cuda.is_available():
        from ray.train.torch import get_device

        model.to(get_device())
    return model, tokenizer


def stage_fit_key(settings: dict[str, Any], stage: Stage) -> str:
    """The name under which the memory fit of a stage is kept, for the kind of device that this machine has."""
    compute = Compute.model_validate(settings["compute"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = {name: value for name, value in settings["preset"].items() if name != "recipe"}
    dtype = str(compute_dtype(device, compute.precision))
    return fit_key(settings["arch"], parts, stage, compute, settings["workers"], device_name(device), dtype)


def stage_fit(settings: dict[str, Any], stage: Stage) -> Fit | None:
    """What `earloom fit-memory` found for this stage on this kind of device, if it was asked."""
    return find_fit(settings["fits"], stage_fit_key(settings, stage))
