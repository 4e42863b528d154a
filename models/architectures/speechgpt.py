"""SpeechGPT: speech as discrete units in the vocabulary of a language model that both hears and speaks them.

Zhang et al., "SpeechGPT: Empowering Large Language Models with Intrinsic Cross-Modal Conversational Abilities",
Findings of EMNLP 2023, arXiv 2305.11000. Official code: 0nutation/SpeechGPT, folder `speechgpt/` (speech2unit.py,
ma_pretrain.py, cm_sft.py, com_sft.py, cli_infer.py).

Parts (`paper`). mHuBERT base, layer 11, k-means with 1000 clusters, 50 Hz, neighbouring duplicates merged. LLaMA-7B
(the released size) whose vocabulary grows by `<0>` … `<999>`, `<sosp>`, `<eosp>`, `[Human]`, `[SpeechGPT]`, `<eoh>`,
`<eos>` to 33,006 ordinary tokens: 6,746,656,768 parameters. `<eoa>` and `[ta]` stay plain text.

Recipe: 1 modality adaptation: next-unit prediction on speech alone, all parameters; 2 cross-modal instruction tuning:
recognition and synthesis pairs, all parameters; 3 chain of modality: transcript, then text answer, LoRA r 8, alpha 16
on q_proj and v_proj. Cross entropy; only the constant prefix is masked, so user turn and answer both carry loss.

Sequences: stage 2 "[Human]: {instruction} This is input: {units or text}<eoh> [SpeechGPT]: {target}<eoa> "; stage
3 "[Human]: {units}<eoh>. [SpeechGPT]: {transcript}; [ta] {answer}<eoa>. ".

Deviations: the constant prefix is one short sentence of ours. All new tokens are there from stage 1. Recognition is
asked in the words it was trained with. Answers are text (the paper's speech-to-text form): no
data set at hand has spoken ones, and the unit vocoder is not part of this file. A stage-1 row is one clip, not a block.
`small` clusters Moonshine frames, averaged in pairs to 21 Hz, into 256 units.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from models.contract import SpeechLLM, SpeechLLMConfig
from models.encoders.base import EncoderSpec
from models.preset import Backbone, LoRA, Preset, PresetName
from models.recipe import Decoding, Optimiser, Recipe, Stage
from models.rendering import Audio, Message, Rendered, answer_text, has_audio, transcript_text, user_text
from models.sizes import HUBERT_BASE, LLAMA_7B, MOONSHINE_TINY_RANDOM, TINY_LLAMA

PREFIX = "You are SpeechGPT, you read and speak.\n"
MARKERS = ["<sosp>", "<eosp>", "[Human]", "[SpeechGPT]", "<eoh>", "<eos>"]


class SpeechGPTConfig(SpeechLLMConfig):
    model_type = "earloom_speechgpt"


class SpeechGPT(SpeechLLM):
    """Encoder → k-means units → vocabulary of a causal LM."""

    config_class = SpeechGPTConfig
    title = "SpeechGPT"
    paper = "Zhang et al., SpeechGPT, Findings of EMNLP 2023, arXiv 2305.11000"
    code = "0nutation/SpeechGPT: speechgpt/"
    summary = "mHuBERT units as words of LLaMA, which hears and writes them; three stages up to chain of modality"
    encoder_name = "mHuBERT base, layer 11, frozen; 1000 units"
    connector_name = "none: units are tokens"
    modalities = "speech units, text → speech units, text"
    cached = "units"
    loss_on_prompt = True
    deviations: ClassVar[tuple[str, ...]] = (
        "a constant prefix of our own",
        "chain of modality ends with the text answer (the speech-to-text form); no vocoder",
        "small: 256 units over Moonshine frames at 21 Hz",
    )

    @classmethod
    def preset(cls, name: PresetName) -> Preset:
        return {"paper": _paper, "small": _small, "tiny": _tiny}[name]()

    @classmethod
    def added_tokens(cls, preset: Preset) -> list[str]:
        return [f"<{unit}>" for unit in range(preset.units or 0)] + MARKERS

    def build_connector(self, preset: Preset, llm_width: int) -> nn.Module:
        return nn.Identity()  # units are tokens: the backbone's embedding is the connector

    def audio_tokens(self, frames: dict[str, int]) -> int:
        """The most a clip can take: one token a frame and two markers (duplicates are merged)."""
        return frames["units"] + 2

    def connect(self, features: dict[str, Tensor], lengths: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        raise TypeError("SpeechGPT has no continuous features: units are tokens")

    def render(self, tokenizer: PreTrainedTokenizerBase, messages: list[Message], clips: Sequence[Audio]) -> Rendered:
        spoken = self._speech(tokenizer, clips[0])
        last = messages[-1]
        if len(messages) == 1 and last["role"] == "assistant":  # speech alone: modality adaptation
            return Rendered().tokens([tokenizer.bos_token_id]).tokens(spoken, learn=True)
        rendered = Rendered().tokens([tokenizer.bos_token_id]).text(tokenizer, PREFIX)
        question = user_text(messages)
        rendered.text(tokenizer, f"[Human]: {question} This is input: " if question else "[Human]: ", learn=True)
        source = next(message for message in messages if message["role"] == "user")
        if has_audio(source):
            rendered.tokens(spoken, learn=True)
        else:
            rendered.text(tokenizer, transcript_text(source) or "", learn=True)
        rendered.text(tokenizer, "<eoh> [SpeechGPT]:" if question else "<eoh>. [SpeechGPT]:", learn=True)
        answer = answer_text(messages)
        if answer is None:
            return rendered
        if has_audio(last):
            rendered.tokens(spoken, learn=True)
        else:
            transcript = transcript_text(last)
            rendered.text(tokenizer, f" {transcript}; [ta] {answer}" if transcript else f" {answer}", learn=True)
        return rendered.text(tokenizer, "<eoa>", learn=True).tokens([tokenizer.eos_token_id], learn=True)

    def _speech(self, tokenizer: PreTrainedTokenizerBase, audio: Audio) -> list[int]:
        if audio.units is None:
            return []
        first, start, end = tokenizer.convert_tokens_to_ids(["<0>", "<sosp>", "<eosp>"])
        merged = torch.unique_consecutive(audio.units).tolist()
        return [start, *(first + unit for unit in merged), end]

    def read_answer(self, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
        return super().read_answer(tokenizer, ids).split("<eoa>")[0].strip()


def _paper() -> Preset:
    # ma_pretrain.py sets no learning rate: the trainer's default; cm_sft.py and com_sft.py: 2e-5 with cosine
    tuning = Optimiser(lr=2e-5, warmup=0.03)
    return Preset(
        encoders={"speech": EncoderSpec(kind="hubert", weights="voidful/mhubert-base", config=HUBERT_BASE, layer=11)},
        backbone=Backbone(weights="huggyllama/llama-7b", tokenizer="huggyllama/llama-7b", config=LLAMA_7B),
        lora=LoRA(rank=8, alpha=16, dropout=0.05, targets=("q_proj", "v_proj")),
        units=1000,
        recipe=Recipe(
            stages=[
                Stage(
                    name="adapt",
                    train=("llm",),
                    tasks={"units": 1.0},
                    optimiser=Optimiser(lr=5e-5, schedule="linear"),
                    epochs=3,
                    batch_tokens=768 * 1024,
                    max_tokens=1024,
                ),
                Stage(
                    name="cross",
                    train=("llm",),
                    tasks={"asr": 1.0, "tts": 1.0},
                    optimiser=tuning,
                    epochs=3,
                    batch_tokens=1536 * 512,
                    max_tokens=512,
                ),
                Stage(
                    name="chain",
                    train=("lora",),
                    tasks={"chain": 1.0},
                    optimiser=tuning,
                    epochs=300,
                    batch_tokens=384 * 1024,
                    max_tokens=1024,
                ),
            ],
            decoding=Decoding(max_new_tokens=2048, sample=True, temperature=0.7, top_p=0.8, top_k=50),
        ),
    )


def _small() -> Preset:
    return Preset(
        encoders={"speech": EncoderSpec(kind="moonshine", weights="earloom/moonshine-tiny-en", pool=2)},
        backbone=Backbone(weights="earloom/smollm2-135m-instruct", tokenizer="earloom/smollm2-135m-instruct"),
        lora=LoRA(rank=8, alpha=16, targets=("q_proj", "v_proj")),
        units=256,
        recipe=Recipe(
            stages=[
                Stage(
                    name="adapt",
                    train=("llm",),
                    tasks={"units": 1.0},
                    optimiser=Optimiser(lr=5e-4, warmup=0.1),
                    batch_tokens=600,
                ),
                Stage(
                    name="cross",
                    train=("llm",),
                    tasks={"asr": 1.0, "tts": 0.1},
                    optimiser=Optimiser(lr=3e-4, warmup=0.03),
                    epochs=2,
                    batch_tokens=600,
                ),
                Stage(
                    name="chain",
                    train=("lora",),
                    tasks={"chain": 1.0},
                    optimiser=Optimiser(lr=3e-4, warmup=0.03),
                    max_steps=20,
                    batch_tokens=600,
                ),
            ],
            decoding=Decoding(max_new_tokens=64),
        ),
    )


def _tiny() -> Preset:
    step = Optimiser(lr=1e-3)
    return Preset(
        encoders={"speech": EncoderSpec(kind="moonshine", config=MOONSHINE_TINY_RANDOM, pool=2)},
        backbone=Backbone(config=TINY_LLAMA),
        lora=LoRA(rank=4, alpha=8),
        units=16,
        recipe=Recipe(
            stages=[
                Stage(
                    name="adapt", train=("llm",), tasks={"units": 1.0}, optimiser=step, max_steps=3, batch_tokens=512
                ),
                Stage(
                    name="cross",
                    train=("llm",),
                    tasks={"asr": 1.0, "tts": 1.0},
                    optimiser=step,
                    max_steps=3,
                    batch_tokens=512,
                ),
                Stage(
                    name="chain", train=("lora",), tasks={"chain": 1.0}, optimiser=step, max_steps=3, batch_tokens=512
                ),
            ],
            decoding=Decoding(max_new_tokens=4),
        ),
    )
