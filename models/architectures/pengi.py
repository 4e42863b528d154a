"""Pengi: every audio task as text generation, a frozen GPT-2 continues a prefix of what was heard and asked.

Deshmukh, Elizalde, Singh, Wang, "Pengi: An Audio Language Model for Audio Tasks", NeurIPS 2023, arXiv 2305.11834.
Official code (inference only): microsoft/Pengi (wrapper.py, models/pengi.py, models/decoder.py, configs/*.yml).

Parts (`paper`, the released variant `base_no_text_enc`). HTSAT of Microsoft's CLAP on one window of 7 s at 44.1 kHz,
shorter clips repeated, and its projection to one vector of 1024; the vector, L2-normalised, is mapped by a Linear and
four transformer layers to 40 prefix vectors. The request goes as GPT-2's word embeddings, with " <|endoftext|>" behind
it and "!" up to 40 words, through a second mapper of four layers to 40 more. GPT-2 base, frozen.

Sequence: 40 audio vectors, 40 text vectors, answer, " <|endoftext|>": no beginning token. Loss on the answer and its
end. The request has 40 positions, and the words that stand there are replaced by what the mapper makes of them.

Recipe: one stage on all tasks. HTSAT, its projection and both mappers learn, GPT-2 does not. The published numbers at
hand are second-hand: Adam, 60 epochs, batch 384, learning rate 1e-4, 2000 steps of warm-up, then a linear decay.

Deviations: the variant `base` reads the request with CLIP's text tower, pooled to one vector, and a mapper like that
of the audio; here is the other released one, which needs no second tower. Longer clips give their first 7 s, the
official code a random window. Decoding stops at the end token, the official code at the blank before it. HTSAT starts
from CLAP 2023's weights: what the authors started from was not found. `small`: Whisper-tiny, averaged over the
clip and frozen, in HTSAT's place, SmolLM2 in GPT-2's; 6 audio vectors, 10 words, mappers of two layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from models.batch import Batch
from models.checkpoints import Checkpoint
from models.connectors.prefix_mapper import TransformerMapper
from models.contract import SpeechLLM, SpeechLLMConfig
from models.encoders.base import EncoderSpec
from models.encoders.htsat import htsat_ignored, htsat_renames
from models.preset import Backbone, Preset, PresetName
from models.recipe import Decoding, Optimiser, Recipe, Stage
from models.rendering import Audio, Message, Rendered, answer_text, user_text
from models.sizes import GPT2, HTSAT_TINY_RANDOM, TINY_GPT2

TRAINED = ("encoder", "connector")
TASKS = {"caption": 1.0, "labels": 1.0, "conversation": 1.0}
PADDING = "!"


class PengiConfig(SpeechLLMConfig):
    model_type = "earloom_pengi"


class Pengi(SpeechLLM):
    """Audio encoder → one vector → prefix; request → prefix; a frozen causal LM answers."""

    config_class = PengiConfig
    title = "Pengi"
    paper = "Deshmukh et al., Pengi: An Audio Language Model for Audio Tasks, NeurIPS 2023, arXiv 2305.11834"
    code = "microsoft/Pengi: models/pengi.py, models/decoder.py, wrapper.py"
    summary = "one vector of HTSAT and the request's words become 80 prefix vectors that a frozen GPT-2 continues"
    encoder_name = "CLAP's HTSAT and projection, trained"
    connector_name = "two transformer mappers to 40 + 40 prefix vectors"
    checkpoint = Checkpoint(
        file="base_no_text_enc.pth (Zenodo 8387083)",
        nested=("model",),
        renames=(
            *htsat_renames(r"audio_encoder\.base\.htsat\.", "encoders.audio.layers."),
            (r"audio_encoder\.projection\.", "encoders.audio.projection."),
            (r"caption_decoder\.gpt\.", "llm."),
            (r"caption_decoder\.(?=(?:audio|text)_project\.)", "connector."),
        ),
        ignored=(
            *htsat_ignored(r"audio_encoder\.base\.htsat\."),
            r"caption_decoder\.gpt\.transformer\.h\.\d+\.attn\.(?:masked_)?bias",  # the causal mask, a constant
        ),
        expects=("connector", "encoder", "llm"),
    )
    deviations: ClassVar[tuple[str, ...]] = (
        "the released variant base_no_text_enc: the request as word embeddings, without CLIP's text tower",
        "the first 7 s of a longer clip, not a random window",
        "small: Whisper-tiny averaged over the clip, frozen, SmolLM2 in GPT-2's place, a prefix of 6 + 10",
    )

    @classmethod
    def preset(cls, name: PresetName) -> Preset:
        return {"paper": _paper, "small": _small, "tiny": _tiny}[name]()

    def build_connector(self, preset: Preset, llm_width: int) -> nn.Module:
        sizes = preset.connector
        self.words: int = sizes["words"]
        shape = {"layers": sizes["layers"], "heads": sizes["heads"]}
        audio = TransformerMapper(sizes["width"], llm_width, sizes["prefix"], **shape)
        text = TransformerMapper(llm_width, llm_width, self.words, **shape, sequence=True)
        return nn.ModuleDict({"audio_project": audio, "text_project": text})

    def mapper(self, name: str) -> TransformerMapper:
        """`audio_project` or `text_project`."""
        assert isinstance(self.connector, nn.ModuleDict)
        mapper = self.connector[name]
        assert isinstance(mapper, TransformerMapper)
        return mapper

    def audio_tokens(self, frames: dict[str, int]) -> int:
        return self.mapper("audio_project").tokens(frames["audio"])

    def connect(self, features: dict[str, Tensor], lengths: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self.mapper("audio_project")(features["audio"], lengths["audio"])  # type: ignore[no-any-return]

    def embed(self, batch: Batch) -> tuple[Tensor, Batch]:
        """As the contract's, and the words of the request, behind each clip, as its mapper gives them."""
        embedded, batch = super().embed(batch)
        if not len(batch.clip_rows):
            return embedded, batch
        ahead = torch.arange(self.words, device=embedded.device)
        columns = (batch.clip_columns + batch.clip_tokens)[:, None] + ahead
        rows = batch.clip_rows[:, None].expand_as(columns)
        words = torch.full_like(batch.clip_rows, self.words)  # padding words are attended to, as in the official code
        asked, _ = self.mapper("text_project")(embedded[rows, columns], words)
        return embedded.index_put((rows, columns), asked.to(embedded.dtype)), batch

    def render(self, tokenizer: PreTrainedTokenizerBase, messages: list[Message], clips: Sequence[Audio]) -> Rendered:
        rendered = Rendered().audio(self.audio_tokens(clips[0].frames), filler=tokenizer.eos_token_id)
        rendered.tokens(self.request(tokenizer, user_text(messages)))
        answer = answer_text(messages)
        if answer is None:
            return rendered
        return rendered.text(tokenizer, f"{answer} ", learn=True).tokens([tokenizer.eos_token_id], learn=True)

    def request(self, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        """A request as `words` ids: ended, then cut or padded."""
        asked, padding = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (f"{text} ", PADDING))
        return [*asked, tokenizer.eos_token_id, *padding[-1:] * self.words][: self.words]


