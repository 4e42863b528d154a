"""SALMONN: two encoders, a window-level Q-Former and a LoRA-tuned language model, for speech, events and music.

Tang et al., "SALMONN: Towards Generic Hearing Abilities for Large Language Models", ICLR 2024, arXiv 2310.13289.
Official code: bytedance/SALMONN, branch `salmonn` (models/salmonn.py, models/Qformer.py, configs/config.yaml).

Parts (`paper`, 13B). Whisper-large-v2 encoder (always 1500 x 1280) and BEATs iter3+ (768), both frozen. LayerNorm on
each, the shorter stream zero-padded after it, concatenated by frame index to 2048. Windows of round(1500 x 0.333333/30)
= 17 frames without overlap, remainder dropped: 88 windows. A two-layer BERT-shaped Q-Former with one query and random
start reads each window; Linear 768→5120. 88 tokens a clip. Vicuna-13B v1.1 with LoRA r 8, alpha 32, dropout 0.1 on
q_proj and v_proj. Trainable: 33,332,992.

Sequence: BOS, "USER: <Speech>", audio, "</Speech> {instruction}\\nASSISTANT:", answer, EOS; `<Speech>` is ordinary
text. Loss on the answer and EOS only.

Recipe (configs/config.yaml, one for all stages): 1 pre-training on recognition and captioning, 2 instruction tuning on
twelve tasks, 3 activation tuning on twelve long answers, written by the model itself with its LoRA scaled down. The
same parameters learn in all three: Q-Former, LayerNorms, projection, LoRA.

Deviations: the text behind the audio is not padded in the middle of a row. Stage 3 learns the conversations that the
data brings; without any it is skipped. `small` puts Moonshine in Whisper's and Whisper-tiny in BEATs' place, keeps
a clip's own length, and pairs frames by time, since 41.5 and 50 Hz do not meet by index. Its windows are 0.12 s, so
that words have a position each, and its stage 1 trains the Q-Former alone, by CTC against the backbone's embeddings:
from a random start, next-token loss had not taught it to listen after sixty steps (WER 122 %, one answer for all).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from models.checkpoints import Checkpoint, lavis_qformer, peft_lora
from models.connectors.window_qformer import WindowQFormer
from models.contract import SpeechLLM, SpeechLLMConfig
from models.encoders.base import EncoderSpec
from models.preset import Backbone, LoRA, Preset, PresetName
from models.recipe import Decoding, Optimiser, Recipe, Stage
from models.rendering import Audio, Message, Rendered, answer_text, user_text
from models.sizes import MOONSHINE_TINY_RANDOM, TINY_LLAMA, VICUNA_13B, WHISPER_LARGE_V2, WHISPER_TINY_RANDOM

TRAINED = ("connector", "lora")
INSTRUCTIONS = {"asr": 1.0, "caption": 1.0, "translation": 0.5, "labels": 0.5}


class SalmonnConfig(SpeechLLMConfig):
    model_type = "earloom_salmonn"


class Salmonn(SpeechLLM):
    """(speech encoder ‖ audio encoder) → window Q-Former → causal LM with LoRA."""

    config_class = SalmonnConfig
    title = "SALMONN"
    paper = (
        "Tang et al., SALMONN: Towards Generic Hearing Abilities for Large Language Models, ICLR 2024, arXiv 2310.13289"
    )
    code = "bytedance/SALMONN, branch salmonn"
    summary = "Whisper and BEATs side by side, read window by window; Vicuna with LoRA hears speech, events and music"
    encoder_name = "Whisper-large-v2 and BEATs iter3+, frozen"
    connector_name = "window Q-Former: 17 frames, 1 query"
    checkpoint = Checkpoint(
        file="salmonn_v1.pth, or salmonn_7b_v0.pth with another backbone: what runner.py saves",
        nested=("model",),
        renames=(
            (r"speech_query_tokens$", "connector.query_tokens"),
            *lavis_qformer(r"speech_Qformer\.", "connector.qformer."),
            (r"speech_llama_proj\.", "connector.proj."),
            (r"(ln_speech|ln_audio)\.", r"connector.\1."),
            *peft_lora(r"llama_model\."),
        ),
        expects=("connector", "lora"),  # what is frozen is not in the file
    )
    deviations: ClassVar[tuple[str, ...]] = (
        "no padding in the middle of a row",
        "activation tuning learns the conversations of the data, and is skipped without any",
        "small: Moonshine and Whisper-tiny in the place of Whisper-large-v2 and BEATs, frames paired by time",
        "small: windows of 0.12 s; the Q-Former starts by CTC against the frozen token embeddings",
    )

    @classmethod
    def preset(cls, name: PresetName) -> Preset:
        return {"paper": _paper, "small": _small, "tiny": _tiny}[name]()

    def build_connector(self, preset: Preset, llm_width: int) -> nn.Module:
        sizes = preset.connector
        self.frame_ratio: float | None = sizes.get("frame_ratio")
        return WindowQFormer(
            tuple(sizes["widths"]),
            sizes["window"],
            sizes["queries"],
            sizes["layers"],
            sizes["hidden"],
            sizes["heads"],
            llm_width,
        )

    def audio_tokens(self, frames: dict[str, int]) -> int:
        audio = frames["speech"] if self.frame_ratio else frames["audio"]
        return self.connector.tokens(frames["speech"], audio)  # type: ignore[operator, no-any-return]

    def connect(self, features: dict[str, Tensor], lengths: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        audio, audio_lengths = features["audio"], lengths["audio"]
        if self.frame_ratio:
            audio, audio_lengths = self._paired_by_time(
                audio, audio_lengths, features["speech"].shape[1], lengths["speech"]
            )
        return self.connector(features["speech"], audio, lengths["speech"], audio_lengths)  # type: ignore[no-any-return]

    def _paired_by_time(
        self, audio: Tensor, audio_lengths: Tensor, longest: int, lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """For each speech frame the audio frame of the same moment (the last one behind a clip's end)."""
        moments = (torch.arange(longest, device=audio.device) * float(self.frame_ratio or 1.0)).long()
        at = torch.minimum(moments[None], audio_lengths[:, None] - 1)
        return audio.gather(1, at[..., None].expand(-1, -1, audio.shape[2])), lengths

    def render(self, tokenizer: PreTrainedTokenizerBase, messages: list[Message], clips: Sequence[Audio]) -> Rendered:
        rendered = Rendered().tokens([tokenizer.bos_token_id]).text(tokenizer, "USER: <Speech>")
        rendered.audio(self.audio_tokens(clips[0].frames), filler=tokenizer.bos_token_id)
        rendered.text(tokenizer, f"</Speech> {user_text(messages)}\nASSISTANT:")
        answer = answer_text(messages)
        if answer is None:
            return rendered
        return rendered.text(tokenizer, f" {answer}", learn=True).tokens([tokenizer.eos_token_id], learn=True)


def _stages(
    optimiser: Optimiser, *, epochs: tuple[float, float, float], batch_tokens: int, max_steps: int | None = None
) -> list[Stage]:
    shared = {"train": TRAINED, "optimiser": optimiser, "batch_tokens": batch_tokens, "max_steps": max_steps}
    return [
        Stage(name="pretrain", tasks={"asr": 1.0, "caption": 1.0}, epochs=epochs[0], **shared),
        Stage(name="instruct", tasks=INSTRUCTIONS, epochs=epochs[1], **shared),
        Stage(name="activate", tasks={"conversation": 1.0}, epochs=epochs[2], **(shared | {"max_steps": 12})),
    ]


def _paper() -> Preset:
    optimiser = Optimiser(lr=3e-5, weight_decay=0.05, clip=0.0, warmup=3000, final_lr=1e-5)
    return Preset(
        encoders={
            "speech": EncoderSpec(
                kind="whisper", weights="openai/whisper-large-v2", config=WHISPER_LARGE_V2, window=True
            ),
            "audio": EncoderSpec(kind="beats", weights="BEATs_iter3_plus_AS2M_finetuned_on_AS2M_cpt2"),
        },
        connector={"widths": [1280, 768], "window": 17, "queries": 1, "layers": 2, "hidden": 768, "heads": 12},
        backbone=Backbone(weights="lmsys/vicuna-13b-v1.1", tokenizer="lmsys/vicuna-13b-v1.1", config=VICUNA_13B),
        lora=LoRA(rank=8, alpha=32, dropout=0.1, targets=("q_proj", "v_proj")),
        recipe=Recipe(
            stages=_stages(optimiser, epochs=(30, 30, 1), batch_tokens=2048),
            decoding=Decoding(beams=4, max_new_tokens=200),
            seed=42,
        ),
    )


def _small() -> Preset:
    return Preset(
        encoders={
            "speech": EncoderSpec(kind="moonshine", weights="earloom/moonshine-tiny-en"),
            "audio": EncoderSpec(kind="whisper", weights="earloom/whisper-tiny-smart-turn"),
        },
        connector={
            "widths": [288, 384],
            "window": 5,
            "queries": 1,
            "layers": 2,
            "hidden": 288,
            "heads": 8,
            "frame_ratio": 50 / 41.5,
        },
        backbone=Backbone(weights="earloom/smollm2-135m-instruct", tokenizer="earloom/smollm2-135m-instruct"),
        lora=LoRA(rank=8, alpha=32, targets=("q_proj", "v_proj")),
        recipe=Recipe(
            stages=[
                Stage(
                    name="pretrain",
                    train=("connector",),
                    loss="ctc",
                    optimiser=Optimiser(lr=1e-3, weight_decay=0.05, warmup=0.1),
                    epochs=6,
                    batch_tokens=600,
                ),
                *_stages(Optimiser(lr=1e-3, weight_decay=0.05, warmup=0.1), epochs=(1, 1, 1), batch_tokens=300)[1:],
            ],
            decoding=Decoding(max_new_tokens=64),
        ),
    )


def _tiny() -> Preset:
    return Preset(
        encoders={
            "speech": EncoderSpec(kind="moonshine", config=MOONSHINE_TINY_RANDOM),
            "audio": EncoderSpec(kind="whisper", config=WHISPER_TINY_RANDOM, seed=1),
        },
        connector={
            "widths": [32, 24],
            "window": 14,
            "queries": 1,
            "layers": 2,
            "hidden": 32,
            "heads": 4,
            "frame_ratio": 50 / 41.5,
        },
        backbone=Backbone(config=TINY_LLAMA),
        lora=LoRA(rank=4, alpha=16),
        recipe=Recipe(
            stages=_stages(Optimiser(lr=1e-3), epochs=(1, 1, 1), batch_tokens=512, max_steps=3),
            decoding=Decoding(max_new_tokens=4),
        ),
    )
