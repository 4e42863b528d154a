"""A whole speech recogniser, Moonshine or Whisper: an encoder of this room with transformers' decoder behind it.

What `transcriber` and `decoder_states` share: loading, greedy decoding in batches, and ids as text. A clip's ids do not
depend on the batch, rounding aside: each stops at its own end or limit and then leaves the batch.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache, EncoderDecoderCache, MoonshineConfig, WhisperConfig
from transformers.models.moonshine.modeling_moonshine import MoonshineDecoder
from transformers.models.whisper.modeling_whisper import WhisperDecoder

from models.encoders.base import SAMPLE_RATE, EncoderSpec
from models.encoders.loading import fill, load_weights, read_json, valid_mask
from models.encoders.moonshine import MoonshineEncoder
from models.encoders.whisper import WhisperEncoder
from models.pretrained import load_tokenizer, resolve, seeded
from models.weights.files import file_sha256

OWN = ("model", "tokenizer", "language", "positions")
PREFIXES = ("model.decoder.", "decoder.")
TOKENS_PER_SECOND, TOKENS_MORE = 6.5, 4  # Moonshine's rule against endless repetition
PRINTABLE = range(32, 127)
VOCABULARY = ("tokenizer.json", "vocab.json")


class Recogniser(nn.Module):
    """`spec.config`: `model` ("moonshine" or "whisper"), `tokenizer` (a reference to the folder with tokenizer and
    generation_config.json; by default that of the weights), `language` (Whisper: a code such as "en"; by default it is
    heard), and entries of the transformers config. Whisper hears its full window, Moonshine the clip.

    Raises ValueError for another model, and for one whose output layer is not its table of embeddings.
    """

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.kind: str = spec.config.get("model", "")
        if self.kind not in ("moonshine", "whisper"):
            raise ValueError(f"config needs model: moonshine or whisper, the recogniser to run; got {self.kind!r}")
        if spec.layer is not None or spec.layers or spec.pool != 1 or spec.window:
            raise ValueError(f"{spec.kind} has neither layers nor pooling nor a choice of window: leave them out")
        sizes = {name: value for name, value in spec.config.items() if name not in OWN}
        part = EncoderSpec(
            kind=self.kind, weights=spec.weights, config=sizes, window=self.kind == "whisper", seed=spec.seed
        )
        folder = resolve(spec.weights) if spec.weights else None
        self.source: str | None = spec.config.get("tokenizer", spec.weights)
        self.language: str | None = spec.config.get("language")
        entries = (read_json(folder / "config.json") if folder else {}) | sizes
        entries.pop("do_normalize", None)
        self.encoder = MoonshineEncoder(part) if self.kind == "moonshine" else WhisperEncoder(part)
        self.config = MoonshineConfig(**entries) if self.kind == "moonshine" else WhisperConfig(**entries)
        if not self.config.tie_word_embeddings:
            raise ValueError(f"a {self.kind} whose output layer has weights of its own is not supported")
        with seeded(spec.seed):
            self.decoder = (MoonshineDecoder if self.kind == "moonshine" else WhisperDecoder)(self.config)
        if folder:
            fill(self.decoder, load_weights(folder, PREFIXES), folder)
        self.eval()

    @property
    def width(self) -> int:
        return int(self.config.hidden_size)

    @property
    def positions(self) -> int:
        """Ids that the decoder can take."""
        whisper = self.kind == "whisper"
        return int(self.config.max_target_positions if whisper else self.config.max_position_embeddings)

    @property
    def start(self) -> int:
        """Id that decoding begins with."""
        return int(self.config.decoder_start_token_id)

    @cached_property
    def ends(self) -> set[int]:
        """Ids that end a transcript."""
        found = self.config.eos_token_id
        return set(found) if isinstance(found, list) else {int(found)}

    def seconds_of(self, samples: int) -> float:
        """Seconds of audio that the encoder computes for a clip of `samples`."""
        return self.encoder.seconds_of(samples)

    # ---- states and ids -----------------------------------------------------------------------------------------

    def listen(self, waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encoder frames, `(batch, samples)` and `(batch,)` → `(batch, frames, width)` and valid `(batch, frames)`."""
        frames = self.encoder.encode(waveforms, lengths)
        counts = torch.tensor([self.encoder.frames_of(int(n)) for n in lengths], device=frames.device)
        return frames, valid_mask(counts, frames.shape[1])

    def limit(self, samples: int) -> int:
        """Most ids of a clip of `samples` at 16 kHz."""
        if self.kind == "whisper":
            return self.positions // 2
        return min(self.positions, int(TOKENS_PER_SECOND * samples / SAMPLE_RATE) + TOKENS_MORE)

    def hidden(self, ids: Tensor, frames: Tensor, valid: Tensor, cache: EncoderDecoderCache | None = None) -> Tensor:
        """Normalised last hidden states of the decoder over ids, `(batch, length)` → `(batch, length, width)`."""
        masked = {"encoder_attention_mask": valid} if self.kind == "moonshine" else {}  # Whisper's window is all valid
        return self.decoder(  # type: ignore[no-any-return]
            input_ids=ids, encoder_hidden_states=frames, past_key_values=cache, use_cache=cache is not None, **masked
        ).last_hidden_state

    @torch.inference_mode()
    def decode(self, frames: Tensor, valid: Tensor, limits: list[int]) -> list[list[int]]:
        """Greedy ids of each clip behind its prompt, the end id included where it came within the clip's limit."""
        found: list[list[int]] = [[] for _ in limits]
        never, never_first = self.suppressed
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        ids, rows = self.prompts(frames, valid), list(range(len(limits)))
        for step in range(max(limits)):
            logits = self.logits(self.hidden(ids, frames, valid, cache)[:, -1])
            logits[:, never + (never_first if step == 0 else [])] = -torch.inf
            best = logits.argmax(dim=-1)
            going = []
            for i, (row, token) in enumerate(zip(rows, best.tolist(), strict=True)):
                found[row].append(token)
                if token not in self.ends and len(found[row]) < limits[row]:
                    going.append(i)
            if not going:
                break
            if len(going) < len(rows):
                kept = torch.tensor(going, device=frames.device)
                frames, valid, best, rows = frames[kept], valid[kept], best[kept], [rows[i] for i in going]
                cache.batch_select_indices(kept)
            ids = best[:, None]
        return found

    def logits(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden, self.decoder.embed_tokens.weight)

    def prompts(self, frames: Tensor, valid: Tensor) -> Tensor:
        """Ids that stand before a transcript, `(batch, length)`: Whisper's name language and task.

        Without a `language` it is the one whose token is likeliest behind the start, clip by clip.
        """
        start = torch.full((len(frames), 1), self.start, device=frames.device)
        said = self.generation
        parts = [start]
        languages: dict[str, int] = said.get("lang_to_id") or {}
        if languages:
            parts += [
                self.spoken(languages, start, frames, valid),
                torch.full_like(start, said["task_to_id"]["transcribe"]),
            ]
        if said.get("no_timestamps_token_id") is not None:
            parts.append(torch.full_like(start, said["no_timestamps_token_id"]))
        return torch.cat(parts, dim=1)

    def spoken(self, languages: dict[str, int], start: Tensor, frames: Tensor, valid: Tensor) -> Tensor:
        """The token of each clip's language, `(batch, 1)`. Raises ValueError for one that the model does not know."""
        if self.language is not None:
            token = languages.get(f"<|{self.language}|>")
            if token is None:
                raise ValueError(f"the recogniser does not know the language {self.language!r}")
            return torch.full_like(start, token)
        tokens = torch.tensor(sorted(languages.values()), device=frames.device)
        return tokens[self.logits(self.hidden(start, frames, valid)[:, -1])[:, tokens].argmax(dim=-1)][:, None]

    # ---- text ---------------------------------------------------------------------------------------------------

    @cached_property
    def folder(self) -> Path | None:
        """Where tokenizer and generation settings are; None for random weights. Looked up when first needed."""
        return resolve(self.source) if self.source else None

    @cached_property
    def generation(self) -> dict[str, Any]:
        """Entries of Whisper's generation_config.json; {} where there is none."""
        return read_json(self.folder / "generation_config.json") if self.folder and self.kind == "whisper" else {}

    @cached_property
    def suppressed(self) -> tuple[list[int], list[int]]:
        """Ids that are never taken, and those that are not taken first."""
        return tuple(  # type: ignore[return-value]
            [i for i in self.generation.get(name) or [] if i >= 0]
            for name in ("suppress_tokens", "begin_suppress_tokens")
        )

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.source) if self.source else None

    def text(self, ids: list[int]) -> str:
        """Text of ids. Random weights have no vocabulary: there an id is one printable ASCII character."""
        if self.tokenizer is None:
            return "".join(chr(PRINTABLE[i % len(PRINTABLE)]) for i in ids if i not in self.ends).strip()
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def wording(self) -> dict[str, Any]:
        """What the text depends on besides weights and decoding: digests of the vocabulary, and generation settings."""
        folder = self.folder
        files = [folder / name for name in VOCABULARY if (folder / name).is_file()] if folder else []
        return {"vocabulary": {file.name: file_sha256(file) for file in files}, "generation": self.generation}

    def decoding(self) -> dict[str, Any]:
        """How ids are found, in words and numbers."""
        limit = f"{TOKENS_PER_SECOND} a second + {TOKENS_MORE}" if self.kind == "moonshine" else "half the positions"
        return {"encoder": self.encoder.preprocessing(), "decoding": "greedy", "limit": limit}
