"""Audio Flamingo: windows of sound that every layer of a language model attends to, with examples in the prompt.

Kong, Goel, Badlani, Ping, Valle, Catanzaro, "Audio Flamingo: A Novel Audio Language Model with Few-Shot Learning and
Dialogue Abilities", ICML 2024, arXiv 2402.01831. Official code: NVIDIA/audio-flamingo, branch legacy_audio_flamingo_1.

Parts (`paper`). ClapCap 2023's HTSAT, frozen, on windows of 7 s, 1.75 s apart, at most 16: one vector of 1024 each. The
windows of all clips of a sample stand side by side, 16 places a clip and 8 clips; places without sound hold the vector
of silence. Three transformer layers (25,189,376 parameters) run over all 128. Before each of the 24 layers of
OPT-IML-MAX-1.3B a gated cross-attention (36,708,354 each), closed at first, attends to them: a token sees the clips
that came before it in its sample, text before the first clip sees that one, and nobody sees the silent places.

Sequence: two BOS (the tokenizer's and the template's), "<audio>", request, "\\nAnswer:", `<SEP>`, output,
`<|endofchunk|>`, EOS. With examples: "Here are similar examples. " and a chunk for each clip, one EOS at the end. A
dialogue about one clip: "The task is dialog. <audio>", then for each turn "user: …, \\nassistant: ", `<SEP>`, output,
`<|endofchunk|>`, EOS and a line break. Requests and outputs are in lower case, those of dialogues as they are. Loss on
every output, its `<|endofchunk|>` and EOS.

Recipe: 1 pretrain: transformer and cross-attention, learning rate 1e-4, batch 384; 2 sft: the language model as well,
2e-5, batch 128, with up to 8 clips a sample, examples by likeness; 3 chat: dialogues, the same. Constant rate after
1875 steps, weight decay 0.1, clip 1.0, one pass each; 512 text tokens at most.

Deviations: no "The task is …" before a single request, which does not name its task; nor before a dialogue of one turn,
which looks like one. In sft every sample has examples, officially most have none. Likeness is that of the encoder's own
vectors, not of LAION-CLAP. OPT's table keeps its spare rows. Tokens a batch are chosen from the number of samples.
`small`: windows of 3 s, each the mean of a layer of Whisper-tiny, one transformer layer, SmolLM2 with a cross-attention
in every fifth layer, whose gate starts half open, as it would not open in a few hundred steps; two examples, in use as
well (those nearest by likeness, as in the paper's few-shot results).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from models.batch import Batch
from models.checkpoints import CONSTANTS, Checkpoint
from models.connectors.gated_cross_attention import AudioTransformer, GatedCrossAttention
from models.contract import SpeechLLM, SpeechLLMConfig
from models.encoders import build_encoder
from models.encoders.base import AudioEncoder, EncoderSpec
from models.encoders.loading import valid_mask
from models.injection import Injection, layers_of, of_rows, seen
from models.preset import Backbone, Preset, PresetName
from models.recipe import Decoding, Optimiser, Recipe, Stage
from models.rendering import Audio, Message, Rendered, turns
from models.sizes import HTSAT_TINY_RANDOM, OPT_IML_MAX_1_3B, TINY_OPT

NEW = ["<audio>", "<|endofchunk|>", "<SEP>"]
EXAMPLES, DIALOGUE, BREAK = "Here are similar examples. ", "The task is dialog. ", "\n"
ROWS, SPARE = 50268, 4  # of the table in the official files, and how many more OPT has
QUIET = 8_000  # samples of silence that give any encoder a window


class Media(NamedTuple):
    """Windows of a row's clips, `(rows, media, width)`, and which of its tokens see them, `(rows, length, media)`."""

    vectors: Tensor
    visible: Tensor


