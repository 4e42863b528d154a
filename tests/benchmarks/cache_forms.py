"""What smaller forms of a feature cache lose and take: `python -m tests.benchmarks.cache_forms`.

Real speech through Moonshine tiny; principal components are fitted on other speakers' clips than those that are judged.
Beside the error of the frames stands what it does downstream: Moonshine's own decoder, which never saw a stored frame,
writes a transcript from the frames that come out of each form. `words apart` is the word error rate against what it
writes from the live frames, `WER` that against the corpus' transcripts, of people. One row is of an encoder that
computes in bfloat16 (`compute`), its frames kept as they are.

Bytes are those of a cache (tar and safetensors headers included) for an hour of audio, beside FLAC's of the same clips.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "features"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jiwer
import soundfile as sf
import torch
from feature_helpers import make_shards
from torch import Tensor
from transformers import AutoTokenizer, MoonshineForConditionalGeneration
from transformers.models.moonshine.modeling_moonshine import MoonshineEncoderModelOutput

from components.audio.encode import to_flac
from components.evaluation.normalise import normalise
from components.features.compact import fidelity, pack, unpack
from components.features.extract import encode_clips, extract_shard
from components.features.form import Form
from components.features.principal import Moments, fit_components, gather_moments
from models.encoders import build_encoder
from models.encoders.base import AudioEncoder, EncoderSpec
from models.pretrained import resolve
from tests.benchmarks.measuring import machine

DATA = Path(__file__).parents[3] / "shared" / "data"
WEIGHTS = "earloom/moonshine-tiny-en"
FORMS = ["bf16", "int8", "pca-256-int8", "pca-192-int8", "pca-128-int8", "pool-2-int8"]


def clips_of(corpus: str) -> list[tuple[Any, str]]:
    """Clips `(samples,)` int16 at 16 kHz of a corpus beside this clone, with their transcripts."""
    rows = [json.loads(line) for line in (DATA / corpus / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(sf.read(DATA / corpus / row["audio"], dtype="int16")[0], row["text"] or "") for row in rows]


class Decoder:
    """Moonshine's decoder on frames of its encoder."""

    def __init__(self) -> None:
        folder = resolve(WEIGHTS)
        self.model = MoonshineForConditionalGeneration.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def text(self, frames: Tensor, seconds: float) -> str:
        heard = MoonshineEncoderModelOutput(last_hidden_state=frames.float()[None])
        limit = int(6.5 * seconds) + 8  # tokens, as Moonshine's authors bound it
        ids = self.model.generate(encoder_outputs=heard, max_new_tokens=limit, do_sample=False)
        return normalise(self.tokenizer.decode(ids[0], skip_special_tokens=True), "en")


def moments_of(encoder: AudioEncoder, place: Path) -> Moments:
    """What principal components are fitted on: a clip of each of 105 other speakers."""
    _, index = make_shards(place, [[wave for wave, _ in clips_of("librispeech_speakers")]])
    return gather_moments(encoder, index, str(place))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", default=FORMS)
    parser.add_argument("--clips", type=int, default=60)
    given = parser.parse_args()
    if not DATA.is_dir():
        print("no ../shared/data beside this clone: nothing measured")
        return 0
    with tempfile.TemporaryDirectory() as place:
        return measure(Path(place), [Form.parse(name) for name in given.forms], given.clips)


def measure(place: Path, forms: list[Form], count: int) -> int:
    torch.set_num_threads(1)
    encoder, decoder = build_encoder(EncoderSpec(kind="moonshine", weights=WEIGHTS)), Decoder()
    clips = clips_of("librispeech_mini")[:count]
    audio, index = make_shards(place / "audio", [[wave for wave, _ in clips]])
    seconds = [len(wave) / 16_000 for wave, _ in clips]
    live = [encode_clips(encoder, [torch.from_numpy(wave / 32768.0).float()])[0] for wave, _ in clips]
    said = [normalise(text, "en") for _, text in clips]
    heard = [decoder.text(frames, length) for frames, length in zip(live, seconds, strict=True)]
    flac = sum(len(to_flac(wave)) for wave, _ in clips) / sum(seconds) * 3600
    moments = moments_of(encoder, place / "others")
    print(f"{machine()}; {len(clips)} clips, {sum(seconds) / 60:.1f} min; FLAC {flac / 1e6:.1f} MB/h")
    print(f"{'form':<16} {'error':>8} {'centred':>8} {'cosine':>9} {'worst':>9} {'B/frame':>8}", end="")
    print(f"{'MB/h':>8}{'of FLAC':>9}{'WER':>9}{'words apart':>13}")
    print(f"{'live':<71}{jiwer.wer(said, heard):>9.3%}", flush=True)
    half = build_encoder(EncoderSpec(kind="moonshine", weights=WEIGHTS, compute="bfloat16"))
    near = [encode_clips(half, [torch.from_numpy(wave / 32768.0).float()])[0] for wave, _ in clips]
    texts = [decoder.text(frames, length) for frames, length in zip(near, seconds, strict=True)]
    error = float((torch.cat(near) - torch.cat(live)).norm() / torch.cat(live).norm())
    judged = f"{jiwer.wer(said, texts):>9.3%}{jiwer.wer(heard, texts):>13.3%}"
    print(f"{'live, bfloat16':<16}{error:>9.2%}{'':<46}{judged}", flush=True)
    for form in forms:
        projection = fit_components(moments, form.dims)[0] if form.dims else None
        kept = [unpack(pack(frames, form, projection), len(frames), form, projection) for frames in live]
        texts = [decoder.text(frames, length) for frames, length in zip(kept, seconds, strict=True)]
        found = fidelity(live, form, projection)
        folder = str(place / str(form))
        part = extract_shard(audio.shards[0], index, str(place / "audio"), encoder, folder, None, form, projection)
        hourly = part.shard.bytes / sum(seconds) * 3600
        judged = f"{jiwer.wer(said, texts):>9.3%}{jiwer.wer(heard, texts):>13.3%}"
        print(f"{found}{hourly / 1e6:>8.1f}{hourly / flac:>9.2f}{judged}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
