"""What every architecture promises: one class, `SpeechLLM`, whose subclasses are the systems of the list.

A speech LLM here is a set of encoders (frozen and their output cached, or trained from waveforms), a connector, and a
language model with optional LoRA. A subclass says how audio becomes tokens (`connect`, `audio_tokens`), how a
conversation becomes a token sequence (`render`) and which presets there are. transformers' conventions hold: a config
class, `from_pretrained`, `save_pretrained`, `generate`, safetensors only.

Letters in shapes: clips, frames, width, rows, length (tokens of a row), vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from models import attention, encoder_decoder
from models.batch import Batch
from models.checkpoints import Checkpoint
from models.encoders import build_encoder
from models.encoders.base import AudioEncoder
from models.groups import grouped, names_of
from models.objectives import Objective, next_token
from models.preset import Preset, PresetName
from models.pretrained import load_llm, random_llm
from models.recipe import Decoding
from models.rendering import Audio, Message, Rendered

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

    Class attributes: `title`, `paper` (citation), `code` (official repository or 'none'), `modalities`; `summary`,
    `encoder_name`, `connector_name` (short texts for the table of systems); `deviations` (lines that the model card
    repeats); `checkpoint` (how the official one maps to this, if there is one); `cached` (what a feature cache holds);
    `loss_on_prompt` (the paper's loss covers more than the answer); `spliced` (audio takes positions of the sequence);
    `exact_tokens` (`audio_tokens` is what a clip takes, not the most that it can take); `several_clips` (a conversation
    may have several); `read_roles` (roles whose content, not length alone, decides a sequence).
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
    summary: ClassVar[str] = ""
    encoder_name: ClassVar[str] = ""
    connector_name: ClassVar[str] = ""
    checkpoint: ClassVar[Checkpoint | None] = None
    spliced: ClassVar[bool] = True
    exact_tokens: ClassVar[bool] = True
    several_clips: ClassVar[bool] = False
    read_roles: ClassVar[tuple[str, ...]] = ()
    llm: PreTrainedModel
    connector: nn.Module
    encoders: nn.ModuleDict
    codebook: nn.Parameter | None

    # ---- what a subclass says ---------------------------------------------------------------------------------

    @classmethod
    def preset(cls, name: PresetName) -> Preset:
        raise NotImplementedError

    @classmethod
    def mean_pool(cls, preset: Preset) -> int:
        """Over how many frames the connector takes the mean before all else: a cache may keep the means alone."""
        return 1

    @classmethod
    def added_tokens(cls, preset: Preset) -> list[str]:
        """Tokens appended to the backbone's vocabulary, in order."""
        return []

    def build_connector(self, preset: Preset, llm_width: int) -> nn.Module:
        raise NotImplementedError

    def build_parts(self, preset: Preset) -> None:
        """Set further modules as attributes; each is a parameter group called by its name."""

    def audio_tokens(self, frames: dict[str, int]) -> int:
        """How many positions a clip takes in the sequence, from its frames per encoder role."""
        raise NotImplementedError

    def connect(self, features: dict[str, Tensor], lengths: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Encoder frames, each `(clips, frames, width)` → `(clips, tokens, llm width)` and `(clips,)` valid tokens."""
        raise NotImplementedError

    def render(self, tokenizer: PreTrainedTokenizerBase, messages: list[Message], clips: Sequence[Audio]) -> Rendered:
        """The token sequence of a conversation; without an assistant turn at the end: the prompt to answer.

        `clips` are the recordings of its turns, in their order; an architecture without `several_clips` has one.
        """
        raise NotImplementedError

    def spell(self, features: dict[str, Tensor], lengths: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits of letters `(clips, frames, 257)` and valid frames `(clips,)`, for connectors that read them."""
        raise TypeError(f"{type(self).__name__} reads no letters: its stages cannot have the loss 'letters'")

    def keywords(self, prompt: str) -> set[str]:
        """Words of a prompt on which errors count more in training on expected word errors."""
        return set()

    def prepare(self, batch: Batch, tokens: Tensor | None, counts: Tensor | None) -> None:
        """Called with what `connect` made of a batch (None: it has no audio) before the backbone runs over it."""

    # ---- building -----------------------------------------------------------------------------------------------

    def __init__(self, config: SpeechLLMConfig, encoders: bool = True, llm: PreTrainedModel | None = None) -> None:
        """A model of this shape with random weights, around `llm` where one is given."""
        super().__init__(config)
        preset = Preset.model_validate(config.preset)
        self.llm = llm if llm is not None else random_llm(config.llm)
        self.connector = self.build_connector(preset, self.llm.config.hidden_size)
        self.build_parts(preset)
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
        return grouped(name for name, _ in self.named_parameters())

    def trained_by(self, train: tuple[str, ...]) -> list[str]:
        """Names of the parameters that a freeze plan lets learn. ValueError for a group that is not there."""
        try:
            learning = names_of(self.parameter_groups(), train)
        except ValueError as error:
            raise ValueError(f"{type(self).__name__} has {error}") from None
        return [name for name, _ in self.named_parameters() if name in learning]

    def freeze(self, train: tuple[str, ...]) -> list[str]:
        """Let exactly the named groups learn ('llm' includes the embeddings); returns the names that do.

        Raises ValueError for a group that the architecture does not have.
        """
        learning = set(named := self.trained_by(train))
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in learning)
        return named

    def train(self, mode: bool = True) -> Self:
        """As torch's, but pretrained parts that do not learn stay in eval mode: no dropout in what is frozen.

        Save for a backbone whose activations are recomputed, which transformers does in training mode alone.
        """
        super().train(mode)
        for part in (self.llm, *self.encoders.values()):
            learns = any(p.requires_grad for p in part.parameters())
            part.train(mode and (learns or getattr(part, "is_gradient_checkpointing", False)))
        return self

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

    def sound(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Frames `(clips, frames, width)` and lengths `(clips,)` per role, in the connector's precision.

        From the batch's features (a cache holds bfloat16), or by the encoders where it has waveforms.
        """
        dtype = next((p.dtype for p in self.connector.parameters()), torch.float32)
        if not batch.waveforms:
            return {role: frames.to(dtype) for role, frames in batch.features.items()}, batch.lengths
        heard = {role: encoder(batch.waveforms) for role, encoder in self.encoders.items()}
        device = batch.ids.device
        lengths = {role: torch.tensor([len(clip) for clip in clips], device=device) for role, clips in heard.items()}
        return {r: nn.utils.rnn.pad_sequence(c, batch_first=True).to(dtype) for r, c in heard.items()}, lengths

    def embed(self, batch: Batch) -> tuple[Tensor, Batch]:
        """Token embeddings with the connector's output at the audio positions, `(rows, length, width)`.

        Returns the batch too: without the positions that the connector left empty (see `exact_tokens`).
        """
        if not len(batch.clip_rows):
            self.prepare(batch, None, None)
            return self.llm.get_input_embeddings()(batch.ids), batch
        tokens, counts = self.connect(*self.sound(batch))
        if self.spliced:
            surplus = batch.surplus(counts)
            batch = batch.without(surplus) if bool(surplus.any()) else batch
        self.prepare(batch, tokens, counts)
        embedded: Tensor = self.llm.get_input_embeddings()(batch.ids)
        if not self.spliced:
            return embedded, batch
        valid = torch.arange(tokens.shape[1], device=tokens.device)[None] < counts[:, None]
        return embedded.index_put((batch.audio_rows, batch.audio_columns), tokens[valid].to(embedded.dtype)), batch

    def forward(self, batch: Batch, objective: Objective = next_token) -> tuple[Tensor, Tensor]:
        """Summed loss over the labels of a batch, and their number."""
        return objective(self, batch)

    def run(self, batch: Batch) -> tuple[Tensor, Batch]:
        """Last hidden states of the backbone, `(rows, length, width)`, and the batch that they belong to."""
        embedded, batch = self.embed(batch)
        if self.llm.config.is_encoder_decoder:
            return encoder_decoder.hidden_states(self.llm, embedded, batch), batch
        if batch.packed and self.llm.config._attn_implementation == attention.NAME:
            attending = attention.packed_arguments(batch.segments)
        else:
            attending = {"attention_mask": batch.attention_mask(embedded.dtype)}
        states: Tensor = self.llm.get_decoder()(
            inputs_embeds=embedded, position_ids=batch.positions, use_cache=False, **attending
        ).last_hidden_state
        return states, batch

    def hidden(self, batch: Batch) -> Tensor:
        """The states of `run` alone."""
        return self.run(batch)[0]

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
        embedded, batch = self.embed(batch)
        ids = self.llm.generate(
            inputs_embeds=embedded,
            attention_mask=(batch.segments > 0).long(),
            max_new_tokens=max_new_tokens,
            num_beams=decoding.beams,
            do_sample=decoding.sample,
            eos_token_id=end,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end[0],
            **sampling,
        )
        first = 1 if self.llm.config.is_encoder_decoder else 0  # its answers begin with the decoder's start token
        return [_until(row[first:], end) for row in ids.tolist()]

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
        tied = self._tied()
        state = {name: value.contiguous() for name, value in self.state_dict().items() if name not in tied}
        save_file(state, Path(folder) / WEIGHTS, metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, folder: str | Path, *_: Any, **kwargs: Any) -> Self:  # type: ignore[override]
        """Rebuild a model from a folder that `save_pretrained` wrote; every weight must be there and fit.

        Raises RuntimeError with the missing and unexpected names otherwise.
        """
        model = cls(cls.config_class.from_pretrained(folder))
        state = load_file(Path(folder) / WEIGHTS)
        missing, unexpected = model.load_state_dict(state, strict=False)
        missing = sorted(set(missing) - model._tied())
        if missing or unexpected:
            raise RuntimeError(
                f"{folder}/{WEIGHTS} does not fit {cls.__name__}: missing {missing[:5]}, unexpected {unexpected[:5]}"
            )
        model.eval()
        return model

    def _tied(self) -> set[str]:
        """Second names of parameters that have two."""
        every = {name for name, _ in self.named_parameters(remove_duplicate=False)}
        return every - {name for name, _ in self.named_parameters()}

    def encoder(self, role: str) -> AudioEncoder:
        encoder = self.encoders[role]
        assert isinstance(encoder, AudioEncoder)
        return encoder


def _until(ids: list[int], end: list[int]) -> list[int]:
    return ids[: next((i for i, token in enumerate(ids) if token in end), len(ids))]
