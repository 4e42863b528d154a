"""Seed-ASR: a speech encoder trained for a frozen mixture-of-experts language model, with context in the prompt.

Bai et al., "Seed-ASR: Understanding Diverse Speech and Contexts with LLM-based Speech Recognition", arXiv 2407.04675
(2024). Official code: none; the system is closed. What follows was read in detailed notes on the paper.

Parts (`paper`, with stand-ins). Published: LUISE, a Conformer of about 2 B parameters with a frame every 40 ms; four
frames side by side through one Linear: 160 ms a token, 6.25 tokens/s; a mixture of experts of over ten billion. Here:
w2v-BERT 2.0 (Conformer, 24 layers, 20 ms), eight frames side by side, zeros behind a clip's end (16,779,264), and
Qwen1.5-MoE-A2.7B (14.3 B, 60 experts, 4 a token).

Sequence: instruction, context, audio, " {text}", EOS (BOS first where the tokenizer has one). Without context
"Transcribe the speech into text:", with it "There are relevant contexts, transcribe the speech into text: {words}\\n",
both as published but for the line break. Loss on the text and EOS only.

Recipe. The encoder comes from self-supervised training, which is outside of this recipe. 1 sft: encoder and converter
learn to transcribe, the language model is frozen. 2 context: the same, on triples of context, speech and text mixed
with plain clips. 3 rl: minimum word error rate on sampled answers, errors on words of the context count more, with
plain clips and triples in the mix (without triples the recall of context falls), and some cross entropy.

Deviations. Encoder and backbone are stand-ins. Learning rates, batches, steps, number of hypotheses, weight of the
cross entropy and of a context's words are not published: chosen. Which parts learn in stages 2 and 3 could not be read:
here the same as in stage 1. Hypotheses are sampled, not an N-best list of a beam. A context is a list of words, some of
them said, from the transcripts (`biased_asr`), not a text that a language model wrote. Requests in other words get the
published instruction. Decoding is beam search with the context in the prompt: the joint search with and without context
is left out, and so is the pruning that goes with it. `small` has Moonshine, four frames a token, a dense backbone, CTC
against the backbone's embeddings in stage 1, and ten steps of stage 3.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from models.connectors.stacking import StackMLP
from models.contract import SpeechLLM, SpeechLLMConfig
from models.encoders.base import EncoderSpec
from models.preset import Backbone, Preset, PresetName
from models.recipe import Decoding, ExpectedErrors, Optimiser, Recipe, Stage
from models.rendering import Audio, Message, Rendered, answer_text, user_text
from models.sizes import QWEN15_MOE_A27B, TINY_MOE, W2V_BERT_2, W2V_BERT_TINY_RANDOM

PLAIN = "Transcribe the speech into text:"
WITH_CONTEXT = "There are relevant contexts, transcribe the speech into text:"
LISTED = re.compile(r":\s*(\S.*?)\.(?=\s+[A-Z]|\s*$)")
TRAINED = ("encoder", "connector")


def context_of(request: str) -> str:
    """The words that a request lists: what stands between a colon and the end of its sentence; empty without any."""
    found = LISTED.search(request)
    return found[1] if found else ""


class SeedASRConfig(SpeechLLMConfig):
    model_type = "earloom_seed_asr"


class SeedASR(SpeechLLM):
    """Conformer, trained → frames side by side and one Linear → frozen mixture of experts."""

    config_class = SeedASRConfig
    title = "Seed-ASR"
    paper = (
        "Bai et al., Seed-ASR: Understanding Diverse Speech and Contexts with LLM-based Speech Recognition, "
        "arXiv 2407.04675 (2024)"
    )
    code = "none"
    summary = "the encoder learns to be read by a frozen language model; then context, then expected word errors"
    encoder_name = "w2v-BERT 2.0 (for LUISE), trained"
    connector_name = "stack to 160 ms + Linear"
    deviations: ClassVar[tuple[str, ...]] = (
        "w2v-BERT 2.0 and Qwen1.5-MoE-A2.7B stand in for the closed encoder and language model",
        "optimiser, steps, hypotheses and weights of stage 3 are chosen: none is published",
        "the self-supervised stage is not part of the recipe: a pretrained encoder is taken",
        "hypotheses are sampled; contexts are lists of words",
        "no joint beam search with and without context",
        "small: Moonshine, a dense backbone, CTC against the frozen token embeddings in stage 1, ten steps of stage 3",
    )

    @classmethod
    def preset(cls, name: PresetName) -> Preset:
        return {"paper": _paper, "small": _small, "tiny": _tiny}[name]()

    def build_connector(self, preset: Preset, llm_width: int) -> nn.Module:
        sizes = preset.connector
        return StackMLP(sizes["width"], sizes["stack"], None, llm_width, drop_remainder=False)

    def audio_tokens(self, frames: dict[str, int]) -> int:
        return self.connector.tokens(frames["speech"])  # type: ignore[operator, no-any-return]

    def connect(self, features: dict[str, Tensor], lengths: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self.connector(features["speech"], lengths["speech"])  # type: ignore[no-any-return]

    def render(self, tokenizer: PreTrainedTokenizerBase, messages: list[Message], clips: Sequence[Audio]) -> Rendered:
        rendered = Rendered()
        if tokenizer.bos_token_id is not None:
            rendered.tokens([tokenizer.bos_token_id])
        context = context_of(user_text(messages))
        rendered.text(tokenizer, f"{WITH_CONTEXT} {context}\n" if context else PLAIN)
        rendered.audio(self.audio_tokens(clips[0].frames), filler=tokenizer.eos_token_id)
        answer = answer_text(messages)
        if answer is None:
            return rendered
        return rendered.text(tokenizer, f" {answer}", learn=True).tokens([tokenizer.eos_token_id], learn=True)

    def keywords(self, prompt: str) -> set[str]:
        """The words of the context of a prompt."""
        context = prompt.partition(WITH_CONTEXT)[2].partition("\n")[0]
        return set(context.replace(",", " ").split())


def _stages(
    optimiser: Optimiser, encoder: Optimiser, reinforcement: Optimiser, epochs: float, batch_tokens: int
) -> list[Stage]:
    """The three stages; words for a context come from three other clips of the same data set."""
    learning = {"train": TRAINED, "batch_tokens": batch_tokens}
    supervised = {"optimiser": optimiser, "groups": {"encoder": encoder}, "epochs": epochs}
    return [
        Stage(name="sft", **learning, **supervised),
        Stage(name="context", tasks={"asr": 1.0, "biased_asr": 1.0}, shots=3, **learning, **supervised),
        Stage(
            name="rl",
            tasks={"asr": 1.0, "biased_asr": 1.0},
            shots=3,
            loss="mwer",
            mwer=ExpectedErrors(hypotheses=4, cross_entropy=0.01, keyword_weight=2.0),
            optimiser=reinforcement,
            **learning,
        ),
    ]


def _paper() -> Preset:
    return Preset(
        encoders={"speech": EncoderSpec(kind="w2vbert", weights="facebook/w2v-bert-2.0", config=W2V_BERT_2)},
        connector={"width": 1024, "stack": 8},
        backbone=Backbone(weights="Qwen/Qwen1.5-MoE-A2.7B", tokenizer="Qwen/Qwen1.5-MoE-A2.7B", config=QWEN15_MOE_A27B),
        recipe=Recipe(
            stages=_stages(
                Optimiser(lr=1e-4, warmup=2000),
                encoder=Optimiser(lr=2e-5, warmup=2000),
                reinforcement=Optimiser(lr=2e-6, schedule="constant"),
                epochs=1,
                batch_tokens=32_000,
            ),
            decoding=Decoding(beams=4, max_new_tokens=256),
        ),
    )


def _small() -> Preset:
    sft, context, rl = _stages(
        Optimiser(lr=1e-3, warmup=0.1),
        encoder=Optimiser(lr=1e-4, warmup=0.1),
        reinforcement=Optimiser(lr=2e-5, schedule="constant"),
        epochs=1,
        batch_tokens=300,
    )
    return Preset(
        encoders={"speech": EncoderSpec(kind="moonshine", weights="earloom/moonshine-tiny-en")},
        connector={"width": 288, "stack": 4},
        backbone=Backbone(weights="earloom/smollm2-135m-instruct", tokenizer="earloom/smollm2-135m-instruct"),
        recipe=Recipe(
            stages=[
                sft.model_copy(update={"loss": "ctc", "epochs": 2}),
                context.model_copy(update={"tasks": {"asr": 1.0, "biased_asr": 0.25}}),
                rl.model_copy(update={"max_steps": 6, "tasks": {"asr": 1.0, "biased_asr": 0.25}}),
            ],
            decoding=Decoding(max_new_tokens=64),
        ),
    )


def _tiny() -> Preset:
    optimiser = Optimiser(lr=1e-3)
    stages = _stages(optimiser, encoder=optimiser, reinforcement=optimiser, epochs=1, batch_tokens=1024)
    return Preset(
        encoders={"speech": EncoderSpec(kind="w2vbert", config=W2V_BERT_TINY_RANDOM)},
        connector={"width": 16, "stack": 8},
        backbone=Backbone(config=TINY_MOE),
        recipe=Recipe(
            stages=[stage.model_copy(update={"max_steps": 3}) for stage in stages],
            decoding=Decoding(max_new_tokens=4),
        ),
    )
