"""WavLLM: two speech encoders, LoRA on every attention projection, and a gate that sets its strength by the request.

Hu et al., "WavLLM: Towards Robust and Adaptive Speech Large Language Model", Findings of EMNLP 2024, arXiv 2404.00656.
Official code: microsoft/SpeechT5, folder WavLLM (inference only).

Parts (`paper`). Whisper-large-v2 encoder for what is said and WavLM-base for who says it and how, both frozen, 50 Hz.
Of WavLM a learned softmax-weighted sum of all 13 hidden states. Each stream: two gated convolutions of stride 2
(1280→1280→1024, 768→512→1024), bottleneck adapter 1024→512→1024, Linear 1024→2048; trimmed to the shorter, side by side
through Linear 4096→4096: 12.5 tokens/s. LLaMA-2-7B-chat with LoRA r 32, alpha 32, dropout 0.1 on q, k, v and o.
Prompt-aware gate (8,397,825 parameters): the request in double quotes, without BOS, runs through the backbone without
LoRA; its last states before the final norm → Linear 4096→1024, GELU, Linear 1024→4096; a Linear 4096→1 of those says
how much each token counts; the weighted sum, through ReLU and at most 3, multiplies each channel of every LoRA output
and takes the place of alpha / r. Trainable: connector and LoRA 68,244,237, with a projection that no path uses
76,636,941 (published: 76.6 M); the gate comes on top.

Sequence: BOS, "[INST]<<SYS>>\\n{system}\\n<</SYS>>\\n\\n<SPEECH>", audio, " </SPEECH> {request} [/INST]", answer, EOS;
`<SPEECH>` is ordinary text. Loss on the answer and EOS only.

Recipe. 1 mixed: single tasks (recognition, translation, verification, emotion, spoken questions, instructions), plain
alpha / r. 2 advanced: combined tasks in many wordings, with the gate.

Deviations. Learning rates, batches and steps are not published: those here are chosen. Whether the connector learns in
stage 2 could not be read with certainty; here LoRA, gate and connector do. The gate is always there: it starts as
alpha / r in all channels (last Linear: zero weight, bias alpha / r), which is the same as no gate, and until it has
learnt something it is not run. Where a projection is narrower than the hidden states (grouped-query attention, not the
published backbone) neighbouring channels of the gate are averaged. Audio beyond 30 s is cut (officially: chunks of
30 s), and Whisper sees a clip without the silence up to 30 s. The projection without a path is left out. A request
without audio leaves the speech tags out (officially: padding between them). Tasks are those of the index; chains of
tasks come as `conversation`. The released weights are no longer at their address, so there is no importer. `small` has
Moonshine for both encoders (its last layer, and all its layers summed), learns the connector alone in stage 1, by CTC
against the backbone's embeddings, and LoRA in stage 2; it has no system block, which would be half of each sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from models.batch import Batch
from models.connectors.conv_bottleneck import ConvBottleneck, JoinedBranches
from models.connectors.prompt_gate import GatedLora, PromptGate, request_states
from models.contract import SpeechLLM, SpeechLLMConfig
from models.encoders.base import EncoderSpec
from models.preset import Backbone, LoRA, Preset, PresetName
from models.recipe import Decoding, Optimiser, Recipe, Stage
from models.rendering import Audio, Message, Rendered, answer_text, has_audio, user_text
from models.sizes import (
    LLAMA_2_7B_CHAT,
    TINY_LLAMA,
    WAVLM_BASE,
    WAVLM_TINY_RANDOM,
    WHISPER_LARGE_V2,
    WHISPER_TINY_RANDOM,
)

SYSTEM = (
    "As a helpful language and speech assistant, you are able to understand the speech content provided by the user, "
    "and assist the user with a variety of tasks using natural language."
)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
SINGLE_TASKS = {"asr": 1.0, "translation": 1.0, "labels": 1.0, "conversation": 1.0}


class WavLLMConfig(SpeechLLMConfig):
    model_type = "earloom_wavllm"


class WavLLM(SpeechLLM):
    """(Whisper ‖ WavLM) → convolutions and bottleneck adapters → causal LM with LoRA, gated by the request."""

    config_class = WavLLMConfig
    title = "WavLLM"
    paper = (
        "Hu et al., WavLLM: Towards Robust and Adaptive Speech Large Language Model, Findings of EMNLP 2024, "
        "arXiv 2404.00656"
    )
    code = "microsoft/SpeechT5, folder WavLLM (inference only)"
    summary = "Whisper for the words and WavLM for the voice; the request itself sets the strength of each LoRA channel"
    encoder_name = "Whisper-large-v2 and WavLM-base (13 layers), frozen"
    connector_name = "convolutions to 12.5 Hz + bottleneck adapters"
    deviations: ClassVar[tuple[str, ...]] = (
        "learning rates, batches and steps are chosen: none is published",
        "the gate starts as plain alpha / r and is not run before it has learnt something",
        "stage 2 trains the connector beside LoRA and gate",
        "audio beyond 30 s is cut; Whisper sees no silence behind a clip",
        "no importer: the released weights are no longer at their address",
        "small: Moonshine for both encoders; the connector learns by CTC against the frozen token embeddings first",
        "small: no system block",
    )
    gate: PromptGate

    @classmethod
    def preset(cls, name: PresetName) -> Preset:
        return {"paper": _paper, "small": _small, "tiny": _tiny}[name]()

    def build_connector(self, preset: Preset, llm_width: int) -> nn.Module:
        sizes = preset.connector
        system = sizes.get("system", SYSTEM)
        self.system_block = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
        shared = {name: sizes[name] for name in ("out", "channels", "bottleneck")}
        return JoinedBranches(
            ConvBottleneck(sizes["widths"][0], sizes["middles"][0], **shared),
            ConvBottleneck(sizes["widths"][1], sizes["middles"][1], layers=sizes["layers"], **shared),
            llm_width,
            audio_proj=sizes.get("audio_proj", False),
        )

    def audio_tokens(self, frames: dict[str, int]) -> int:
        return self.connector.tokens(frames["speech"], frames["voice"])  # type: ignore[operator, no-any-return]

    def connect(self, features: dict[str, Tensor], lengths: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self.connector(features["speech"], features["voice"], lengths["speech"], lengths["voice"])  # type: ignore[no-any-return]

    def render(self, tokenizer: PreTrainedTokenizerBase, messages: list[Message], clips: Sequence[Audio]) -> Rendered:
        request, spoken = user_text(messages), any(map(has_audio, messages))
        rendered = Rendered(instruction=tokenizer(f'"{request}"', add_special_tokens=False)["input_ids"])
        rendered.tokens([tokenizer.bos_token_id])
        rendered.text(tokenizer, f"[INST]{self.system_block}" + ("<SPEECH>" if spoken else ""))
        if spoken:
            rendered.audio(self.audio_tokens(clips[0].frames), filler=tokenizer.bos_token_id)
        rendered.text(tokenizer, (" </SPEECH> " if spoken else "") + f"{request} [/INST]")
        answer = answer_text(messages)
        if answer is None:
            return rendered
        return rendered.text(tokenizer, f" {answer}", learn=True).tokens([tokenizer.eos_token_id], learn=True)

    # ---- the gate -------------------------------------------------------------------------------------------------

    def build_parts(self, preset: Preset) -> None:
        assert preset.lora is not None, "the gate multiplies what LoRA adds: presets of WavLLM need lora"
        plain = preset.lora.alpha / preset.lora.rank
        self.gate = PromptGate(self.llm.config.hidden_size, preset.connector["gate"], plain)

    def _add_lora(self, preset: Preset) -> None:
        super()._add_lora(preset)
        assert preset.lora is not None
        self.gated = GatedLora(self.llm, preset.lora.alpha / preset.lora.rank)

    def prepare(self, batch: Batch, tokens: Tensor | None, counts: Tensor | None) -> None:
        self.gated.set(None)
        if batch.instructions is None or batch.instruction_lengths is None or not self.gate.counts:
            return
        with self.gated.without():
            states = request_states(self.llm, batch.instructions, batch.instruction_lengths)
        owners = batch.segments[0] - 1 if batch.packed else None
        self.gated.set(self.gate(states, batch.instruction_lengths), owners)


def _paper() -> Preset:
    optimiser = Optimiser(lr=1e-4, warmup=1000)
    return Preset(
        encoders={
            "speech": EncoderSpec(kind="whisper", weights="openai/whisper-large-v2", config=WHISPER_LARGE_V2),
            "voice": EncoderSpec(
                kind="wavlm", weights="microsoft/wavlm-base", config=WAVLM_BASE, layers=tuple(range(13))
            ),
        },
        connector={
            "widths": [1280, 768],
            "middles": [1280, 512],
            "layers": 13,
            "channels": 1024,
            "bottleneck": 512,
            "out": 2048,
            "gate": 1024,
        },
        backbone=Backbone(
            weights="meta-llama/Llama-2-7b-chat-hf", tokenizer="meta-llama/Llama-2-7b-chat-hf", config=LLAMA_2_7B_CHAT
        ),
        lora=LoRA(rank=32, alpha=32, dropout=0.1, targets=ATTENTION),
        recipe=Recipe(
            stages=[
                Stage(
                    name="mixed",
                    train=("connector", "lora"),
                    tasks=SINGLE_TASKS,
                    phrasings=4,
                    optimiser=optimiser,
                    batch_tokens=16_000,
                ),
                Stage(
                    name="advanced",
                    train=("connector", "lora", "gate"),
                    tasks=SINGLE_TASKS,
                    phrasings=4,
                    optimiser=optimiser,
                    batch_tokens=16_000,
                ),
            ],
            decoding=Decoding(sample=True, temperature=0.5, max_new_tokens=512),
        ),
    )


def _small() -> Preset:
    moonshine = "earloom/moonshine-tiny-en"
    return Preset(
        encoders={
            "speech": EncoderSpec(kind="moonshine", weights=moonshine),
            "voice": EncoderSpec(kind="moonshine", weights=moonshine, layers=tuple(range(7))),
        },
        connector={
            "widths": [288, 288],
            "middles": [288, 192],
            "layers": 7,
            "channels": 288,
            "bottleneck": 144,
            "out": 288,
            "gate": 144,
            "system": "",
        },
        backbone=Backbone(weights="earloom/smollm2-135m-instruct", tokenizer="earloom/smollm2-135m-instruct"),
        lora=LoRA(rank=16, alpha=16, targets=ATTENTION),
        recipe=Recipe(
            stages=[
                Stage(
                    name="mixed",
                    train=("connector",),
                    loss="ctc",
                    optimiser=Optimiser(lr=1e-3, warmup=0.1),
                    epochs=8,
                    batch_tokens=1200,
                ),
                Stage(
                    name="advanced",
                    train=("connector", "lora", "gate"),
                    tasks={"asr": 0.25, "labels": 0.75},
                    phrasings=2,
                    optimiser=Optimiser(lr=1e-3, warmup=0.1),
                    batch_tokens=200,
                ),
            ],
            decoding=Decoding(max_new_tokens=64),
        ),
    )


def _tiny() -> Preset:
    optimiser = Optimiser(lr=1e-3)
    return Preset(
        encoders={
            "speech": EncoderSpec(kind="whisper", config=WHISPER_TINY_RANDOM),
            "voice": EncoderSpec(kind="wavlm", config=WAVLM_TINY_RANDOM, layers=(0, 1, 2), seed=1),
        },
        connector={
            "widths": [24, 16],
            "middles": [24, 16],
            "layers": 3,
            "channels": 16,
            "bottleneck": 8,
            "out": 16,
            "gate": 8,
        },
        backbone=Backbone(config=TINY_LLAMA),
        lora=LoRA(rank=4, alpha=4, targets=ATTENTION),
        recipe=Recipe(
            stages=[
                Stage(
                    name="mixed",
                    train=("connector", "lora"),
                    tasks={"asr": 1.0, "labels": 1.0},
                    optimiser=optimiser,
                    max_steps=4,
                    batch_tokens=2048,
                ),
                Stage(
                    name="advanced",
                    train=("connector", "lora", "gate"),
                    tasks={"asr": 1.0, "conversation": 1.0},
                    phrasings=2,
                    optimiser=optimiser,
                    max_steps=4,
                    batch_tokens=2048,
                ),
            ],
            decoding=Decoding(max_new_tokens=4),
        ),
    )
