"""LTU: sound events and scenes through CAV-MAE, 32 audio tokens in front of everything, and a LoRA-tuned Vicuna.

Gong et al., "Listen, Think, and Understand", ICLR 2024, arXiv 2305.10790. Official code: YuanGongND/ltu, folder
`src/ltu` (finetune.py, train_script/, the vendored modeling_llama.py).

Parts (`paper`). The audio branch of CAV-MAE, a ViT-B tuned on AudioSet-2M, 85.7 M: 10.24 s give 8 frequency rows of 64
time steps, 768-d, row after row. Mean over the rows, mean over two time steps, division by 50, LayerNorm that learns
nothing, Linear 768→4096: 32 tokens. Vicuna-7B on LLaMA 1 with LoRA r 8, alpha 16, dropout 0.05 on q_proj and v_proj
(the paper's text says key and query; the code counts). Trained from stage 2 on: 93,065,216 of 6,831,480,832.

Sequence: audio, BOS, "### Instruction:\\n{instruction}\\n\\n### Response:\\n", answer, EOS. No token marks the audio.
Loss on all of the text, prompt included; BOS is read, not predicted.

Recipe (all four stages: 256 samples, AdamW, 100 steps of warm-up, linear decay, gradients clipped at 1, next token):
1 projection alone, closed-ended classification and acoustic features, 1e-3, two epochs; 2 encoder, projection and LoRA
on the same, 1e-4, two epochs; 3 the same on all closed-ended questions, 1e-4, one; 4 closed and open-ended, 5.6 M
questions, 1e-4, one. OpenAQA: 845 k clips, 1.9 M closed, 3.8 M open questions written by GPT-3.5. Without the order of
stages the paper's average falls from 50.3 to 23.0.

Deviations: stages 1 to 3 hand on their last state, where the paper chose steps 9000, 9200 and 6000. Text above 108
tokens is left out, not cut. Prompt and answer are tokenised apart. A global batch is as many tokens as 256 samples of
the greatest length have. Decoding has no repetition penalty (1.1). Which Vicuna was not found; chosen: v1.1, whose
32,000 tokens give the printed total exactly. `small` has no CAV-MAE: Moonshine, pooled to 10 tokens a second of a
clip's own length, trained from stage 2 on. It learns to write down speech, its loss is on the answer alone, and stages
1 and 2 learn by CTC against the backbone's own token embeddings, without a pass through it; LoRA begins in stage 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from models.checkpoints import Checkpoint, peft_lora
from models.connectors.linear import LinearProjector
from models.contract import SpeechLLM, SpeechLLMConfig
from models.encoders.base import EncoderSpec
from models.preset import Backbone, LoRA, Preset, PresetName
from models.recipe import Decoding, Optimiser, Recipe, Stage
from models.rendering import Audio, Message, Rendered, answer_text, user_text
from models.sizes import CAVMAE_TINY, TINY_LLAMA, VICUNA_7B_V1

ALL = ("connector", "encoder", "lora")
CLOSED = {"labels": 1.0, "caption": 1.0}
DIVISOR = 50.0  # of the pooled frames before their LayerNorm, which then has the effective eps DIVISOR² x 1e-5
TEXT = 108  # tokens of a sample's text at most
SAMPLES = 256  # of a global batch


def alpaca(instruction: str, given: str = "") -> str:
    """The short Alpaca template up to the answer; `given` is its input block, left out when empty."""
    middle = f"### Input:\n{given}\n\n" if given else ""
    return f"### Instruction:\n{instruction}\n\n{middle}### Response:\n"


def over_frequency(frames: Tensor, rows: int) -> Tensor:
    """Mean over a grid that lies row after row, `(clips, rows x steps, width)` → `(clips, steps, width)`."""
    return frames.unflatten(1, (rows, -1)).mean(1)  # type: ignore[no-any-return]


class LTUConfig(SpeechLLMConfig):
    model_type = "earloom_ltu"


class LTU(SpeechLLM):
    """Audio encoder → mean over frequency → projector → causal LM with LoRA."""

    config_class = LTUConfig
    title = "LTU"
    paper = "Gong et al., Listen, Think, and Understand, ICLR 2024, arXiv 2305.10790"
    code = "YuanGongND/ltu: src/ltu"
    summary = "CAV-MAE's 512 patches as 32 tokens before Vicuna with LoRA; four stages from perceiving to understanding"
    encoder_name = "CAV-MAE audio branch, trained from stage 2"
    connector_name = "mean over frequency, pool 2, LayerNorm, Linear"
    checkpoint = Checkpoint(
        file="pytorch_model.bin of a stage: audio encoder, projection and LoRA, what finetune.py saves",
        renames=(
            (r"base_model\.model\.model\.audio_encoder\.", "encoders.audio.layers."),
            (r"base_model\.model\.model\.audio_proj\.1\.", "connector.proj."),  # .0 is the LayerNorm without parameters
            *peft_lora(),
        ),
        expects=ALL,
    )
    loss_on_prompt = True
    deviations: ClassVar[tuple[str, ...]] = (
        "each stage goes on from the last step of the one before",
        "samples with more than 108 tokens of text are left out; prompt and answer are tokenised apart",
        "no repetition penalty",
        "small: Moonshine in the place of CAV-MAE, ten tokens a second, tasks of speech, loss on answers alone",
        "small: stages 1 and 2 learn by CTC against the frozen token embeddings, LoRA begins in stage 3",
    )

    @classmethod
    def preset(cls, name: PresetName) -> Preset:
        return {"paper": _paper, "small": _small, "tiny": _tiny}[name]()

    def build_connector(self, preset: Preset, llm_width: int) -> nn.Module:
        sizes = preset.connector
        self.rows: int = sizes["rows"]
        self.learn_prompt: bool = sizes.get("learn_prompt", True)
        return LinearProjector(sizes["width"], llm_width, sizes["pool"], norm="plain", eps=DIVISOR**2 * 1e-5)

    def audio_tokens(self, frames: dict[str, int]) -> int:
        return self.connector.tokens(frames["audio"] // self.rows)  # type: ignore[operator, no-any-return]

    def connect(self, features: dict[str, Tensor], lengths: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        steps = over_frequency(features["audio"], self.rows)
        return self.connector(steps, lengths["audio"] // self.rows)  # type: ignore[no-any-return]

    def render(self, tokenizer: PreTrainedTokenizerBase, messages: list[Message], clips: Sequence[Audio]) -> Rendered:
        rendered = Rendered().audio(self.audio_tokens(clips[0].frames), filler=tokenizer.bos_token_id)
        rendered.tokens([tokenizer.bos_token_id])
        rendered.text(tokenizer, alpaca(user_text(messages), self.given(clips[0])), learn=self.learn_prompt)
        answer = answer_text(messages)
        if answer is None:
            return rendered
        return rendered.text(tokenizer, answer, learn=True).tokens([tokenizer.eos_token_id], learn=True)

    def given(self, clip: Audio) -> str:
        """What the template's input block says of a clip: nothing here, the transcript in LTU-AS."""
        return ""


