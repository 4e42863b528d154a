"""Use a registered model: find its folder in the registry, load it, let it hear a file."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer

from components.audio.decode import BadAudio, decode
from components.curriculum.tasks import question
from components.evaluation.answer import answer
from components.registry.mlflow_registry import find
from infra import storage
from models.architectures import load
from models.preset import Preset


def listen(model: str, file: str, asked: str | None, tracking_uri: str) -> str:
    """The answer of `NAME[@alias]` about an audio file. LookupError, FileNotFoundError or BadAudio with a remedy."""
    found = find(model, tracking_uri)
    try:
        decoded = decode(storage.read_bytes(file), file)
    except BadAudio as error:
        raise BadAudio(f"{file}: {error}") from None
    with tempfile.TemporaryDirectory() as name:
        folder = local_folder(found.url, Path(name))
        architecture = load(storage.read_json(str(folder / "manifest.json"))["architecture"])
        heard = architecture.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        decoding = Preset.model_validate(heard.config.preset).recipe.decoding
        return answer(heard, tokenizer, torch.from_numpy(decoded.samples), question(asked), decoding)


def local_folder(url: str, scratch: Path) -> Path:
    """A model's folder on this machine: itself if it is here, else a copy in `scratch`."""
    if storage.is_local(url):
        return storage.local_path(url)
    for name in storage.list_names(url):
        storage.local_copy(storage.join(url, name), scratch)
    return scratch
