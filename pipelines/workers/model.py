"""What training and evaluation workers share: the model without encoders, and its inputs from the caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from components.features.store import FeatureStore
from models.architectures import load
from models.contract import SpeechLLM
from models.preset import Preset
from models.pretrained import load_tokenizer
from models.rendering import Audio


def audio_reader(inputs: dict[str, str]) -> Callable[[str], Audio]:
    """Reads what a model takes from the feature caches, by role; the role 'units' is discrete."""
    stores = {role: FeatureStore(root) for role, root in inputs.items()}
    if list(stores) == ["units"]:
        return lambda key: Audio(units=stores["units"].load(key).long())
    return lambda key: Audio({role: store.load(key) for role, store in stores.items()})


def trainable_model(settings: dict[str, Any]) -> tuple[SpeechLLM, Any]:
    """Model without encoders, and its tokenizer with the architecture's new tokens."""
    preset = Preset.model_validate(settings["preset"])
    architecture = load(settings["arch"])
    tokenizer = load_tokenizer(preset.backbone.tokenizer)
    tokenizer.add_tokens(architecture.added_tokens(preset))
    return architecture.build(preset, tokenizer, encoders=False, seed=settings["seed"]), tokenizer