def step(lr: float) -> Optimiser:
    """The trainer's settings, which all stages of LTU and LTU-AS share."""
    return Optimiser(lr=lr, warmup=100, schedule="linear")


def room(tokens: int, text: int = TEXT) -> dict[str, Any]:
    """Lengths of a stage whose clips take `tokens` positions."""
    return {"batch_tokens": SAMPLES * (text + tokens), "max_tokens": text + tokens}


def classification(train: tuple[str, ...], lr: float, tokens: int) -> list[Stage]:
    """The first two stages of LTU and LTU-AS: closed-ended classification by the projection, then by all of `train`."""
    shared: dict[str, Any] = {"tasks": {"labels": 1.0}, "phrasings": 4, "epochs": 2, **room(tokens)}
    return [
        Stage(name="proj_cla", train=("connector",), optimiser=step(1e-3), **shared),
        Stage(name="all_cla", train=train, optimiser=step(lr), **shared),
    ]


def _paper() -> Preset:
    return Preset(
        encoders={
            "audio": EncoderSpec(kind="cavmae", weights="as_46.6.pth")
        },  # of cav-mae: tuned on AudioSet-2M's audio
        connector={"width": 768, "rows": 8, "pool": 2},
        backbone=Backbone(weights="lmsys/vicuna-7b-v1.1", tokenizer="lmsys/vicuna-7b-v1.1", config=VICUNA_7B_V1),
        lora=LoRA(rank=8, alpha=16, dropout=0.05, targets=("q_proj", "v_proj")),
        recipe=Recipe(
            stages=[
                *classification(ALL, 1e-4, tokens=32),
                Stage(name="all_close", train=ALL, tasks=CLOSED, phrasings=4, optimiser=step(1e-4), **room(32)),
                Stage(
                    name="all_mix",
                    train=ALL,
                    tasks=CLOSED | {"conversation": 1.0},
                    phrasings=4,
                    optimiser=step(1e-4),
                    **room(32),
                ),
            ],
            decoding=Decoding(max_new_tokens=400, sample=True, temperature=0.1, top_p=0.95, top_k=500),
        ),
    )


