"""LLaSM: 64 states of Whisper's decoder, one Linear, and a chat model that answers spoken instructions.

Shu et al., "LLaSM: Large Language and Speech Model", arXiv 2308.15930 (2023). Official code: LinkSoul-AI/LLaSM
(llasm.py, infer_tokenize.py, infer.py), inference alone.

Parts (`paper`). The whole of Whisper-large-v2, frozen: its decoder is fed 64 copies of the start id, and its last
hidden states (1280 wide) are the audio, 64 tokens a clip whatever its length. Linear 1280→4096: 5,246,976.
Chinese-LLaMA-2-7B, whose vocabulary grows by `<au_patch>`, `<au_start>` and `<au_end>`; the new rows start as the mean
of the old ones.

Sequence: the system block "<<SYS>>\\n{system}\\n<</SYS>>\\n\\n", then for each turn BOS, "[INST] {request} [/INST] ",
answer and space, EOS. The first request has the system block before it once more: so the official tokenize_Cllama2 puts
it, and BOS stands behind the first of the two. A clip is `<au_start>`, 64 x `<au_patch>`, `<au_end>`; the connector's
output takes the places of the patches. Loss on the answers, each with its EOS.

Recipe: 1 adapt: recognition with a simple instruction, the Linear alone. 2 instruct: spoken conversations (508 k
samples), Linear and LLM. Decoding: sampling at temperature 0.2.

Deviations. The paper draws by chance whether an instruction stands before or behind the audio: here it stands before it
if its letters are an even number. What is between them is not published: a line break. Learning rates, batches and
epochs are not reported: those of LLaVA, whose layout the official code has. `<au_start>` and `<au_end>` learn in
stage 2 (the code has a switch that lets their embeddings learn in stage 1). Several clips in one conversation are not
taken: the official loop keeps the last of them only. `small`: Moonshine, whose decoder runs freely (its positions are
rotary, so copies of the start id would be one state over and over) and gives 24 states. So the LLM hears what Moonshine
took the words for: of the demo's synthetic speech it writes half of them down wrongly. No system block, which would be
two thirds of a sequence; stage 1 is CTC against the backbone's token embeddings; stage 2 learns recognition too, since
the demo corpus has no conversations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from models.checkpoints import Checkpoint, llama
from models.connectors.linear import LinearProjector
from models.contract import SpeechLLM, SpeechLLMConfig
from models.encoders.base import EncoderSpec
from models.preset import Backbone, Preset, PresetName
from models.recipe import Decoding, Optimiser, Recipe, Stage
from models.rendering import Audio, Message, Rendered, turns
from models.sizes import (
    LLAMA_2_7B,
    TINY_LLAMA,
    WHISPER_LARGE_V2,
    WHISPER_LARGE_V2_DECODER,
    WHISPER_WHOLE_TINY_RANDOM,
)

PATCH, START, END = "<au_patch>", "<au_start>", "<au_end>"
SYSTEM = (
    "You are a helpful language and speech assistant. You are able to understand the speech content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


class LlasmConfig(SpeechLLMConfig):
    model_type = "earloom_llasm"


class Llasm(SpeechLLM):
    """Whole recogniser → Linear → causal LM."""

    config_class = LlasmConfig
    title = "LLaSM"
    paper = "Shu et al., LLaSM: Large Language and Speech Model, arXiv 2308.15930 (2023)"
    code = "LinkSoul-AI/LLaSM"
    summary = "64 states of Whisper's decoder, fed nothing but its start id, go through one Linear into LLaMA-2"
    encoder_name = "Whisper-large-v2 with its decoder, frozen"
    connector_name = "Linear"
    checkpoint = Checkpoint(
        file="the folder LinkSoul/LLaSM-Cllama2",
        renames=((r"model\.mm_projector\.", "connector.proj."), *llama()),
        expects=("connector", "llm"),  # Whisper is not in it: the code keeps it in a plain list
    )
    deviations: ClassVar[tuple[str, ...]] = (
        "an instruction of an even number of letters stands before the audio, others behind it",
        "learning rates, batches and epochs are those of LLaVA: none are reported",
        "small: Moonshine with its decoder running freely, 24 states a clip; no system block",
        "small: the connector starts by CTC against the frozen token embeddings; recognition in both stages",
    )

    @classmethod
    def preset(cls, name: PresetName) -> Preset:
        return {"paper": _paper, "small": _small, "tiny": _tiny}[name]()

    @classmethod
    def added_tokens(cls, preset: Preset) -> list[str]:
        return [PATCH, START, END]

    @classmethod
    def build(
        cls, preset: Preset, tokenizer: PreTrainedTokenizerBase | None = None, encoders: bool = True, seed: int = 0
    ) -> Self:
        model = super().build(preset, tokenizer, encoders, seed)
        if tokenizer is not None:
            start_as_mean(model.llm, tokenizer.convert_tokens_to_ids(cls.added_tokens(preset)))
        return model

    def build_connector(self, preset: Preset, llm_width: int) -> nn.Module:
        system = preset.connector["system"]
        self.system_block = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
        return LinearProjector(preset.connector["width"], llm_width)

    def audio_tokens(self, frames: dict[str, int]) -> int:
        return self.connector.tokens(frames["speech"])  # type: ignore[operator, no-any-return]

    def connect(self, features: dict[str, Tensor], lengths: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self.connector(features["speech"], lengths["speech"])  # type: ignore[no-any-return]

    def render(self, tokenizer: PreTrainedTokenizerBase, messages: list[Message], clips: Sequence[Audio]) -> Rendered:
        rendered = Rendered().text(tokenizer, self.system_block)
        for number, turn in enumerate(turns(messages)):
            rendered.tokens([tokenizer.bos_token_id])
            opening = f"[INST] {self.system_block}" if number == 0 else "[INST] "
            if turn.clips and not rendered.clip_at:
                self._spoken(rendered, tokenizer, opening, turn.request, clips[0])
            else:
                rendered.text(tokenizer, f"{opening}{turn.request} [/INST] ")
            if turn.answer is not None:
                rendered.text(tokenizer, f"{turn.answer} ", learn=True).tokens([tokenizer.eos_token_id], learn=True)
        return rendered

    def _spoken(
        self, rendered: Rendered, tokenizer: PreTrainedTokenizerBase, opening: str, request: str, clip: Audio
    ) -> None:
        """A request with its clip, between the marks of an instruction."""
        patch, start, end = tokenizer.convert_tokens_to_ids([PATCH, START, END])
        leads = bool(request) and len(request) % 2 == 0
        rendered.text(tokenizer, f"{opening}{request}\n" if leads else opening).tokens([start])
        rendered.audio(self.audio_tokens(clip.frames), filler=patch).tokens([end])
        rendered.text(tokenizer, f"\n{request} [/INST] " if request and not leads else " [/INST] ")


@torch.no_grad()
def start_as_mean(llm: PreTrainedModel, ids: list[int]) -> None:
    """Give the embedding and the output row of each new token the mean of all others."""
    old = torch.ones(llm.get_input_embeddings().weight.shape[0], dtype=torch.bool)
    old[ids] = False
    for table in (llm.get_input_embeddings().weight, llm.get_output_embeddings().weight):
        table[ids] = table[old].mean(dim=0)


def _paper() -> Preset:
    return Preset(
        encoders={
            "speech": EncoderSpec(
                kind="decoder_states",
                weights="openai/whisper-large-v2",
                config=WHISPER_LARGE_V2 | WHISPER_LARGE_V2_DECODER | {"model": "whisper"},
            )
        },
        connector={"width": 1280, "system": SYSTEM},
        backbone=Backbone(
            weights="LinkSoul/Chinese-Llama-2-7b", tokenizer="LinkSoul/Chinese-Llama-2-7b", config=LLAMA_2_7B
        ),
        recipe=Recipe(
            stages=[
                Stage(
                    name="adapt",
                    train=("connector",),
                    phrasings=4,
                    optimiser=Optimiser(lr=2e-3, warmup=0.03),
                    batch_tokens=128 * 256,
                ),
                Stage(
                    name="instruct",
                    train=("connector", "llm"),
                    tasks={"conversation": 1.0},
                    optimiser=Optimiser(lr=2e-5, warmup=0.03),
                    epochs=3,
                    batch_tokens=32 * 512,
                ),
            ],
            decoding=Decoding(max_new_tokens=1024, sample=True, temperature=0.2),
        ),
    )


def _small() -> Preset:
    return Preset(
        encoders={
            "speech": EncoderSpec(
                kind="decoder_states",
                weights="earloom/moonshine-tiny-en",
                config={"model": "moonshine", "positions": 24},
            )
        },
        connector={"width": 288, "system": ""},
        backbone=Backbone(weights="earloom/smollm2-135m-instruct", tokenizer="earloom/smollm2-135m-instruct"),
        recipe=Recipe(
            stages=[
                Stage(
                    name="adapt",
                    train=("connector",),
                    loss="ctc",
                    optimiser=Optimiser(lr=2e-3, warmup=0.1),
                    epochs=20,
                    batch_tokens=600,
                ),
                Stage(
                    name="instruct",
                    train=("connector", "llm"),
                    tasks={"asr": 1.0, "conversation": 1.0},
                    optimiser=Optimiser(lr=3e-4, warmup=0.1),
                    batch_tokens=300,
                ),
            ],
            decoding=Decoding(max_new_tokens=64),
        ),
    )


def _tiny() -> Preset:
    shared = {"optimiser": Optimiser(lr=1e-3), "max_steps": 3, "batch_tokens": 1024}
    return Preset(
        encoders={"speech": EncoderSpec(kind="decoder_states", config=WHISPER_WHOLE_TINY_RANDOM | {"positions": 8})},
        connector={"width": 24, "system": "Listen."},
        backbone=Backbone(config=TINY_LLAMA),
        recipe=Recipe(
            stages=[
                Stage(name="adapt", train=("connector",), phrasings=4, **shared),
                Stage(name="instruct", train=("connector", "llm"), tasks={"conversation": 1.0}, **shared),
            ],
            decoding=Decoding(max_new_tokens=4),
        ),
    )
