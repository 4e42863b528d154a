"""HuBERT and its relatives: raw waveform through convolutions and a transformer, 50 frames a second.

`WaveformTransformer` is what HuBERT, mHuBERT (Hsu et al., 2021, arXiv 2106.07447), WavLM and MERT share. Weights and
modules are transformers'; the blocks run here one by one, so that a kept layer is what its block gave, and so that
training meets neither SpecAugment nor dropped layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional
from transformers import HubertConfig, HubertModel, PreTrainedConfig, PreTrainedModel

from models.encoders.base import SAMPLE_RATE, EncoderSpec, LayeredEncoder, run_blocks
from models.encoders.frontend import normalise
from models.encoders.loading import check_layers, fill, load_weights, read_json
from models.pretrained import resolve, seeded

UNMASKED = {"mask_time_prob": 0.0, "mask_feature_prob": 0.0}  # no weight for what SpecAugment would hide
FOREIGN = ("model_type", "architectures", "auto_map", "transformers_version", "_name_or_path")
PREFIXES = ("hubert.", "wavlm.")
NORMED = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}


def stored(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a folder that a model has a place for, also where weight normalisation has its older names."""
    weights = load_weights(folder, PREFIXES)
    found: dict[str, Tensor] = {}
    for name in model.state_dict():
        older = name
        for new, old in NORMED.items():
            older = older.replace(new, old)
        for candidate in (name, older):
            if candidate in weights:
                found[name] = weights[candidate]
    return found


class WaveformTransformer(LayeredEncoder):
    """Base of the family. `spec.config` holds entries of the transformers config, and `do_normalize` (a clip to zero
    mean and unit variance; by default what `normalises` says).

    The first convolution of the base models normalises over time, so clips run one by one: alone = batched. Clips too
    short for one frame are padded with silence.
    """

    model_class: ClassVar[type[PreTrainedModel]] = HubertModel
    config_class: ClassVar[type[PreTrainedConfig]] = HubertConfig
    rate: ClassVar[int] = SAMPLE_RATE

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        folder = resolve(spec.weights) if spec.weights else None
        entries = (read_json(folder / "config.json") if folder else {}) | UNMASKED | spec.config
        features = read_json(folder / "preprocessor_config.json") if folder else {}
        self.spec = spec
        self.normalised = bool(entries.pop("do_normalize", self.normalises(features)))
        self.take(entries)
        config = self.config_class(**{name: value for name, value in entries.items() if name not in FOREIGN})
        check_layers(spec, config.num_hidden_layers)
        with seeded(spec.seed):
            self.model = self.model_class(config)
        if folder:
            fill(self.model, stored(folder, self.model), folder)
        self.width = spec.kept * config.hidden_size
        self.frame_rate = spec.pooled_rate(self.rate / self.stride)
        self.eval()

    def normalises(self, features: dict[str, Any]) -> bool:
        """Whether clips are normalised, from the entries of preprocessor_config.json ({} without a folder)."""
        return bool(features.get("do_normalize", False))

    def take(self, entries: dict[str, Any]) -> None:
        """Removes from the entries those that are the encoder's own, before they become a transformers config."""

    @property
    def stride(self) -> int:
        """Samples from one frame to the next."""
        return math.prod(self.model.config.conv_stride)

    def frames_of(self, samples: int) -> int:
        frames = max(self.heard(samples), self.shortest())
        for kernel, stride in zip(self.model.config.conv_kernel, self.model.config.conv_stride, strict=True):
            frames = (frames - kernel) // stride + 1
        return frames

    def heard(self, samples: int) -> int:
        """Samples at the model's own rate for a clip of `samples` at 16 kHz."""
        return samples

    def shortest(self) -> int:
        """Samples at the model's own rate that give one frame; shorter clips are zero-padded to it."""
        samples = 1
        for kernel, stride in zip(
            reversed(self.model.config.conv_kernel), reversed(self.model.config.conv_stride), strict=True
        ):
            samples = (samples - 1) * stride + kernel
        return samples

    def states(self, waveforms: Tensor, lengths: Tensor) -> Iterator[Tensor]:
        runs = [self.run(waveform[: int(n)]) for waveform, n in zip(waveforms, lengths, strict=True)]
        for rows in zip(*runs, strict=True):  # all clips go through a block before any goes through the next
            yield nn.utils.rnn.pad_sequence([row[0] for row in rows], batch_first=True)

    def run(self, clip: Tensor) -> Iterator[Tensor]:
        """The kept states of one clip, `(samples,)` → each `(1, frames, hidden width)`."""
        hidden = self.prepare(clip)[None, None].to(self.model.device)
        for convolution in self.model.feature_extractor.conv_layers:
            hidden = convolution(hidden)
        encoder = self.model.encoder
        state = self.project(hidden.transpose(1, 2))
        state = state + encoder.pos_conv_embed(state)
        first = not self.model.config.do_stable_layer_norm
        state = encoder.dropout(encoder.layer_norm(state) if first else state)
        last = None if first else encoder.layer_norm
        yield from run_blocks(self.spec, state, encoder.layers, self.step(state.shape[1]), last)

    def prepare(self, clip: Tensor) -> Tensor:
        """One clip as the first convolution takes it, `(samples,)`, at the model's own rate."""
        clip = normalise(clip) if self.normalised and len(clip) else clip
        return functional.pad(clip, (0, max(0, self.shortest() - len(clip))))

    def project(self, hidden: Tensor) -> Tensor:
        """Convolved frames, `(1, frames, channels)`, in the transformer's width."""
        return self.model.feature_projection(hidden)  # type: ignore[no-any-return]

    def step(self, frames: int) -> Callable[[nn.Module, Tensor], Tensor]:
        """How one block is applied to a clip of `frames`."""
        return lambda block, state: block(state)

    def preprocessing(self) -> dict[str, Any]:
        return {"input": "waveform", "sample_rate": self.rate, "normalised": self.normalised}


class HubertEncoder(WaveformTransformer):
    """transformers' HubertModel. fairseq's `output_layer=k` is `layer=k`: the state after the k-th block.

    Clips are not normalised, whatever the folder says: so the base models learnt in fairseq, and so units are cut.
    """

    def normalises(self, features: dict[str, Any]) -> bool:
        return False
