"""FunASR-LLM: frame stacking and an MLP into a causal language model, for speech recognition.

Sources: the LLM-ASR family of the FunASR toolkit, `funasr/models/llm_asr/{model,adaptor}.py`, class LLMASR with its
"Linear" adaptor and recipe `whisper_vicuna_linear`; stage 2 follows the LoRA script of Fun-ASR-Nano; the order of the
stages is that of "Fun-ASR Technical Report" (arXiv 2509.12508): adaptor first, then LoRA on the language model.
Official code: modelscope/FunASR, examples/industrial_data_pretraining/llm_asr.

Parts (`paper`). Whisper-large-v3 encoder, frozen, 30 s windows, 1280-d at 50 Hz; five frames are concatenated
(remainder dropped) and pass Linear 6400→2048, ReLU, Linear 2048→4096: 21.50 M, 10 tokens/s. Backbone Vicuna-7B-v1.5.

Sequence (training layout of the Vicuna data class): audio, BOS, "USER: {prompt}\\n ASSISTANT:", answer, EOS;
only the answer and EOS carry loss.

Deviations: the shipped code decodes with another prompt layout than it trains with; here both are the training layout.
The published token rate holds for whole windows; `small` keeps a clip's own length. SpecAugment is left out because
features are cached. `small` trains the adaptor first by CTC against the backbone's own (frozen) token embeddings, which
needs no pass through the backbone; the toolkit's next-token loss on the adaptor alone takes a GPU. Fun-ASR-Nano
has a CTC branch beside the adaptor too (weight 0.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from models.checkpoints import Checkpoint, llama, openai_whisper
from models.connectors.stacking import StackMLP
from models.contract import SpeechLLM, SpeechLLMConfig
from models.encoders.base import EncoderSpec
from models.preset import Backbone, LoRA, Preset, PresetName
from models.recipe import Curriculum, Decoding, Optimiser, Recipe, Stage
from models.rendering import Audio, Message, Rendered, answer_text, user_text
from models.sizes import MOONSHINE_TINY_RANDOM, TINY_LLAMA, VICUNA_7B, WHISPER_LARGE_V3

PROMPT = "Transcribe speech to text."


class FunASRConfig(SpeechLLMConfig):
    model_type = "earloom_funasr_llm"


class FunASRLLM(SpeechLLM):
    """Speech encoder → stack 5 frames → MLP → causal LM."""

    config_class = FunASRConfig
    title = "FunASR-LLM"
    paper = "An et al., Fun-ASR Technical Report, arXiv 2509.12508 (2025); FunASR toolkit, llm_asr"
    code = "modelscope/FunASR: funasr/models/llm_asr"
    summary = "five frames of Whisper in one, an MLP, and a causal language model that writes down what was said"
    encoder_name = "Whisper-large-v3, frozen"
    connector_name = "stack 5 + MLP"
    checkpoint = Checkpoint(
        file="model.pt.* of the toolkit's trainer, class LLMASR with the Linear adaptor",
        nested=("state_dict",),
        renames=(
            (r"audio_adaptor\.", "connector."),
            *openai_whisper(r"audio_encoder\.", "encoders.speech.layers."),
            *llama(r"llm\."),
        ),
        expects=("connector",),  # the trainer may leave out frozen parts, and LoRA is an option of its recipe
    )
    deviations: ClassVar[tuple[str, ...]] = (
        "decodes with the layout it trains with",
        "no SpecAugment: features are cached",
        "small: the adaptor is trained by CTC against the frozen token embeddings before LoRA",
    )

    @classmethod
    def preset(cls, name: PresetName) -> Preset:
        return {"paper": _paper, "small": _small, "tiny": _tiny}[name]()

    def build_connector(self, preset: Preset, llm_width: int) -> nn.Module:
        sizes = preset.connector
        width = sizes["width"]
        return StackMLP(width, sizes["stack"], sizes["hidden"], llm_width)

    def audio_tokens(self, frames: dict[str, int]) -> int:
        return self.connector.tokens(frames["speech"])  # type: ignore[operator, no-any-return]

    def connect(self, features: dict[str, Tensor], lengths: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self.connector(features["speech"], lengths["speech"])  # type: ignore[no-any-return]

    def render(self, tokenizer: PreTrainedTokenizerBase, messages: list[Message], clips: Sequence[Audio]) -> Rendered:
        rendered = Rendered().audio(self.audio_tokens(clips[0].frames), filler=tokenizer.bos_token_id)
        rendered.tokens([tokenizer.bos_token_id]).text(tokenizer, f"USER: {user_text(messages)}\n ASSISTANT:")
        answer = answer_text(messages)
        if answer is None:
            return rendered
        return rendered.text(tokenizer, f" {answer}", learn=True).tokens([tokenizer.eos_token_id], learn=True)


def _paper() -> Preset:
    adaptor = Optimiser(lr=1e-4, warmup=1500, clip=5.0, schedule="constant")
    return Preset(
        encoders={
            "speech": EncoderSpec(
                kind="whisper", weights="openai/whisper-large-v3", config=WHISPER_LARGE_V3, window=True
            )
        },
        connector={"width": 1280, "stack": 5, "hidden": 2048},
        backbone=Backbone(weights="lmsys/vicuna-7b-v1.5", tokenizer="lmsys/vicuna-7b-v1.5", config=VICUNA_7B),
        lora=LoRA(rank=16, alpha=32, dropout=0.05, targets=("q_proj", "v_proj")),
        recipe=Recipe(
            stages=[
                Stage(name="adaptor", train=("connector",), optimiser=adaptor, epochs=15, batch_tokens=6000),
                Stage(name="lora", train=("lora",), optimiser=adaptor, epochs=50, batch_tokens=6000),
            ],
            decoding=Decoding(beams=4, max_new_tokens=200),
        ),
    )


def _small() -> Preset:
    return Preset(
        encoders={"speech": EncoderSpec(kind="moonshine", weights="earloom/moonshine-tiny-en")},
        connector={"width": 288, "stack": 5, "hidden": 1152},
        backbone=Backbone(weights="earloom/smollm2-135m-instruct", tokenizer="earloom/smollm2-135m-instruct"),
        lora=LoRA(rank=16, alpha=32, targets=("q_proj", "v_proj")),
        recipe=Recipe(
            stages=[
                Stage(
                    name="adaptor",
                    train=("connector",),
                    loss="ctc",
                    optimiser=Optimiser(lr=2e-3, warmup=0.1),
                    epochs=8,
                    batch_tokens=600,
                ),
                Stage(
                    name="lora",
                    train=("connector", "lora"),
                    optimiser=Optimiser(lr=1e-3, warmup=0.1),
                    epochs=2,
                    batch_tokens=150,
                ),
            ],
            decoding=Decoding(max_new_tokens=64),
        ),
    )


def _tiny() -> Preset:
    return Preset(
        encoders={"speech": EncoderSpec(kind="moonshine", config=MOONSHINE_TINY_RANDOM)},
        connector={"width": 32, "stack": 2, "hidden": 48},
        backbone=Backbone(config=TINY_LLAMA),
        lora=LoRA(rank=4, alpha=8),
        recipe=Recipe(
            stages=[
                Stage(
                    name="adaptor",
                    train=("connector",),
                    loss="ctc",
                    optimiser=Optimiser(lr=1e-3),
                    max_steps=4,
                    batch_tokens=512,
                    curriculum=Curriculum(order="duration"),
                ),
                Stage(
                    name="lora",
                    train=("connector", "lora"),
                    optimiser=Optimiser(lr=1e-3),
                    max_steps=4,
                    batch_tokens=512,
                ),
            ],
            decoding=Decoding(max_new_tokens=4),
        ),
    )
