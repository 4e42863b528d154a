"""COSMIC: a speech LLM that learns from examples in its prompt. A reconstruction: no code and no weights are public.

Pan et al., "COSMIC: Data Efficient Instruction-tuning For Speech In-Context Learning", Interspeech 2024,
arXiv 2311.02248 (version 2). Official code: none.

Known. A pretrained acoustic encoder, a windowed Q-Former, a frozen language model with LoRA; fewer than 30 M parameters
learn; 450 hours of English speech; supervision is transcripts and question-answer pairs that GPT-3.5 wrote from them.
In-context learning and contextual biasing are said to emerge from that.

Parts (`paper`; sizes chosen). Whisper-large-v2 encoder, frozen, a clip's own length (50 Hz, 1280). LayerNorm, windows
of 17 frames (0.34 s) without overlap, one query, two BERT-shaped layers of 768, Linear to 4096: 88 tokens for 30 s.
LLaMA-2-7B-chat, frozen, LoRA r 8 on q and v. Trainable: 23,631,104 + 4,194,304 = 27,825,408.

Sequence (chosen: LLaMA-2's chat, so that an example is a turn). For each example, then for what is asked: BOS,
"[INST]", audio, " {request} [/INST]", " {answer}", EOS. Loss on the last answer and its EOS only: examples are shown,
not learnt (chosen). A list of words for biasing stands in the request.

Recipe. 1 instruction: transcripts and question-answer pairs (`conversation`). 2 in_context: recognition, translation
and biased recognition behind one example of the same data set. Connector and LoRA learn in both.

Deviations: all that is not under Known is chosen: which encoder and backbone, depth, queries and window of the
Q-Former, rank, scale and targets of LoRA, prompts, masks, optimiser, batches and steps. Stage 2 is an addition: the
paper reports one-shot gains (translation, other domains); what could be read of it does not speak of examples in
training.
Examples for an answer come from the train split. Question-answer pairs come with the data or not at all. `small` has
Moonshine and windows of 0.12 s; its Q-Former learns by CTC against the backbone's embeddings first, LoRA in stage 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from models.connectors.window_qformer import WindowQFormer
from models.contract import SpeechLLM, SpeechLLMConfig
from models.encoders.base import EncoderSpec
from models.preset import Backbone, LoRA, Preset, PresetName
from models.recipe import Decoding, Optimiser, Recipe, Stage
from models.rendering import Audio, Message, Rendered, turns
from models.sizes import LLAMA_2_7B_CHAT, TINY_LLAMA, WHISPER_LARGE_V2, WHISPER_TINY_RANDOM

TRAINED = ("connector", "lora")
INSTRUCTIONS = {"asr": 1.0, "conversation": 1.0}
IN_CONTEXT = {"asr": 1.0, "translation": 1.0, "biased_asr": 0.5}


class CosmicConfig(SpeechLLMConfig):
    model_type = "earloom_cosmic"


class Cosmic(SpeechLLM):
    """Speech encoder → window Q-Former → causal LM with LoRA, several clips a prompt."""

    config_class = CosmicConfig
    title = "COSMIC"
    paper = (
        "Pan et al., COSMIC: Data Efficient Instruction-tuning For Speech In-Context Learning, Interspeech 2024, "
        "arXiv 2311.02248"
    )
    code = "none"
    summary = "reads a spoken example and its answer in the prompt before the clip that is asked about (reconstruction)"
    encoder_name = "Whisper-large-v2, frozen (chosen)"
    connector_name = "window Q-Former: 17 frames, 1 query"
    several_clips = True
    deviations: ClassVar[tuple[str, ...]] = (
        "a reconstruction: encoder, backbone, sizes, prompts, optimiser and steps are chosen, none is published",
        "stage 2 trains on prompts with an example; the paper has in-context learning emerge",
        "only the last answer of a prompt carries loss",
        "small: windows of 0.12 s; the Q-Former starts by CTC against the frozen token embeddings",
    )

    @classmethod
    def preset(cls, name: PresetName) -> Preset:
        return {"paper": _paper, "small": _small, "tiny": _tiny}[name]()

    def build_connector(self, preset: Preset, llm_width: int) -> nn.Module:
        sizes = preset.connector
        shape = {name: sizes[name] for name in ("window", "queries", "layers", "hidden", "heads")}
        return WindowQFormer((sizes["width"],), **shape, out=llm_width)

    def audio_tokens(self, frames: dict[str, int]) -> int:
        return self.connector.tokens(frames["speech"])  # type: ignore[operator, no-any-return]

    def connect(self, features: dict[str, Tensor], lengths: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self.connector(features["speech"], lengths["speech"])  # type: ignore[no-any-return]

    def render(self, tokenizer: PreTrainedTokenizerBase, messages: list[Message], clips: Sequence[Audio]) -> Rendered:
        rendered, heard, said = Rendered(), iter(clips), turns(messages)
        for number, turn in enumerate(said, 1):
            rendered.tokens([tokenizer.bos_token_id]).text(tokenizer, "[INST]")
            for _ in range(turn.clips):
                rendered.audio(self.audio_tokens(next(heard).frames), filler=tokenizer.bos_token_id)
            rendered.text(tokenizer, f" {turn.request} [/INST]")
            if turn.answer is not None:
                last = number == len(said)
                rendered.text(tokenizer, f" {turn.answer}", last).tokens([tokenizer.eos_token_id], last)
        return rendered


def _paper() -> Preset:
    optimiser = Optimiser(lr=1e-4, warmup=1000)
    return Preset(
        encoders={"speech": EncoderSpec(kind="whisper", weights="openai/whisper-large-v2", config=WHISPER_LARGE_V2)},
        connector={"width": 1280, "window": 17, "queries": 1, "layers": 2, "hidden": 768, "heads": 12},
        backbone=Backbone(
            weights="meta-llama/Llama-2-7b-chat-hf", tokenizer="meta-llama/Llama-2-7b-chat-hf", config=LLAMA_2_7B_CHAT
        ),
        lora=LoRA(rank=8, alpha=32, dropout=0.1, targets=("q_proj", "v_proj")),
        recipe=Recipe(
            stages=[
                Stage(
                    name="instruction",
                    train=TRAINED,
                    tasks=INSTRUCTIONS,
                    phrasings=4,
                    optimiser=optimiser,
                    epochs=3,
                    batch_tokens=16_000,
                ),
                Stage(
                    name="in_context",
                    train=TRAINED,
                    tasks=IN_CONTEXT,
                    shots=1,
                    phrasings=4,
                    optimiser=optimiser,
                    batch_tokens=16_000,
                ),
            ],
            decoding=Decoding(beams=4, max_new_tokens=256, shots=1),
        ),
    )


def _small() -> Preset:
    return Preset(
        encoders={"speech": EncoderSpec(kind="moonshine", weights="earloom/moonshine-tiny-en")},
        connector={"width": 288, "window": 5, "queries": 1, "layers": 2, "hidden": 288, "heads": 8},
        backbone=Backbone(weights="earloom/smollm2-135m-instruct", tokenizer="earloom/smollm2-135m-instruct"),
        lora=LoRA(rank=8, alpha=32, targets=("q_proj", "v_proj")),
        recipe=Recipe(
            stages=[
                Stage(
                    name="instruction",
                    train=("connector",),
                    loss="ctc",
                    optimiser=Optimiser(lr=1e-3, warmup=0.1),
                    epochs=6,
                    batch_tokens=600,
                ),
                Stage(
                    name="in_context",
                    train=TRAINED,
                    tasks={"asr": 1.0, "biased_asr": 0.25},
                    shots=1,
                    optimiser=Optimiser(lr=1e-3, warmup=0.1),
                    batch_tokens=300,
                ),
            ],
            decoding=Decoding(max_new_tokens=64, shots=1),
        ),
    )


def _tiny() -> Preset:
    optimiser = Optimiser(lr=1e-3)
    return Preset(
        encoders={"speech": EncoderSpec(kind="whisper", config=WHISPER_TINY_RANDOM)},
        connector={"width": 24, "window": 9, "queries": 2, "layers": 2, "hidden": 32, "heads": 2},
        backbone=Backbone(config=TINY_LLAMA),
        lora=LoRA(rank=4, alpha=8),
        recipe=Recipe(
            stages=[
                Stage(
                    name="instruction",
                    train=TRAINED,
                    tasks=INSTRUCTIONS,
                    optimiser=optimiser,
                    max_steps=4,
                    batch_tokens=1024,
                ),
                Stage(
                    name="in_context",
                    train=TRAINED,
                    tasks=IN_CONTEXT,
                    shots=1,
                    phrasings=2,
                    optimiser=optimiser,
                    max_steps=4,
                    batch_tokens=1024,
                ),
            ],
            decoding=Decoding(max_new_tokens=4, shots=1),
        ),
    )