class Listener(nn.Module):
    """The audio transformer, and the cross-attention before each of the backbone's layers that has one.

    A sample has places for `clips` clips of `windows` windows; those without sound hold the vector of `silence`.
    `opened` is what the gates of the cross-attention start with: 0 is closed.
    """

    silence: Tensor

    def __init__(
        self,
        depth: int,
        llm_width: int,
        width: int,
        windows: int,
        clips: int,
        layers: int,
        ffn: int,
        every: int = 1,
        opened: float = 0.0,
    ) -> None:
        super().__init__()
        self.windows, self.clips = windows, clips
        self.audio_transformer = AudioTransformer(width, layers=layers, ffn=ffn, positions=windows * clips)
        self.blocks = nn.ModuleDict(
            {str(n): GatedCrossAttention(llm_width, width, opened=opened) for n in range(depth) if (n + 1) % every == 0}
        )
        self.register_buffer("silence", torch.zeros(width))

    def forward(self, windows: Tensor, counts: Tensor, sample: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """`(clips, windows, width)` and how many count, `(clips,)`; each is clip number `place` of sample `sample`.

        Returns the vectors of those windows, `(heard, width)`, and the clip of each, `(heard,)`.
        """
        clip, window = valid_mask(counts, windows.shape[1]).nonzero().unbind(1)
        at = sample[clip], place[clip] * self.windows + window
        samples, places = int(sample.max()) + 1, self.windows * self.clips
        silent = self.silence.to(windows.dtype).expand(samples, places, -1)
        every = torch.full((samples,), places, device=windows.device)
        mixed, _ = self.audio_transformer(silent.index_put(at, windows[clip, window]), every)
        return mixed[at], clip


class AudioFlamingoConfig(SpeechLLMConfig):
    model_type = "earloom_audio_flamingo"


class AudioFlamingo(SpeechLLM):
    """Windows of an audio encoder → transformer → gated cross-attention before the layers of a causal LM."""

    config_class = AudioFlamingoConfig
    title = "Audio Flamingo"
    paper = "Kong et al., Audio Flamingo, ICML 2024, arXiv 2402.01831"
    code = "NVIDIA/audio-flamingo, branch legacy_audio_flamingo_1"
    summary = "each layer of OPT attends through a gate to windows of sound; examples and dialogues in the prompt"
    encoder_name = "ClapCap 2023's HTSAT, windows of 7 s, frozen"
    connector_name = "3-layer transformer, gated cross-attention in each layer"
    spliced = False
    several_clips = True
    checkpoint = Checkpoint(
        file="foundation.pt or chat.pt (nvidia/audio-flamingo)",
        nested=("model_state_dict",),
        renames=(
            (r"audio_transformer\.", "connector.audio_transformer."),
            (r"lang_encoder\.model\.decoder\.layers\.(\d+)\.gated_cross_attn_layer\.", r"connector.blocks.\1."),
            (r"lang_encoder\.model\.decoder\.layers\.(\d+)\.decoder_layer\.", r"llm.model.decoder.layers.\1."),
            (r"lang_encoder\.(?=model\.decoder\.(?:embed_|final_layer_norm)|lm_head\.)", "llm."),
        ),
        transform=lambda name, tensor: with_spare_rows(tensor),
        ignored=(
            *CONSTANTS,
            r"lang_encoder\.(?:old_decoder_blocks|gated_cross_attn_layers)\..*",  # the same tensors by other names
            r"clap\..*",  # frozen: the encoder has weights of its own
        ),
        expects=("connector", "llm"),
    )
    deviations: ClassVar[tuple[str, ...]] = (
        "no task description before a single request",
        "all samples of sft have examples, found by the encoder's own vectors",
        "small: Whisper-tiny in CLAP's place, SmolLM2 in OPT's, a cross-attention before every fifth layer, half open",
    )

    def __init__(self, config: SpeechLLMConfig, encoders: bool = True, llm: PreTrainedModel | None = None) -> None:
        super().__init__(config, encoders, llm)
        self.injection: Injection[Media] = Injection(self.llm)
        layers = layers_of(self.llm)
        for number, block in self.listener.blocks.items():
            layer = layers[int(number)]
            self.injection.add(layer, layer, partial(self._attend, block, layer))

    @classmethod
    def build(
        cls, preset: Preset, tokenizer: PreTrainedTokenizerBase | None = None, encoders: bool = True, seed: int = 0
    ) -> Self:
        """As the contract's; the vector of silence is the encoder's."""
        model = super().build(preset, tokenizer, encoders, seed)
        encoder = model.encoder("audio") if encoders else build_encoder(preset.encoders["audio"])
        model.listener.silence.copy_(silence_of(encoder))
        return model

    @classmethod
    def preset(cls, name: PresetName) -> Preset:
        return {"paper": _paper, "small": _small, "tiny": _tiny}[name]()

    @classmethod
    def added_tokens(cls, preset: Preset) -> list[str]:
        return NEW

    def build_connector(self, preset: Preset, llm_width: int) -> nn.Module:
        return Listener(self.llm.config.num_hidden_layers, llm_width, **preset.connector)

    @property
    def listener(self) -> Listener:
        assert isinstance(self.connector, Listener)
        return self.connector

    def audio_tokens(self, frames: dict[str, int]) -> int:
        return 0

    def connect(self, features: dict[str, Tensor], lengths: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The windows as they are: the transformer runs over all clips of a sample, which `prepare` knows."""
        return features["audio"], lengths["audio"]

    def prepare(self, batch: Batch, tokens: Tensor | None, counts: Tensor | None) -> None:
        self.injection.state = None
        if tokens is not None and counts is not None:
            self.injection.state = self.media(batch, tokens, counts)

    def media(self, batch: Batch, windows: Tensor, counts: Tensor) -> Media:
        """The clips of a batch as its rows see them."""
        owners = batch.clip_segments()
        first = nn.functional.pad(owners[1:] != owners[:-1], (1, 0), value=True)
        number = torch.arange(len(owners), device=owners.device)
        place = number - torch.where(first, number, 0).cummax(0).values
        heard, clip = self.listener(windows, counts, first.cumsum(0) - 1, place)
        # Side by side in each row; places without a window belong to sample -1, which has no tokens.
        row = batch.clip_rows[clip]
        sizes = torch.bincount(row, minlength=len(batch.ids))
        at = row, torch.arange(len(row), device=row.device) - (sizes.cumsum(0) - sizes)[row]
        vectors = heard.new_zeros(len(sizes), int(sizes.max()), heard.shape[1]).index_put(at, heard)
        sample = torch.full(vectors.shape[:2], -1, device=row.device).index_put(at, owners[clip])
        begin = torch.zeros_like(sample).index_put(at, torch.where(first, 0, batch.clip_columns)[clip])
        column = torch.arange(batch.ids.shape[1], device=row.device)
        same = batch.segments[:, :, None] == sample[:, None]
        return Media(vectors, same & (column[:, None] >= begin[:, None]))

    def _attend(self, block: nn.Module, layer: nn.Module, hidden: Tensor, media: Media) -> Tensor:
        """A layer's input with what its tokens hear; recomputed in the backward pass where the layer is."""
        vectors = of_rows(media.vectors, len(hidden)).to(hidden.dtype)
        given = hidden, vectors, seen(media.visible, hidden)
        if getattr(layer, "gradient_checkpointing", False) and layer.training:
            return layer._gradient_checkpointing_func(block, *given)  # type: ignore[operator, no-any-return]
        return block(*given)  # type: ignore[no-any-return]

    def render(self, tokenizer: PreTrainedTokenizerBase, messages: list[Message], clips: Sequence[Audio]) -> Rendered:
        """Raises ValueError for more clips than a sample has places for."""
        conversation = turns(messages)
        if sum(turn.clips for turn in conversation) > self.listener.clips:
            raise ValueError(f"{self.title} hears at most {self.listener.clips} clips in a prompt; use fewer shots")
        several = len(conversation) > 1
        dialogue = several and not conversation[-1].clips
        audio, end, separator = tokenizer.convert_tokens_to_ids(NEW)
        rendered = Rendered().tokens([tokenizer.bos_token_id] * 2)
        rendered.text(tokenizer, DIALOGUE if dialogue else EXAMPLES if several else "")
        for number, turn in enumerate(conversation):
            for _ in range(turn.clips):
                rendered.audio(0, filler=audio).tokens([audio])
            asked = f"{BREAK if number else ''}user: {turn.request} {BREAK}assistant: "
            rendered.text(tokenizer, asked if dialogue else f"{turn.request.lower().strip()}{BREAK}Answer:")
            rendered.tokens([separator])
            if turn.answer is not None:
                answer = turn.answer if dialogue else turn.answer.lower().strip()
                rendered.text(tokenizer, answer, learn=True).tokens([end], learn=True)
            if turn.answer is not None and (dialogue or turn is conversation[-1]):
                rendered.tokens([tokenizer.eos_token_id], learn=True)
        return rendered

    def end_tokens(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """EOS, and the end of a chunk, which comes before it."""
        return [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(NEW[1])]


@torch.inference_mode()
def silence_of(encoder: AudioEncoder) -> Tensor:
    """What an encoder makes of a window without sound, `(width,)`, as a feature cache holds it."""
    return encoder([torch.zeros(QUIET)])[0][0].bfloat16().float()  # type: ignore[no-any-return]


def with_spare_rows(table: Tensor) -> Tensor:
    """The official embedding table with the rows that OPT has to spare; no token uses them."""
    return nn.functional.pad(table, (0, 0, 0, SPARE)) if table.shape[:1] == (ROWS,) else table


def _stages(pretrain: Optimiser, tuning: Optimiser, tokens: tuple[int, int], shots: int, **shared: Any) -> list[Stage]:
    tasks = {"caption": 1.0, "labels": 1.0}
    tuned: dict[str, Any] = {"train": ("connector", "llm"), "optimiser": tuning, "batch_tokens": tokens[1]} | shared
    return [
        Stage(name="pretrain", train=("connector",), tasks=tasks, optimiser=pretrain, batch_tokens=tokens[0], **shared),
        Stage(name="sft", tasks=tasks, shots=shots, nearest=True, **tuned),
        Stage(name="chat", tasks={"conversation": 1.0}, **tuned),
    ]


def _paper() -> Preset:
    def constant(lr: float) -> Optimiser:
        return Optimiser(lr=lr, weight_decay=0.1, warmup=1875, schedule="constant")

    opt = "facebook/opt-iml-max-1.3b"
    cut = {"windows": 16, "peak_normalise": True}
    return Preset(
        encoders={"audio": EncoderSpec(kind="clap", weights="clapcap_weights_2023.pth", config=cut)},
        connector={"width": 1024, "windows": 16, "clips": 8, "layers": 3, "ffn": 2048},
        backbone=Backbone(weights=opt, tokenizer=opt, config=OPT_IML_MAX_1_3B),
        recipe=Recipe(
            stages=_stages(constant(1e-4), constant(2e-5), (384 * 64, 128 * 256), shots=7, max_tokens=512),
            decoding=Decoding(sample=True, top_k=30, top_p=0.95, max_new_tokens=128),
            seed=42,
        ),
    )


def _small() -> Preset:
    weights = "earloom/smollm2-135m-instruct"
    stages = _stages(Optimiser(lr=1e-3, warmup=0.1), Optimiser(lr=1e-4, warmup=0.1), (200, 400), shots=2)
    tasks = {"caption": 0.25, "labels": 1.0}
    changes: dict[str, dict[str, Any]] = {
        "pretrain": {"tasks": tasks, "max_steps": 60},
        "sft": {"tasks": tasks, "max_steps": 40},
        "chat": {"max_steps": 15},
    }
    return Preset(
        encoders={
            "audio": EncoderSpec(kind="whisper", weights="earloom/whisper-tiny-smart-turn", layers=(1,), pool=150)
        },
        connector={"width": 384, "windows": 4, "clips": 3, "layers": 1, "ffn": 768, "every": 5, "opened": 0.5},
        backbone=Backbone(weights=weights, tokenizer=weights),
        recipe=Recipe(
            stages=[stage.model_copy(update=changes[stage.name]) for stage in stages],
            decoding=Decoding(max_new_tokens=64, shots=2, nearest=True),
        ),
    )


def _tiny() -> Preset:
    step = Optimiser(lr=1e-3)
    return Preset(
        encoders={"audio": EncoderSpec(kind="clap", config=HTSAT_TINY_RANDOM | {"windows": 5})},
        connector={"width": 24, "windows": 5, "clips": 3, "layers": 1, "ffn": 32},
        backbone=Backbone(config=TINY_OPT),
        recipe=Recipe(
            stages=_stages(step, step, (512, 512), shots=2, max_steps=3), decoding=Decoding(max_new_tokens=4)
        ),
    )