def _stage(optimiser: Optimiser, **others: Any) -> Stage:
    return Stage(name="train", optimiser=optimiser, **{"train": TRAINED, "tasks": TASKS} | others)


def _paper() -> Preset:
    return Preset(
        encoders={"audio": EncoderSpec(kind="clap", weights="CLAP_weights_2023.pth")},
        connector={"width": 1024, "prefix": 40, "words": 40, "layers": 4, "heads": 8},
        backbone=Backbone(weights="openai-community/gpt2", tokenizer="openai-community/gpt2", config=GPT2),
        recipe=Recipe(
            stages=[
                _stage(Optimiser(lr=1e-4, clip=0.0, warmup=2000, schedule="linear"), epochs=60, batch_tokens=384 * 100)
            ],
            decoding=Decoding(beams=3, max_new_tokens=30),
        ),
    )


def _small() -> Preset:
    return Preset(
        encoders={"audio": EncoderSpec(kind="whisper", weights="earloom/whisper-tiny-smart-turn", pool=0)},
        connector={"width": 384, "prefix": 6, "words": 10, "layers": 2, "heads": 8},
        backbone=Backbone(weights="earloom/smollm2-135m-instruct", tokenizer="earloom/smollm2-135m-instruct"),
        recipe=Recipe(
            stages=[_stage(Optimiser(lr=1e-3, warmup=0.1), train=("connector",), epochs=5, batch_tokens=200)],
            decoding=Decoding(max_new_tokens=30),
        ),
    )


def _tiny() -> Preset:
    return Preset(
        encoders={"audio": EncoderSpec(kind="clap", config=HTSAT_TINY_RANDOM)},
        connector={"width": 24, "prefix": 3, "words": 24, "layers": 1, "heads": 4},
        backbone=Backbone(config=TINY_GPT2),
        recipe=Recipe(
            stages=[_stage(Optimiser(lr=1e-3), max_steps=3, batch_tokens=512)],
            decoding=Decoding(max_new_tokens=4),
        ),
    )
