"""What every architecture promises: one class, `SpeechLLM`, whose subclasses are the systems of the list.

A speech LLM here is a set of encoders (frozen, their output cached), a connector, and a causal language model with
optional LoRA. A subclass says how audio becomes tokens (`connect`, `audio_tokens`), how a conversation becomes a
token sequence (`render`) and which presets there are. transformers' conventions hold: a config class,
`from_pretrained`, `save_pretrained`, `generate`, safetensors only.

Letters in shapes: clips, frames, width, rows, length (tokens of a row), vocabulary.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from models import attention
from models.alignment import connector_ctc
from models.batch import Batch
from models.encoders import build_encoder
from models.encoders.base import AudioEncoder
from models.preset import Preset, PresetName
from models.pretrained import load_llm
from models.recipe import Decoding
from models.rendering import IGNORED, Audio, Message, Rendered

WEIGHTS = "model.safetensors"


class SpeechLLMConfig(PreTrainedConfig):
    """Everything needed to rebuild the modules of an architecture before its weights are read."""

    model_type = "earloom"

    def __init__(
        self,
        architecture: str = "",
        preset: dict[str, Any] | None = None,
        llm: dict[str, Any] | None = None,
        codebook_width: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.architecture = architecture
        self.preset = preset or {}
        self.llm = llm or {}
        self.codebook_width = codebook_width


class SpeechLLM(PreTrainedModel):
    """Base of the architectures; a file of `models/architectures/` holds exactly one subclass.

    Class attributes: `title`, `paper` (citation), `code` (official repository or 'none'), `modalities`, `cached`
    (what a feature cache holds),
    `loss_on_prompt` (the paper's loss covers more than the answer), `deviations` (lines that
    the model card repeats).
    """

    config_class = SpeechLLMConfig
    base_model_prefix = ""
    title: ClassVar[str]
    paper: ClassVar[str]
    code: ClassVar[str]
    modalities: ClassVar[str] = "audio, text → text"
    cached: ClassVar[Literal["features", "units"]] = "features"
    loss_on_prompt: ClassVar[bool] = False
    deviations: ClassVar[tuple[str, ...]] = ()
    llm: PreTrainedModel
    connector: nn.Module
    encoders: nn.ModuleDict
    codebook: nn.Parameter | None

    # ---- what a subclass says ---------------------------------------------------------------------------------

    @classmethod
    def preset(cls, name: PresetName) -> Preset:
        raise NotImplementedError

    @classmethod
    def added_tokens(cls, preset: Preset) -> list[str]:
        """Tokens appended to the backbone's vocabulary, in order."""
        return []

    def build_connector(self, preset: Preset, llm_width: int) -> nn.Module:
        raise NotImplementedError

    def audio_tokens(self, frames: dict[str, int]) -> int:
        """How many positions a clip takes in the sequence, from its frames per encoder role."""
        raise NotImplementedError

    def connect(self, features: dict[str, Tensor], lengths: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Encoder frames, each `(clips, frames, width)` → `(clips, tokens, llm width)` and `(clips,)` valid tokens."""
        raise NotImplementedError

    def render(self, tokenizer: PreTrainedTokenizerBase, messages: list[Message], audio: Audio) -> Rendered:
        """The token sequence of a conversation; without an assistant turn at the end: the prompt to answer."""
        raise NotImplementedError

    # ---- building -----------------------------------------------------------------------------------------------

    def __init__(self, config: SpeechLLMConfig, encoders: bool = True, llm: PreTrainedModel | None = None) -> None:
        """A model of this shape with random weights, around `llm` where one is given."""
        super().__init__(config)
        preset = Preset.model_validate(config.preset)
        self.llm = llm if llm is not None else _random_llm(config.llm)
        self.connector = self.build_connector(preset, self.llm.config.hidden_size)
        self.encoders = nn.ModuleDict(
            {r: build_encoder(s.model_copy(update={"weights": None})) for r, s in preset.encoders.items()}
            if encoders
            else {}
        )
        self.codebook = (
            nn.Parameter(torch.zeros(preset.units, config.codebook_width or 1), requires_grad=False)
            if preset.units
            else None
        )
        self._add_lora(preset)
        self.eval()

    @classmethod
    def build(
        cls, preset: Preset, tokenizer: PreTrainedTokenizerBase | None = None, encoders: bool = True, seed: int = 0
    ) -> Self:
        """A model with the preset's pretrained parts and fresh connectors, LoRA and new tokens.

        Without `encoders` only what training from a feature cache needs is made. The same arguments give the
        same weights. `tokenizer` must already hold `added_tokens`.
        """
        torch.manual_seed(seed)
        llm = load_llm(preset.backbone.weights, preset.backbone.config, preset.backbone.seed)
        if tokenizer is not None and len(tokenizer) > llm.config.vocab_size:
            llm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        parts = {role: build_encoder(spec) for role, spec in preset.encoders.items()}
        width = next(iter(parts.values())).width if preset.units else None
        config = cls.make_config(preset, llm.config, width)
        torch.manual_seed(seed)
        model = cls(config, encoders=False, llm=llm)
        if encoders:
            model.encoders = nn.ModuleDict(parts)
        model.eval()
        return model

    @classmethod
    def on_meta(cls, preset: Preset) -> Self:
        """The preset's shapes without memory or weights; sizes come from the preset alone."""
        bare = preset.without_weights()
        llm = dict(bare.backbone.config)
        config = AutoConfig.for_model(llm.pop("model_type"), **llm)
        config.vocab_size += len(cls.added_tokens(bare))
        with torch.device("meta"):
            width = next(build_encoder(spec).width for spec in bare.encoders.values()) if bare.units else None
            return cls(cls.make_config(bare, config, width))

    @classmethod
    def make_config(cls, preset: Preset, llm: PreTrainedConfig, codebook_width: int | None = None) -> SpeechLLMConfig:
        kept = {
            k: v
            for k, v in llm.to_diff_dict().items()
            if k not in ("quantization_config", "_name_or_path", "transformers_version")
        }
        kept["model_type"] = llm.model_type
        name = cls.__module__.rpartition(".")[2]
        return cls.config_class(
            architecture=name, preset=preset.model_dump(mode="json"), llm=kept, codebook_width=codebook_width
        )

    def _add_lora(self, preset: Preset) -> None:
        if preset.lora is None:
            return
        lora = preset.lora
        inject_adapter_in_model(
            LoraConfig(
                r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.targets)
            ),
            self.llm,
        )

    def scale_lora(self, factor: float) -> None:
        """Set the LoRA scale to `factor` x what it was trained with (SALMONN's test-time discount)."""
        for module in self.llm.modules():
            if isinstance(module, LoraLayer):
                module.set_scale("default", factor)

    # ---- what is trained ------------------------------------------------------------------------------------------

    def parameter_groups(self) -> dict[str, list[str]]:
        """Names of the parameters of each group that a freeze plan may name; every parameter is in one."""
        groups: dict[str, list[str]] = {
            "connector": [],
            "lora": [],
            "embeddings": [],
            "llm": [],
            "encoder": [],
            "codebook": [],
        }
        for name, _ in self.named_parameters():
            groups[_group_of(name)].append(name)
        return groups

    def freeze(self, train: tuple[str, ...]) -> list[str]:
        """Let exactly the named groups learn ('llm' includes the embeddings); returns the names that do.

        Raises ValueError for a group that the architecture does not have.
        """
        groups = self.parameter_groups()
        wanted = set(train) | ({"embeddings"} if "llm" in train else set())
        for group in wanted:
            if not groups.get(group) or group == "codebook":
                there = ", ".join(name for name, members in groups.items() if members and name != "codebook")
                raise ValueError(f"{type(self).__name__} has no parameters in group {group!r}; it has: {there}")
        learning = {name for group in wanted for name in groups[group]}
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in learning)
        return [name for name, _ in self.named_parameters() if name in learning]

    # ---- audio ------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def listen(self, waveforms: list[Tensor]) -> list[Audio]:
        """Run the encoders on clips at 16 kHz, each `(samples,)`: what a cache holds and `render` takes."""
        features = {
            role: [frames.bfloat16().float() for frames in encoder(waveforms)]
            for role, encoder in self.encoders.items()
        }
        if self.codebook is None:
            return [Audio({role: frames[i] for role, frames in features.items()}) for i in range(len(waveforms))]
        book = self.codebook
        assign = [(book.square().sum(1) - 2 * frames @ book.T).argmin(1) for frames in next(iter(features.values()))]
        return [Audio(units=units) for units in assign]

    def embed(self, batch: Batch) -> Tensor:
        """Token embeddings with the connector's output at the audio positions, `(rows, length, width)`."""
        embedded: Tensor = self.llm.get_input_embeddings()(batch.ids)
        if not batch.features:
            return embedded
        tokens, counts = self.connect(self._features(batch), batch.lengths)
        valid = torch.arange(tokens.shape[1], device=tokens.device)[None] < counts[:, None]
        if int(counts.sum()) != len(batch.audio_rows):
            raise ValueError(
                f"the connector made {int(counts.sum())} tokens for {len(batch.audio_rows)} audio positions"
            )
        return embedded.index_put((batch.audio_rows, batch.audio_columns), tokens[valid].to(embedded.dtype))

    def forward(self, batch: Batch, vocabulary: Tensor | None = None, blank: int = 0) -> tuple[Tensor, Tensor]:
        """Summed loss over the labels of a batch, and their number.

        Cross entropy of the next token, with logits only where labels are; with a `vocabulary` of sorted ids: CTC of
        the connector's output against those rows of the embedding table, without a pass through the backbone.
        """
        if vocabulary is not None:
            tokens, counts = self.connect(self._features(batch), batch.lengths)
            labels = [row[(row != IGNORED) & (row != blank)] for row in batch.label_sequences()]
            table = self.llm.get_input_embeddings().weight
            return connector_ctc(tokens, counts, labels, table, vocabulary, blank), torch.tensor(sum(map(len, labels)))
        targets = batch.targets()
        at = targets != IGNORED
        logits = self.llm.get_output_embeddings()(self.hidden(batch)[at])
        return nn.functional.cross_entropy(logits.float(), targets[at], reduction="sum"), at.sum()

    def hidden(self, batch: Batch) -> Tensor:
        """Last hidden states of the backbone, `(rows, length, width)`."""
        embedded = self.embed(batch)
        if batch.packed and self.llm.config._attn_implementation == attention.NAME:
            attending = attention.packed_arguments(batch.segments)
        else:
            attending = {"attention_mask": batch.attention_mask(embedded.dtype)}
        return self.llm.get_decoder()(  # type: ignore[no-any-return]
            inputs_embeds=embedded, position_ids=batch.positions, use_cache=False, **attending
        ).last_hidden_state

    def _features(self, batch: Batch) -> dict[str, Tensor]:
        """Features in the precision of the connector: a cache holds bfloat16."""
        dtype = next((p.dtype for p in self.connector.parameters()), torch.float32)
        return {role: frames.to(dtype) for role, frames in batch.features.items()}

    @torch.inference_mode()
    def generate(
        self, batch: Batch, decoding: Decoding, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
    ) -> list[list[int]]:
        """Continue left-padded prompts; new token ids per row, up to and without the end token."""
        end = self.end_tokens(tokenizer)
        sampling = (
            {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": decoding.top_k}
            if decoding.sample
            else {}
        )
        ids = self.llm.generate(
            inputs_embeds=self.embed(batch),
            attention_mask=(batch.segments > 0).long(),
            max_new_tokens=max_new_tokens,
            num_beams=decoding.beams,
            do_sample=decoding.sample,
            eos_token_id=end,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end[0],
            **sampling,
        )
        return [_until(row, end) for row in ids.tolist()]

    def end_tokens(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        return [tokenizer.eos_token_id]

    def read_answer(self, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
        """Text of generated ids."""
        return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()

    # ---- files ------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:  # type: ignore[override]
        """Write config.json and model.safetensors (all parts, tied weights once)."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(folder)
        state = {name: value.contiguous() for name, value in self.state_dict().items() if name not in self._tied()}
        save_file(state, Path(folder) / WEIGHTS, metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, folder: str | Path, *_: Any, **kwargs: Any) -> Self:  # type: ignore[override]
        """Rebuild a model from a folder that `save_pretrained` wrote; every weight must be there and fit.

        Raises RuntimeError with the missing and unexpected names otherwise.
        """
        model = cls(cls.config_class.from_pretrained(folder))
        state = load_file(Path(folder) / WEIGHTS)
        missing, unexpected = model.load_state_dict(state, strict=False)
        missing = [name for name in missing if name not in model._tied()]
        if missing or unexpected:
            raise RuntimeError(
                f"{folder}/{WEIGHTS} does not fit {cls.__name__}: missing {missing[:5]}, unexpected {unexpected[:5]}"
            )
        model.eval()
        return model

    def _tied(self) -> set[str]:
        return {"llm.lm_head.weight"} if self.llm.config.tie_word_embeddings else set()

    def encoder(self, role: str) -> AudioEncoder:
        encoder = self.encoders[role]
        assert isinstance(encoder, AudioEncoder)
        return encoder


def _random_llm(config: dict[str, Any]) -> PreTrainedModel:
    kept = dict(config)
    built = AutoConfig.for_model(kept.pop("model_type"), **kept)
    return AutoModelForCausalLM.from_config(built, attn_implementation=attention.NAME)  # type: ignore[no-any-return]


def _group_of(name: str) -> str:
    if name.startswith("connector."):
        return "connector"
    if name.startswith("encoders."):
        return "encoder"
    if name == "codebook":
        return "codebook"
    if re.search(r"\.lora_", name):
        return "lora"
    return "embeddings" if "embed_tokens" in name or "lm_head" in name else "llm"


def _until(ids: list[int], end: list[int]) -> list[int]:
    return ids[: next((i for i, token in enumerate(ids) if token in end), len(ids))]
