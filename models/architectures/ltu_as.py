"""LTU-AS: LTU for audio and speech, through all 32 layers of a frozen Whisper, with its transcript as text beside them.

Gong et al., "Joint Audio and Speech Understanding", ASRU 2023, arXiv 2309.14405. Official code: YuanGongND/ltu, folder
`src/ltu_as` (extract_whisper_feature.py, finetune.py, train_scripts/, the vendored modeling_llama.py).

What differs from LTU (`models/architectures/ltu.py`), whose template, splice, loss and trainer's settings hold:

Parts (`paper`). Whisper-large (v1) hears the first 10 s, 500 frames; what its 32 blocks give (neither the convolutions
before them nor the LayerNorm behind) is averaged over 20 frames: 25 x 32 x 1280, computed once. TLTR, 39.4 M, started
from Whisper-AT: one block over time for each layer (1 head), one over the layers for each moment (8 heads), mean over
layers. LayerNorm that learns nothing, Linear 1280→4096: 25 tokens. Trained: 48,793,600 of 6,787,209,216 without
Whisper.

Sequence: as LTU's, with what Whisper's decoder heard in the template's block "### Input:\\n{transcript}\\n\\n"; without
words the block is left out. Known inventions ("thanks for watching") are taken out first. Recognition comes from this
text: the word error rate is 4.9 % with it and 97.2 % without.

Recipe: 1 projection on classification, 2.1 M questions, 1e-3, two epochs; 2 projection, TLTR and LoRA on the same, 2e-4
(poster; the script says 1e-4), two epochs; 3 the same on all of OpenASQA, 9.6 M, 2e-4, one epoch. At most 108 tokens of
text.

Deviations: LTU's on batches, cut text and decoding. Clips below 10 s are padded with silence, the official code pads
their spectrogram with zeros. TLTR starts from random numbers. The transcriber hears 30 s; the demo's large-v2 is taken,
what made the training transcripts was not found. `small`: the four layers of Whisper-tiny (Smart Turn) on a clip's own
length, at most 8 s, 2.5 tokens a second; Moonshine's transcript.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from models.architectures.ltu import LTU, classification, room, step
from models.checkpoints import Checkpoint, peft_lora
from models.connectors.tltr import TLTR
from models.contract import SpeechLLMConfig
from models.encoders.base import EncoderSpec
from models.encoders.transcriber import transcript_of, without_hallucinations
from models.preset import Backbone, LoRA, Preset, PresetName
from models.recipe import Decoding, Optimiser, Recipe, Stage
from models.rendering import Audio
from models.sizes import (
    MOONSHINE_TINY_RANDOM,
    TINY_LLAMA,
    VICUNA_7B_V1,
    WHISPER_LARGE,
    WHISPER_LARGE_V2,
    WHISPER_LARGE_V2_DECODER,
    WHISPER_TINY_RANDOM,
)

ALL = ("connector", "tltr", "lora")
EVERYTHING = {"labels": 1.0, "caption": 1.0, "asr": 1.0, "conversation": 1.0}


class LTUASConfig(SpeechLLMConfig):
    model_type = "earloom_ltu_as"


class LTUAS(LTU):
    """(all layers of a speech encoder → TLTR → projector) + transcript as text → causal LM with LoRA."""

    config_class = LTUASConfig
    title = "LTU-AS"
    paper = "Gong et al., Joint Audio and Speech Understanding, ASRU 2023, arXiv 2309.14405"
    code = "YuanGongND/ltu: src/ltu_as"
    summary = "all 32 layers of Whisper through a small transformer, 25 tokens for 10 s, and its transcript as text"
    encoder_name = "Whisper-large v1, layers 1 to 32, and a Whisper transcript, frozen"
    connector_name = "TLTR, LayerNorm, Linear"
    checkpoint = Checkpoint(
        file="ltuas_*.bin: TLTR, projection and LoRA, what finetune.py saves",
        renames=(
            (r"base_model\.model\.model\.audio_encoder\.", "connector."),
            (r"base_model\.model\.model\.audio_proj\.1\.", "connector.audio_proj.proj."),
            *peft_lora(),
        ),
        expects=ALL,
    )
    read_roles = ("transcript",)
    deviations: ClassVar[tuple[str, ...]] = (
        "samples with too much text are left out; prompt and answer are tokenised apart; no repetition penalty",
        "clips below 10 s are padded with silence, not with zeros in the spectrogram",
        "TLTR starts from random numbers, not from Whisper-AT",
        "small: four layers of Whisper-tiny on a clip's own length, Moonshine's transcript",
    )

    @classmethod
    def preset(cls, name: PresetName) -> Preset:
        return {"paper": _paper, "small": _small, "tiny": _tiny}[name]()

    def build_connector(self, preset: Preset, llm_width: int) -> nn.Module:
        sizes = preset.connector
        self.learn_prompt = sizes.get("learn_prompt", True)
        return TLTR(sizes["layers"], sizes["width"], llm_width, time_heads=1, layer_heads=sizes["heads"])

    def parameter_groups(self) -> dict[str, list[str]]:
        """The connector's projection apart from its transformer, which stage 1 leaves as it is."""
        groups = super().parameter_groups()
        tltr = [name for name in groups["connector"] if not name.startswith("connector.audio_proj.")]
        return groups | {"connector": [n for n in groups["connector"] if n not in tltr], "tltr": tltr}

    def audio_tokens(self, frames: dict[str, int]) -> int:
        return self.connector.tokens(frames["speech"])  # type: ignore[operator, no-any-return]

    def connect(self, features: dict[str, Tensor], lengths: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self.connector(features["speech"], lengths["speech"])  # type: ignore[no-any-return]

    def given(self, clip: Audio) -> str:
        return without_hallucinations(transcript_of(clip.features["transcript"]))


def _paper() -> Preset:
    return Preset(
        encoders={
            "speech": EncoderSpec(
                kind="whisper",
                weights="openai/whisper-large",
                config=WHISPER_LARGE | {"max_source_positions": 500},
                layers=tuple(range(1, 33)),
                pool=20,
                window=True,
            ),
            "transcript": EncoderSpec(
                kind="transcriber",
                weights="openai/whisper-large-v2",
                config=WHISPER_LARGE_V2 | WHISPER_LARGE_V2_DECODER | {"model": "whisper"},
            ),
        },
        connector={"layers": 32, "width": 1280, "heads": 8},
        backbone=Backbone(weights="lmsys/vicuna-7b-v1.1", tokenizer="lmsys/vicuna-7b-v1.1", config=VICUNA_7B_V1),
        lora=LoRA(rank=8, alpha=16, dropout=0.05, targets=("q_proj", "v_proj")),
        recipe=Recipe(
            stages=[
                *classification(ALL, 2e-4, tokens=25),
                Stage(name="all_mix", train=ALL, tasks=EVERYTHING, phrasings=4, optimiser=step(2e-4), **room(25)),
            ],
            decoding=Decoding(max_new_tokens=400, sample=True, temperature=0.1, top_p=0.95, top_k=500),
        ),
    )


def _small() -> Preset:
    tuning = Optimiser(lr=1e-3, warmup=0.1, schedule="linear")
    labels: dict[str, Any] = {"tasks": {"labels": 1.0}, "batch_tokens": 200}
    return Preset(
        encoders={
            "speech": EncoderSpec(
                kind="whisper", weights="earloom/whisper-tiny-smart-turn", layers=(1, 2, 3, 4), pool=20
            ),
            "transcript": EncoderSpec(
                kind="transcriber", weights="earloom/moonshine-tiny-en", config={"model": "moonshine"}
            ),
        },
        connector={"layers": 4, "width": 384, "heads": 8, "learn_prompt": False},
        backbone=Backbone(weights="earloom/smollm2-135m-instruct", tokenizer="earloom/smollm2-135m-instruct"),
        lora=LoRA(rank=8, alpha=16, targets=("q_proj", "v_proj")),
        recipe=Recipe(
            stages=[
                Stage(name="proj_cla", train=("connector",), optimiser=tuning, max_steps=20, **labels),
                Stage(name="all_cla", train=ALL, optimiser=tuning, **labels),
                Stage(
                    name="all_mix",
                    train=ALL,
                    tasks={"asr": 0.25, "labels": 1.0, "caption": 0.25},
                    optimiser=tuning,
                    batch_tokens=200,
                ),
            ],
            decoding=Decoding(max_new_tokens=64),
        ),
    )


def _tiny() -> Preset:
    shared: dict[str, Any] = {"optimiser": Optimiser(lr=1e-3), "max_steps": 3, "batch_tokens": 512}
    return Preset(
        encoders={
            "speech": EncoderSpec(kind="whisper", config=WHISPER_TINY_RANDOM, layers=(1, 2), pool=20, window=True),
            "transcript": EncoderSpec(kind="transcriber", config=MOONSHINE_TINY_RANDOM | {"model": "moonshine"}),
        },
        connector={"layers": 2, "width": 24, "heads": 4},
        backbone=Backbone(config=TINY_LLAMA),
        lora=LoRA(rank=4, alpha=8),
        recipe=Recipe(
            stages=[
                Stage(name="proj_cla", train=("connector",), tasks={"labels": 1.0}, **shared),
                Stage(name="all_cla", train=ALL, tasks={"labels": 1.0}, **shared),
                Stage(name="all_mix", train=ALL, tasks=EVERYTHING, **shared),
            ],
            decoding=Decoding(max_new_tokens=4),
        ),
    )
