"""MU-LLaMA: a clip of music as one vector, added through gates to the attention of LLaMA's last layers.

Liu, Hussain, Sun, Shan, "Music Understanding LLaMA: Advancing Text-to-Music Generation with Question Answering and
Captioning", ICASSP 2024, arXiv 2308.11276. Official code: shansongliu/MU-LLaMA, GPL-3.0; only facts about it are used.

Parts (`paper`). MERT-v1-330M, frozen, 24 kHz, the first 60 s; all 25 hidden states, averaged over time. A weighted sum
of the states, L2 norm, Linear 1024→4096 and three SwiGLU blocks of hidden width 16384 give one vector. In each of the
last 20 of LLaMA-2-7B's 32 layers it is added to a learned query, passes the layer's value projection and a tanh gate
per head, closed at first, and is added to what the attention gives, before the output projection: as LLaMA-Adapter with
a prefix of one. The value projection is taken without its LoRA. Biases on q, o and the feed-forward, not on k and v.

Sequence: BOS, Alpaca's template with an input, answer, EOS; loss on the answer and EOS. No position is taken by audio.
Through a slip in the official code the input of every prompt is the text of Python's function `input`, in training as
in use; released weights know no other, so here it is the same.

Recipe: 1 pretrain: connector, queries and gates (608.3 M) on MusicCaps questions and Alpaca; 2 finetune: LLaMA's norms
and biases and LoRA r 16 without scaling on all seven projections (41.3 M) on questions about MagnaTagATune, connector
frozen. AdamW (0.9, 0.95), weight decay 0.05, cosine to 0; the learning rate is 1e-4 and 1e-3 times batch / 256, with
batches of 4 and 32: 1.6e-6 and 1.25e-4.

Deviations: samples without audio hear nothing, the official code a second of silence. Its 150 epochs of pre-training
are taken as 50ths of the data (`split_epoch 50`), three passes. Gradients are not clipped: nothing was found. Tokens a
batch are chosen from the number of samples. `small`: Whisper-tiny's five states in MERT's place, SmolLM2 in LLaMA's;
of the template the instruction alone, so that minutes suffice.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from models.batch import Batch
from models.checkpoints import Checkpoint, Renames
from models.connectors.zero_adapter import ZeroAdapter
from models.contract import SpeechLLM, SpeechLLMConfig
from models.encoders.base import EncoderSpec
from models.injection import Injection, layers_of, seen, without_lora
from models.preset import Backbone, LoRA, Preset, PresetName
from models.recipe import Decoding, Optimiser, Recipe, Stage
from models.rendering import Audio, Message, Rendered, answer_text, has_audio, user_text
from models.sizes import LLAMA_2_7B, MERT_330M, MERT_TINY_RANDOM, TINY_LLAMA

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BIASES = {"attention_bias": True, "mlp_bias": True}
UNBIASED = ("k_proj", "v_proj")
HEAD_WIDTH = 128  # of LLaMA
INPUT = "<built-in function input>"
PROMPT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


def meta_llama() -> Renames:
    """LLaMA's names in Meta's layout, with the LoRA that LLaMA-Adapter's code puts beside its matrices."""
    layer, ours = r"llama\.layers\.(\d+)\.", r"llm.model.layers.\1."
    parts = {f"attention.w{part}": f"self_attn.{part}_proj" for part in "qkvo"}
    parts |= {f"feed_forward.w{i}": f"mlp.{name}_proj" for i, name in ((1, "gate"), (2, "down"), (3, "up"))}
    renames: list[tuple[str, str]] = []
    for theirs, name in parts.items():
        block, matrix = theirs.split(".")
        renames += [
            (rf"{layer}{block}\.{matrix}\.", f"{ours}{name}."),
            (rf"{layer}{block}\.lora_{matrix}_l1\.", f"{ours}{name}.lora_A."),
            (rf"{layer}{block}\.lora_{matrix}_l2\.", f"{ours}{name}.lora_B."),
        ]
    norms = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    renames += [(rf"{layer}{theirs}\.", f"{ours}{name}.") for theirs, name in norms.items()]
    return (*renames, (r"llama\.norm\.", "llm.model.norm."))


