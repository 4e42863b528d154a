"""Qwen-Audio: a Whisper encoder that is trained into Qwen-7B, told by tags what to do; then chat.

Chu et al., "Qwen-Audio: Advancing Universal Audio Understanding via Unified Large-Scale Audio-Language Models", 2023,
arXiv 2311.07919. Official code: QwenLM/Qwen-Audio (audio.py, modeling_qwen.py, tokenization_qwen.py, eval_audio/).

Parts (`paper`). Encoder of Whisper-large-v2's shape and weights, on a clip's own length up to 30 s. After its 32 blocks
the mean over two frames, then `ln_post`, then Linear 1280→4096: (T - 2) // 2 + 1 tokens of T frames, 25 a second. Two
learned vectors, `audio_bos_eos_token`, stand at both ends of the span in the place of `<audio>` and `</audio>`.
Qwen-7B: here in the modules of Qwen 2 with Qwen-7B's sizes (32 heads without groups, bias on query, key and value, two
halves of 11008, 155,947 rows, untied), 7.75 B; in all 8.4 B.

Sequence. A request in tags is one of pre-training: audio, tags, answer, <|endoftext|>. The shapes in eval_audio/:
recognition      <|startoftranscript|><|en|><|transcribe|><|en|><|notimestamps|><|wo_itn|>
translation      <|startoftranscript|><|en|><|translate|><|de|><|notimestamps|><|itn|>
caption          <|startofanalysis|><|unknown|><|caption|><|en|><|notimestamps|><|caption_clotho|>
question         <|startofanalysis|><|en|><|question|>{question}<|answer|>
emotion, scene   <|startofanalysis|><|en|><|keyword|><|en|><|notimestamps|><|emotion_recognition|> (unknown, scene)
Any other request is a turn of ChatML behind "You are a helpful assistant.", each clip in a line "Audio {n}:{audio}"
before the words; the answer ends with <|im_end|>. Loss on the last answer and its end.

Recipe: 1 pre-training on more than 30 tasks in 8 languages, language model frozen, encoder with all of its projection
trained; 2 chat: encoder frozen, language model trained in full. No LoRA, no schedule of tasks. SpecAugment in stage 1.

Deviations: learning rates, batches, steps and schedule were not found; chosen: 5e-5, 120 clips, 500 k steps and 1e-5,
128 clips, 8 k steps, both with a second beta of 0.98, 2000 steps of warm-up and cosine. Labels without a tag of their
own, and what is spoken in a language without one, are asked as questions. Tasks stand for the paper's. No SpecAugment.
`ln_post` starts at one and zero, not at Whisper's. No dynamic NTK and log-n scaling, which begin at 2048 tokens. The
tokenizer is Qwen 1.5's plus the official extra tokens under their official ids. Qwen-7B's own files are not in
transformers' layout: give a converted folder, or read Qwen-Audio's with `backbone.weights=null`.
`small`: Moonshine, frozen, and SmolLM2, tags without times and notes, no system block; stage 1 learns by CTC against
the backbone's own frozen token embeddings, without a pass through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from models.checkpoints import CONSTANTS, Checkpoint, openai_whisper
from models.connectors.linear import LinearProjector
from models.contract import SpeechLLM, SpeechLLMConfig
from models.encoders.base import EncoderSpec
from models.preset import Backbone, Preset, PresetName
from models.recipe import Decoding, Optimiser, Recipe, Stage
from models.rendering import Audio, Message, Rendered, Turn, turns
from models.sizes import QWEN_7B, TINY_LLAMA, WHISPER_LARGE_V2, WHISPER_TINY_RANDOM

SYSTEM = "You are a helpful assistant."
POOL = 2  # frames of the encoder whose mean is a token
TAGGED = "<|startof"  # how a request in tags begins
END, START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
HEARING = ("encoder", "connector", "ends")  # all of them are the official encoder

PLACES = "startoftranscript startofanalysis translate transcribe caption keyword unknown en zh de es ko fr ja it zh_tr"
PLACES += " notimestamps sil timestamps"
STYLES = "caption_audiocaps caption_clotho audioset_ontology caption_plain itn wo_itn startofentityvalue"
STYLES += " endofentityvalue startofentitytype endofentitytype named_entity_recognition audio_grounding startofword"
STYLES += " endofword delim emotion_recognition music_description note_analysis pitch"
ASKED = "sonic instrument speaker_meta song_meta question answer choice scene event vocal_classification"
ASKED += " speech_understanding scenario action entities speech_edit"


def vocabulary(numbered: bool) -> list[str]:
    """Qwen-Audio's tokens behind <|im_end|>, in the order of their ids; `numbered`: with times, notes and spare rows.

    With them and the 151,646 before them the table has its 155,947 rows, of which the last 782 have no official name.
    """
    times = [f"{i / 100:.2f}" for i in range(3001 if numbered else 0)]  # up to 30 s
    pitches, velocities = (
        [f"midi_{kind}_{i}" for i in range(128 if numbered else 0)] for kind in ("pitch", "velocity")
    )
    tags = [*PLACES.split(), *times, *STYLES.split(), *pitches, "velocity", *velocities, *ASKED.split()]
    named = ["[[[AUDIO:modality]]]", *(f"<|{tag}|>" for tag in tags), "<audio>", "</audio>"]
    if not numbered:
        return named
    return [*(f"<|extra_{i}|>" for i in range(205)), *named, *(f"<|spare_{i}|>" for i in range(782))]


def between(tokens: Tensor, counts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """A vector before each clip's tokens and one right behind its last, whatever the padding.

    `(clips, tokens, width)`, `(clips,)` and `(2, width)` → `(clips, tokens + 2, width)` and `(clips,)`.
    """
    start, end = ends.to(tokens.dtype)
    clips, longest, width = tokens.shape
    framed = torch.cat([start.expand(clips, 1, width), tokens, end.expand(clips, 1, width)], dim=1)
    last = torch.arange(longest + 2, device=tokens.device)[None] == counts[:, None] + 1
    return torch.where(last[..., None], end, framed), counts + 2


class QwenAudioConfig(SpeechLLMConfig):
    model_type = "earloom_qwen_audio"


class QwenAudio(SpeechLLM):
    """Trained speech encoder → mean of two frames → LayerNorm → Linear → causal LM."""

    config_class = QwenAudioConfig
    title = "Qwen-Audio"
    paper = (
        "Chu et al., Qwen-Audio: Advancing Universal Audio Understanding via Unified Large-Scale Audio-Language "
        "Models, arXiv 2311.07919 (2023)"
    )
    code = "QwenLM/Qwen-Audio"
    summary = "a Whisper encoder trained into a frozen Qwen-7B on tasks told by tags, then the language model for chat"
    encoder_name = "Whisper-large-v2's shape, trained in stage 1"
    connector_name = "pool 2, LayerNorm, Linear, two learned ends"
    several_clips = True
    checkpoint = Checkpoint(
        file="the safetensors of Qwen/Qwen-Audio or Qwen/Qwen-Audio-Chat, read with backbone.weights=null",
        renames=(
            (r"transformer\.audio\.ln_post\.", "connector.norm."),
            (r"transformer\.audio\.proj\.", "connector.proj."),
            (r"transformer\.audio\.audio_bos_eos_token\.", "ends."),
            *openai_whisper(r"transformer\.audio\.", "encoders.speech.layers."),
            (
                r"transformer\.h\.(\d+)\.attn\.c_attn\.",
                tuple(rf"llm.model.layers.\1.self_attn.{part}_proj." for part in "qkv"),
            ),
            (r"transformer\.h\.(\d+)\.attn\.c_proj\.", r"llm.model.layers.\1.self_attn.o_proj."),
            (r"transformer\.h\.(\d+)\.mlp\.w1\.", r"llm.model.layers.\1.mlp.up_proj."),
            (r"transformer\.h\.(\d+)\.mlp\.w2\.", r"llm.model.layers.\1.mlp.gate_proj."),  # the half behind SiLU
            (r"transformer\.h\.(\d+)\.mlp\.c_proj\.", r"llm.model.layers.\1.mlp.down_proj."),
            (r"transformer\.h\.(\d+)\.ln_1\.", r"llm.model.layers.\1.input_layernorm."),
            (r"transformer\.h\.(\d+)\.ln_2\.", r"llm.model.layers.\1.post_attention_layernorm."),
            (r"transformer\.wte\.", "llm.model.embed_tokens."),
            (r"transformer\.ln_f\.", "llm.model.norm."),
            (r"lm_head\.", "llm.lm_head."),
        ),
        ignored=(*CONSTANTS, r"transformer\.h\.\d+\.attn\.(masked_bias|logn_tensor)"),  # computed from the sizes
        expects=("encoder", "connector", "ends", "llm"),
    )
    deviations: ClassVar[tuple[str, ...]] = (
        "learning rates, batches and steps are chosen: none were found",
        "labels without a tag of their own are asked as questions",
        "no SpecAugment; ln_post does not start at Whisper's; no dynamic NTK and log-n scaling beyond 2048 tokens",
        "the modules of Qwen 2 with Qwen-7B's sizes",
        "small: Moonshine, frozen, in Whisper's place; CTC against the frozen token embeddings in stage 1",
    )

    @classmethod
    def preset(cls, name: PresetName) -> Preset:
        return {"paper": _paper, "small": _small, "tiny": _tiny}[name]()

    @classmethod
    def added_tokens(cls, preset: Preset) -> list[str]:
        return vocabulary(numbered=preset.connector.get("numbered", False))

    @classmethod
    def mean_pool(cls, preset: Preset) -> int:
        return POOL

    def build_connector(self, preset: Preset, llm_width: int) -> nn.Module:
        self.system: str = preset.connector.get("system", SYSTEM)
        return LinearProjector(preset.connector["width"], llm_width, pool=POOL, norm="affine")

    def build_parts(self, preset: Preset) -> None:
        self.ends = nn.Embedding(2, self.llm.config.hidden_size)

    def parameter_groups(self) -> dict[str, list[str]]:
        """Apart is what Qwen-Audio's encoder has no parameters for: Whisper's positions, the norm behind its blocks."""
        groups = super().parameter_groups()
        if "speech" in self.encoders and self.encoder("speech").spec.kind == "whisper":
            apart = ("embed_positions.weight", "layers.layer_norm.weight", "layers.layer_norm.bias")
            groups["fixed"] = [name for name in groups["encoder"] if name.endswith(apart)]
            groups["encoder"] = [name for name in groups["encoder"] if not name.endswith(apart)]
        return groups

    def audio_tokens(self, frames: dict[str, int]) -> int:
        return self.connector.tokens(frames["speech"]) + 2  # type: ignore[operator, no-any-return]

    def connect(self, features: dict[str, Tensor], lengths: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        tokens, counts = self.connector(features["speech"], lengths["speech"])
        return between(tokens, counts, self.ends.weight)

    def render(self, tokenizer: PreTrainedTokenizerBase, messages: list[Message], clips: Sequence[Audio]) -> Rendered:
        conversation = turns(messages)
        last = conversation[-1]
        tagged = len(conversation) == 1 and last.request.startswith(TAGGED)
        if tagged:
            rendered = self._heard(tokenizer, clips[: last.clips]).text(tokenizer, last.request)
        else:
            rendered = self._chat(tokenizer, conversation, clips)
        if last.answer is None:
            return rendered
        end = tokenizer.convert_tokens_to_ids(END if tagged else TURN_END)
        return rendered.text(tokenizer, last.answer, learn=True).tokens([end], learn=True)

    def _heard(self, tokenizer: PreTrainedTokenizerBase, clips: Sequence[Audio]) -> Rendered:
        rendered = Rendered()
        for clip in clips:
            rendered.audio(self.audio_tokens(clip.frames), filler=tokenizer.pad_token_id)
        return rendered

    def _chat(self, tokenizer: PreTrainedTokenizerBase, conversation: list[Turn], clips: Sequence[Audio]) -> Rendered:
        """ChatML up to the last answer; the clips of each turn are counted from 1."""
        rendered, waiting = Rendered(), list(clips)
        if self.system:
            rendered.text(tokenizer, f"{START}system\n{self.system}{TURN_END}\n")
        for turn in conversation:
            rendered.text(tokenizer, f"{START}user\n")
            for number in range(turn.clips):
                rendered.text(tokenizer, f"Audio {number + 1}:")
                rendered.audio(self.audio_tokens(waiting.pop(0).frames), filler=tokenizer.pad_token_id)
                rendered.text(tokenizer, "\n")
            rendered.text(tokenizer, f"{turn.request}{TURN_END}\n{START}assistant\n")
            if turn is not conversation[-1]:
                rendered.text(tokenizer, f"{turn.answer}{TURN_END}\n")
        return rendered

    def end_tokens(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        ends: list[int] = tokenizer.convert_tokens_to_ids([END, TURN_END, START])
        return ends


def _paper() -> Preset:
    first = Optimiser(lr=5e-5, betas=(0.9, 0.98), warmup=2000)
    longest = 752 + 128  # 30 s of audio, and text
    return Preset(
        encoders={
            "speech": EncoderSpec(kind="whisper", weights="openai/whisper-large-v2", config=WHISPER_LARGE_V2, layer=32)
        },
        connector={"width": 1280, "numbered": True},
        backbone=Backbone(weights="Qwen/Qwen-7B", tokenizer="Qwen/Qwen1.5-7B", config=QWEN_7B),
        recipe=Recipe(
            stages=[
                Stage(
                    name="pretrain",
                    train=HEARING,
                    tasks={"asr": 1.0, "translation": 1.0, "caption": 1.0, "labels": 1.0, "conversation": 1.0},
                    phrasings=0,
                    optimiser=first,
                    epochs=100,  # max_steps ends the stage
                    max_steps=500_000,
                    batch_tokens=120 * longest,
                ),
                Stage(
                    name="sft",
                    train=("llm",),
                    tasks={"conversation": 1.0, "asr": 1.0, "translation": 1.0, "caption": 1.0, "labels": 1.0},
                    phrasings=4,
                    optimiser=first.model_copy(update={"lr": 1e-5}),
                    epochs=100,
                    max_steps=8000,
                    batch_tokens=128 * longest,
                ),
            ],
            decoding=Decoding(max_new_tokens=256),
        ),
    )


def _small() -> Preset:
    return Preset(
        encoders={"speech": EncoderSpec(kind="moonshine", weights="earloom/moonshine-tiny-en")},
        connector={"width": 288, "system": ""},
        backbone=Backbone(weights="earloom/smollm2-135m-instruct", tokenizer="earloom/smollm2-135m-instruct"),
        recipe=Recipe(
            stages=[
                Stage(
                    name="pretrain",
                    train=HEARING[1:],
                    phrasings=0,
                    loss="ctc",
                    optimiser=Optimiser(lr=2e-3, warmup=0.1),
                    epochs=10,
                    batch_tokens=800,
                ),
                Stage(
                    name="sft",
                    train=("llm",),
                    tasks={"labels": 1.0, "caption": 0.25},
                    optimiser=Optimiser(lr=2e-4, warmup=0.1),
                    epochs=1.3,
                    batch_tokens=300,
                ),
            ],
            decoding=Decoding(max_new_tokens=64),
        ),
    )


def _tiny() -> Preset:
    shared: dict[str, Any] = {"optimiser": Optimiser(lr=1e-3), "max_steps": 3, "batch_tokens": 1024}
    return Preset(
        encoders={"speech": EncoderSpec(kind="whisper", config=WHISPER_TINY_RANDOM, layer=2)},
        connector={"width": 24},
        backbone=Backbone(config=TINY_LLAMA | {"model_type": "qwen2"}),
        recipe=Recipe(
            stages=[
                Stage(name="pretrain", train=HEARING, tasks={"asr": 1.0, "caption": 1.0}, phrasings=0, **shared),
                Stage(name="sft", train=("llm",), tasks={"conversation": 1.0, "asr": 1.0}, **shared),
            ],
            decoding=Decoding(max_new_tokens=4),
        ),
    )
