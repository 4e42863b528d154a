"""Speech-LLaMA: frames that a CTC head finds alike become one, and a small transformer takes them into LLaMA's space.

Wu et al., "On decoder-only architecture for speech-to-text and large language model integration", ASRU 2023, arXiv
2307.03917. No code or weights were published and the paper could not be read in full: this is a reconstruction. Known:
a pre-trained CTC compressor, a randomly initialised audio encoder of four transformer layers, LLaMA-7B; only the audio
encoder learns, LoRA may follow; the task is speech of 13 languages to English text.

Parts (`paper`). Frames: HuBERT-large, tuned with letter CTC (facebook/hubert-large-ls960-ft), mean of two: 25 Hz, as
behind the paper's fourfold subsampling. Compressor: Linear 1024→257 (blank and the bytes of UTF-8). Neighbouring frames
with the same best letter become their mean (`average`); `blank_removal` keeps the frames that are no blank,
`blank_probability` those whose blank has less than `threshold`. Which frames go together carries no gradient. Audio
encoder: Linear 1024→4096, four pre-norm layers of 4096 with 32 heads and FFN 4096, LayerNorm: 407.0 M. LoRA rank 2 on
q, k, v and o of LLaMA-7B: 2.10 M. How many tokens a clip takes depends on what is said: the plan reserves a position
for each frame, and what stays empty is dropped before the backbone runs.

Sequence: BOS, audio, "{instruction}\\n", answer, EOS; loss on the answer and EOS.

Recipe: 1 compressor: letter CTC on transcripts, the head alone; it stays as it is from here on. 2 encoder: next-token
loss, LLM frozen. 3 lora: audio encoder and LoRA.

Deviations. Chosen, since not found: the whole of the optimisation (learning rates, batch, epochs), heads and FFN,
LoRA's alpha, the threshold, the prompt, the CTC alphabet, `average` as the method, and that the audio encoder goes on
learning beside LoRA. Parakeet would be the nearest open CTC model, but with 12.5 frames a second 29 of 60 LibriSpeech
clips have more letters than frames; HuBERT's tuned model knows English alone. The backbone is causal over the audio
too: the paper also tries a full mask there. The audio encoder itself sees the whole clip unless `causal` is set.
`small`: Moonshine frames at 41.5 Hz, an audio encoder of two layers of 288, and its stage 2 is CTC against the
backbone's frozen token embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from models.connectors.ctc_compression import Method, compress
from models.connectors.transformer import TransformerAdapter
from models.contract import SpeechLLM, SpeechLLMConfig
from models.encoders.base import EncoderSpec
from models.preset import Backbone, LoRA, Preset, PresetName
from models.recipe import Decoding, Optimiser, Recipe, Stage
from models.rendering import Audio, Message, Rendered, answer_text, user_text
from models.sizes import HUBERT_LARGE, HUBERT_TINY_RANDOM, LLAMA_7B, TINY_LLAMA

LETTERS = 257  # the blank is 0, byte b is 1 + b: models/objectives.py
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


class SpeechLlamaConfig(SpeechLLMConfig):
    model_type = "earloom_speech_llama"


class SpeechLlama(SpeechLLM):
    """Speech encoder → CTC compressor → transformer → causal LM."""

    config_class = SpeechLlamaConfig
    title = "Speech-LLaMA"
    paper = (
        "Wu et al., On decoder-only architecture for speech-to-text and large language model integration, "
        "ASRU 2023, arXiv 2307.03917"
    )
    code = "none"
    summary = "a CTC head says which frames belong together; what is left goes through four layers into LLaMA"
    encoder_name = "HuBERT-large with letter CTC, frozen; a CTC compressor"
    connector_name = "4 transformer layers"
    exact_tokens = False
    deviations: ClassVar[tuple[str, ...]] = (
        "a reconstruction: sizes of the audio encoder's layers, prompt, CTC alphabet and all optimisation are chosen",
        "HuBERT-large with letter CTC in the place of an unpublished compressor: English alone",
        "the backbone is causal over the audio too",
        "small: Moonshine frames, two layers of 288; the audio encoder starts by CTC against the token embeddings",
    )
    compressor: nn.Linear

    @classmethod
    def preset(cls, name: PresetName) -> Preset:
        return {"paper": _paper, "small": _small, "tiny": _tiny}[name]()

    def build_connector(self, preset: Preset, llm_width: int) -> nn.Module:
        sizes = preset.connector
        self.method: Method = sizes["method"]
        self.threshold: float = sizes.get("threshold", 0.5)
        return TransformerAdapter(
            sizes["width"],
            sizes["layers"],
            sizes["heads"],
            sizes["ffn"],
            llm_width,
            hidden=sizes["hidden"],
            causal=sizes.get("causal", False),
        )

    def build_parts(self, preset: Preset) -> None:
        self.compressor = nn.Linear(preset.connector["width"], LETTERS)

    def audio_tokens(self, frames: dict[str, int]) -> int:
        """The most that a clip can take: all of its frames."""
        return frames["speech"]

    def spell(self, features: dict[str, Tensor], lengths: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self.compressor(features["speech"]), lengths["speech"]

    def connect(self, features: dict[str, Tensor], lengths: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        frames, counts = features["speech"], lengths["speech"]
        with torch.no_grad():
            heard = self.compressor(frames).float().log_softmax(-1)
        return self.connector(*compress(frames, counts, heard, self.method, threshold=self.threshold))  # type: ignore[no-any-return]

    def render(self, tokenizer: PreTrainedTokenizerBase, messages: list[Message], clips: Sequence[Audio]) -> Rendered:
        rendered = Rendered().tokens([tokenizer.bos_token_id])
        rendered.audio(self.audio_tokens(clips[0].frames), filler=tokenizer.bos_token_id)
        rendered.text(tokenizer, f"{user_text(messages)}\n")
        answer = answer_text(messages)
        if answer is None:
            return rendered
        return rendered.text(tokenizer, answer, learn=True).tokens([tokenizer.eos_token_id], learn=True)


def _paper() -> Preset:
    optimiser = Optimiser(lr=1e-4, warmup=0.05)
    into_english = {"translation": 1.0, "asr": 1.0}
    return Preset(
        encoders={
            "speech": EncoderSpec(kind="hubert", weights="facebook/hubert-large-ls960-ft", config=HUBERT_LARGE, pool=2)
        },
        connector={"width": 1024, "method": "average", "hidden": 4096, "layers": 4, "heads": 32, "ffn": 4096},
        backbone=Backbone(weights="huggyllama/llama-7b", tokenizer="huggyllama/llama-7b", config=LLAMA_7B),
        lora=LoRA(rank=2, alpha=4, targets=ATTENTION),
        recipe=Recipe(
            stages=[
                Stage(
                    name="compressor", train=("compressor",), loss="letters", optimiser=optimiser, batch_tokens=16384
                ),
                Stage(
                    name="encoder",
                    train=("connector",),
                    tasks=into_english,
                    optimiser=optimiser,
                    epochs=3,
                    batch_tokens=16384,
                ),
                Stage(
                    name="lora",
                    train=("connector", "lora"),
                    tasks=into_english,
                    optimiser=optimiser,
                    batch_tokens=16384,
                ),
            ],
            decoding=Decoding(beams=4, max_new_tokens=200),
        ),
    )


def _small() -> Preset:
    return Preset(
        encoders={"speech": EncoderSpec(kind="moonshine", weights="earloom/moonshine-tiny-en")},
        connector={"width": 288, "method": "average", "hidden": 288, "layers": 2, "heads": 6, "ffn": 576},
        backbone=Backbone(weights="earloom/smollm2-135m-instruct", tokenizer="earloom/smollm2-135m-instruct"),
        lora=LoRA(rank=2, alpha=4, targets=ATTENTION),
        recipe=Recipe(
            stages=[
                Stage(
                    name="compressor",
                    train=("compressor",),
                    loss="letters",
                    optimiser=Optimiser(lr=3e-2, warmup=0.1),
                    epochs=10,
                    batch_tokens=600,
                ),
                Stage(
                    name="encoder",
                    train=("connector",),
                    loss="ctc",
                    optimiser=Optimiser(lr=1e-3, warmup=0.1),
                    epochs=10,
                    batch_tokens=800,
                ),
                Stage(
                    name="lora",
                    train=("connector", "lora"),
                    optimiser=Optimiser(lr=1e-3, warmup=0.1),
                    batch_tokens=600,
                ),
            ],
            decoding=Decoding(max_new_tokens=64),
        ),
    )


def _tiny() -> Preset:
    shared = {"optimiser": Optimiser(lr=1e-3), "max_steps": 3, "batch_tokens": 512}
    return Preset(
        encoders={"speech": EncoderSpec(kind="hubert", config=HUBERT_TINY_RANDOM, pool=2)},
        connector={"width": 24, "method": "average", "hidden": 32, "layers": 2, "heads": 4, "ffn": 32},
        backbone=Backbone(config=TINY_LLAMA),
        lora=LoRA(rank=2, alpha=4, targets=ATTENTION),
        recipe=Recipe(
            stages=[
                Stage(name="compressor", train=("compressor",), loss="letters", **shared),
                Stage(name="encoder", train=("connector",), tasks={"asr": 1.0, "translation": 1.0}, **shared),
                Stage(name="lora", train=("connector", "lora"), tasks={"asr": 1.0, "translation": 1.0}, **shared),
            ],
            decoding=Decoding(max_new_tokens=4),
        ),
    )
