"""w2v-BERT 2.0 (arXiv 2312.05187, facebook/w2v-bert-2.0): a Conformer over stacked filter banks, 50 frames a second.

Layers and weights are transformers' Wav2Vec2BertModel; the front end is that of its SeamlessM4TFeatureExtractor: 80
Kaldi filter banks every 10 ms, each normalised over the clip, two neighbours side by side (160 values every 20 ms).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Wav2Vec2BertConfig, Wav2Vec2BertModel

from models.encoders.base import SAMPLE_RATE, EncoderSpec, LayeredEncoder, run_blocks
from models.encoders.frontend import FFT, HOP, kaldi_fbank, kaldi_frames
from models.encoders.loading import attention_bias, check_layers, fill, load_weights, read_json, valid_mask
from models.pretrained import resolve, seeded

STRIDE = 2
LOUDNESS = 2.0**15
SHORTEST = FFT + (STRIDE - 1) * HOP
PREFIXES = ("wav2vec2_bert.",)
UNMASKED = {"mask_time_prob": 0.0, "mask_feature_prob": 0.0}  # no weight for what SpecAugment would hide


class W2vBertEncoder(LayeredEncoder):
    """`spec.config` holds entries of Wav2Vec2BertConfig, without an adapter. Clips below 35 ms are padded with silence.

    An odd last filter-bank frame is left out, as the published front end does.
    """

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        folder = resolve(spec.weights) if spec.weights else None
        entries = (read_json(folder / "config.json") if folder else {}) | UNMASKED | spec.config
        config = Wav2Vec2BertConfig(**entries)
        if config.add_adapter or config.use_intermediate_ffn_before_adapter:
            raise ValueError("w2v-BERT with an adapter is not supported; leave add_adapter out")
        check_layers(spec, config.num_hidden_layers)
        self.spec = spec
        self.bins: int = config.feature_projection_input_dim // STRIDE
        self.width = spec.kept * config.hidden_size
        self.frame_rate = spec.pooled_rate(SAMPLE_RATE / HOP / STRIDE)
        with seeded(spec.seed):
            self.model = Wav2Vec2BertModel(config)
        if folder:
            weights = load_weights(folder, PREFIXES)
            fill(self.model, {name: weights[name] for name in self.model.state_dict() if name in weights}, folder)
        self.eval()

    def frames_of(self, samples: int) -> int:
        return kaldi_frames(max(samples, SHORTEST)) // STRIDE

    def states(self, waveforms: Tensor, lengths: Tensor) -> Iterator[Tensor]:
        device = self.device
        banks = [self.bank(row[: int(n)].to(device)) for row, n in zip(waveforms, lengths, strict=True)]
        counts = torch.tensor([len(bank) for bank in banks], device=device)
        state = self.model.feature_projection(nn.utils.rnn.pad_sequence(banks, batch_first=True))[0]
        valid = valid_mask(counts, state.shape[1])
        encoder = self.model.encoder
        state = encoder.dropout(state.masked_fill(~valid[..., None], 0.0))
        relative = None if encoder.embed_positions is None else encoder.embed_positions(state)
        given = {
            "attention_mask": attention_bias(valid),
            "conv_attention_mask": valid,
            "relative_position_embeddings": relative,
        }
        yield from run_blocks(self.spec, state, encoder.layers, lambda block, state: block(state, **given))

    def bank(self, clip: Tensor) -> Tensor:
        """One clip, `(samples,)` → `(frames, 160)`."""
        clip = functional.pad(clip, (0, max(0, SHORTEST - len(clip))))
        banks = kaldi_fbank(clip * LOUDNESS, self.bins)
        banks = (banks - banks.mean(dim=0)) / (banks.var(dim=0) + 1e-7).sqrt()
        return banks[: len(banks) // STRIDE * STRIDE].reshape(-1, STRIDE * self.bins)

    def preprocessing(self) -> dict[str, Any]:
        bank = {"bins": self.bins, "kind": "kaldi", "scale": LOUDNESS, "normalised": "each bin over the clip"}
        return super().preprocessing() | {"fbank": bank, "stacked": STRIDE}