def _small() -> Preset:
    encoder = {"encoder": Optimiser(lr=1e-4, warmup=0.1, schedule="linear")}
    fast = Optimiser(lr=2e-3, warmup=0.1, schedule="linear")
    tuning = Optimiser(lr=1e-3, warmup=0.1, schedule="linear")
    return Preset(
        encoders={"audio": EncoderSpec(kind="moonshine", weights="earloom/moonshine-tiny-en")},
        connector={"width": 288, "rows": 1, "pool": 4, "learn_prompt": False},
        backbone=Backbone(weights="earloom/smollm2-135m-instruct", tokenizer="earloom/smollm2-135m-instruct"),
        lora=LoRA(rank=8, alpha=16, targets=("q_proj", "v_proj")),
        recipe=Recipe(
            stages=[
                Stage(name="proj_cla", train=("connector",), loss="ctc", optimiser=fast, epochs=6, batch_tokens=600),
                Stage(
                    name="all_cla",
                    train=("connector", "encoder"),
                    loss="ctc",
                    optimiser=fast,
                    groups=encoder,
                    epochs=0.5,
                    batch_tokens=600,
                ),
                Stage(
                    name="all_close",
                    train=ALL,
                    tasks={"asr": 0.25, "labels": 1.0},
                    optimiser=tuning,
                    groups=encoder,
                    batch_tokens=200,
                ),
                Stage(
                    name="all_mix",
                    train=ALL,
                    tasks={"asr": 0.1, "labels": 0.75, "caption": 0.1},
                    optimiser=tuning,
                    groups=encoder,
                    batch_tokens=200,
                ),
            ],
            decoding=Decoding(max_new_tokens=64),
        ),
    )


def _tiny() -> Preset:
    shared: dict[str, Any] = {"optimiser": Optimiser(lr=1e-3), "max_steps": 3, "batch_tokens": 512}
    return Preset(
        encoders={"audio": EncoderSpec(kind="cavmae", config=CAVMAE_TINY)},
        connector={"width": 32, "rows": 2, "pool": 2},
        backbone=Backbone(config=TINY_LLAMA),
        lora=LoRA(rank=4, alpha=8),
        recipe=Recipe(
            stages=[
                Stage(name="proj_cla", train=("connector",), tasks={"labels": 1.0}, **shared),
                Stage(name="all_cla", train=ALL, tasks={"labels": 1.0}, **shared),
                Stage(name="all_close", train=ALL, tasks=CLOSED, **shared),
                Stage(name="all_mix", train=ALL, tasks=CLOSED | {"conversation": 1.0}, **shared),
            ],
            decoding=Decoding(max_new_tokens=4),
        ),
    )