def from_meta(name: str, tensor: Tensor) -> Tensor:
    """A gate as a row of heads; the outputs of q and k in transformers' order: Meta turns neighbouring pairs."""
    if "#" in name:
        return tensor.flatten()
    if re.search(r"\.[qk]_proj\.(weight|bias|lora_B\.weight)$", name):
        return tensor.unflatten(0, (-1, HEAD_WIDTH // 2, 2)).transpose(1, 2).flatten(0, 2)  # type: ignore[no-any-return]
    return tensor


class Heard(NamedTuple):
    """Vectors `(clips + 1, width)`, the first of them for no clip, and which one each token gets, `(rows, length)`."""

    vectors: Tensor
    owner: Tensor


class MuLlamaConfig(SpeechLLMConfig):
    model_type = "earloom_mu_llama"


class MuLlama(SpeechLLM):
    """Layers of a music encoder → one vector → gates in the attention of a causal LM."""

    config_class = MuLlamaConfig
    title = "MU-LLaMA"
    paper = "Liu et al., Music Understanding LLaMA, ICASSP 2024, arXiv 2308.11276"
    code = "shansongliu/MU-LLaMA (GPL-3.0)"
    summary = "a clip of music as one vector of MERT's 25 layers, added through gates in LLaMA's last 20 layers"
    encoder_name = "MERT-v1-330M, all layers, frozen"
    connector_name = "one vector, zero-initialised gates in 20 layers"
    spliced = False
    checkpoint = Checkpoint(
        file="checkpoint.pth (mu-llama/MU-LLaMA)",
        nested=("model",),
        renames=(
            (r"mu_mert_(agg|proj)\.", r"connector.\1."),
            *((rf"mu_mert_norm_{i + 1}\.", f"connector.blocks.{i}.norm.") for i in range(3)),
            *((rf"mu_mert_f{i + 1}_([123])\.", rf"connector.blocks.{i}.w\1.") for i in range(3)),
            (r"prefix_query\.", "connector.prefix_query."),
            (r"llama\.layers\.(\d+)\.attention\.gate$", r"connector.gate#\1"),
            *meta_llama(),
        ),
        transform=lambda name, tensor: from_meta(name, tensor),
        ignored=(r"llama\.rope\.freqs",),  # computed from the sizes
        expects=("connector", "norms", "biases", "lora"),  # LLaMA's own matrices are in a file of their own
    )
    deviations: ClassVar[tuple[str, ...]] = (
        "every prompt carries the input that a slip in the official code put there",
        "samples without audio hear nothing, where the official code plays silence",
        "small: Whisper-tiny's states in MERT's place, SmolLM2 in LLaMA's, the template without its preamble",
    )

    def __init__(self, config: SpeechLLMConfig, encoders: bool = True, llm: PreTrainedModel | None = None) -> None:
        super().__init__(config, encoders, llm)
        self.injection: Injection[Heard] = Injection(self.llm)
        for number, layer in enumerate(layers_of(self.llm)):
            attention = layer.self_attn
            assert isinstance(attention, nn.Module) and isinstance(attention.o_proj, nn.Module)
            if number >= self.adapter.first:
                self.injection.add(attention, attention.o_proj, partial(self._add_vector, number, attention))

    @classmethod
    def preset(cls, name: PresetName) -> Preset:
        return {"paper": _paper, "small": _small, "tiny": _tiny}[name]()

    def build_connector(self, preset: Preset, llm_width: int) -> nn.Module:
        config, sizes = self.llm.config, dict(preset.connector)
        self.template: str = sizes.pop("template", PROMPT)
        return ZeroAdapter(**sizes, out=llm_width, layers=config.num_hidden_layers, heads=config.num_attention_heads)

    def build_parts(self, preset: Preset) -> None:
        """No further modules; transformers' switch for attention biases gives them to k and v as well."""
        for layer in layers_of(self.llm):
            for name in UNBIASED:
                layer.get_submodule(f"self_attn.{name}").register_parameter("bias", None)

    @property
    def adapter(self) -> ZeroAdapter:
        assert isinstance(self.connector, ZeroAdapter)
        return self.connector

    def audio_tokens(self, frames: dict[str, int]) -> int:
        return 0

    def connect(self, features: dict[str, Tensor], lengths: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self.adapter(features["music"], lengths["music"])  # type: ignore[no-any-return]

    def prepare(self, batch: Batch, tokens: Tensor | None, counts: Tensor | None) -> None:
        if tokens is None:
            self.injection.state = None
            return
        clip_of = torch.zeros(batch.samples + 1, dtype=torch.long, device=tokens.device)
        clip_of[batch.clip_segments()] = torch.arange(1, len(tokens) + 1, device=tokens.device)
        self.injection.state = Heard(tokens[:, 0], clip_of[batch.segments])

    def _add_vector(self, number: int, attention: nn.Module, attended: Tensor, heard: Heard) -> Tensor:
        """`(rows, length, heads x head width)`: what each token attended to, and what the clip of its sample adds."""
        values = without_lora(attention.get_submodule("v_proj"))
        added = self.adapter.injection(number, heard.vectors, values)[:, 0].to(attended.dtype)
        added = torch.cat([torch.zeros_like(added[:1]), added])  # 0: a token of no clip
        return attended + added[seen(heard.owner, attended)]

    def render(self, tokenizer: PreTrainedTokenizerBase, messages: list[Message], clips: Sequence[Audio]) -> Rendered:
        rendered = Rendered()
        if any(map(has_audio, messages)):
            rendered.audio(0, filler=tokenizer.bos_token_id)
        prompt = self.template.format(instruction=user_text(messages), input=INPUT)
        rendered.tokens([tokenizer.bos_token_id]).text(tokenizer, prompt)
        answer = answer_text(messages)
        if answer is None:
            return rendered
        return rendered.text(tokenizer, answer, learn=True).tokens([tokenizer.eos_token_id], learn=True)


def _stages(pretrain: dict[str, Any], finetune: dict[str, Any], max_tokens: int = 2048) -> list[Stage]:
    shared: dict[str, Any] = {"tasks": {"conversation": 1.0, "caption": 1.0, "labels": 1.0}, "max_tokens": max_tokens}
    return [
        Stage(name="pretrain", train=("connector",), **shared | pretrain),
        Stage(name="finetune", train=("norms", "biases", "lora"), **shared | finetune),
    ]


def _adamw(lr: float, warmup: float) -> Optimiser:
    return Optimiser(lr=lr, betas=(0.9, 0.95), weight_decay=0.05, clip=0.0, warmup=warmup)


def _paper() -> Preset:
    heard = MERT_330M | {"longest_seconds": 60.0, "last_normalised": True}
    return Preset(
        encoders={
            "music": EncoderSpec(
                kind="mert", weights="m-a-p/MERT-v1-330M", config=heard, layers=tuple(range(25)), pool=0
            )
        },
        connector={"encoder_layers": 25, "width": 1024, "adapted": 20, "blocks": 3, "hidden": 16384},
        backbone=Backbone(
            weights="meta-llama/Llama-2-7b-hf", tokenizer="meta-llama/Llama-2-7b-hf", config=LLAMA_2_7B | BIASES
        ),
        lora=LoRA(rank=16, alpha=16, targets=PROJECTIONS),
        recipe=Recipe(
            stages=_stages(
                {"optimiser": _adamw(1e-4 * 4 / 256, 5 / 150), "epochs": 3, "batch_tokens": 4 * 128},
                {"optimiser": _adamw(1e-3 * 32 / 256, 1 / 20), "epochs": 20, "batch_tokens": 32 * 128},
                max_tokens=512,
            ),
            decoding=Decoding(sample=True, temperature=0.6, top_p=0.8, max_new_tokens=512),
        ),
    )


def _small() -> Preset:
    weights = "earloom/smollm2-135m-instruct"
    short: dict[str, Any] = {"tasks": {"labels": 1.0, "caption": 0.25, "conversation": 1.0}}
    short |= {"epochs": 8, "batch_tokens": 200}
    return Preset(
        encoders={
            "music": EncoderSpec(
                kind="whisper", weights="earloom/whisper-tiny-smart-turn", layers=tuple(range(5)), pool=0
            )
        },
        connector={"encoder_layers": 5, "width": 384, "adapted": 20, "blocks": 3, "template": "{instruction}\n"},
        backbone=Backbone(weights=weights, tokenizer=weights, config=BIASES),
        lora=LoRA(rank=16, alpha=16, targets=PROJECTIONS),
        recipe=Recipe(
            stages=_stages(
                {"optimiser": _adamw(1.5e-3, 0.1), "max_steps": 150, **short},
                {"optimiser": _adamw(1e-3, 0.1), "max_steps": 170, **short},
            ),
            decoding=Decoding(max_new_tokens=64),
        ),
    )


def _tiny() -> Preset:
    return Preset(
        encoders={"music": EncoderSpec(kind="mert", config=MERT_TINY_RANDOM, layers=(0, 1, 2), pool=0)},
        connector={"encoder_layers": 3, "width": 24, "adapted": 1, "blocks": 1, "hidden": 48},
        backbone=Backbone(config=TINY_LLAMA | BIASES),
        lora=LoRA(rank=4, alpha=4, targets=PROJECTIONS),
        recipe=Recipe(
            stages=_stages(
                {"optimiser": Optimiser(lr=1e-3), "max_steps": 3, "batch_tokens": 1024},
                {"optimiser": Optimiser(lr=1e-3), "max_steps": 3, "batch_tokens": 1024},
            ),
            decoding=Decoding(max_new_tokens=4),
        ),
    )
