"""The list itself, "Speech-LLMs-progress": 26 systems by their papers. Those that run say more in their own files."""

from __future__ import annotations

from typing import NamedTuple


class System(NamedTuple):
    """Name, arXiv number, and what it is while there is no file with a `summary` of its own."""

    name: str
    arxiv: str
    what: str = ""


SYSTEMS = (
    System("FunASR-LLM", "2509.12508"),
    System("SALMONN", "2310.13289"),
    System("SpeechGPT", "2305.11000"),
    System("LTU", "2305.10790", "CAV-MAE audio branch, pooled to 32 tokens for 10.24 s, before Vicuna-7B with LoRA"),
    System(
        "LTU-AS",
        "2309.14405",
        "all layers of a frozen Whisper through a small transformer; 25 tokens for 10 s, and the transcript as text",
    ),
    System(
        "Qwen-Audio",
        "2311.07919",
        "encoder started from Whisper-large-v2, pooled to 25 tokens a second; Qwen-7B frozen, then trained in full",
    ),
    System("Audio Flamingo", "2402.01831", "CLAP windows, gated cross-attention before each layer of OPT-IML-MAX-1.3B"),
    System("LLaSM", "2308.15930", "encoder and decoder of a frozen Whisper, one linear layer; 64 tokens a clip"),
    System(
        "WavLLM", "2404.00656", "Whisper and WavLM, adapters, LoRA behind a gate that reads the prompt; LLaMA-2-7B-chat"
    ),
    System("Pengi", "2305.11834", "trained HTSAT and two mappers to a prefix of 80 vectors; GPT-2 frozen"),
    System("MU-LLaMA", "2308.11276", "frozen MERT; one vector added into the last 20 layers of LLaMA-2-7B"),
    System(
        "UnIVAL",
        "2307.16184",
        "0.25 B encoder-decoder for image, video, audio and text, with a curriculum over modalities",
    ),
    System("Video-LLaMA", "2306.02858", "ImageBind vector of each 2 s, two-layer Q-Former; 8 audio tokens a clip"),
    System(
        "Macaw-LLM",
        "2306.09093",
        "Whisper-base, a wide convolution, attention over the embedding table; 6 tokens for 30 s",
    ),
    System("NExT-GPT", "2309.05519", "ImageBind in, diffusion decoders out, Vicuna-7B with LoRA between"),
    System(
        "SLM", "2310.00230", "frozen speech and text models, only a 156 M adapter learns; no code or weights published"
    ),
    System(
        "COSMIC",
        "2311.02248",
        "speech in-context learning with under 20 M trainable parameters; no code or weights published",
    ),
    System(
        "Seed-ASR",
        "2407.04675",
        "Conformer, four frames of 40 ms concatenated, 6.25 tokens a second into a mixture of experts; closed",
    ),
    System(
        "Speech-LLaMA",
        "2307.03917",
        "CTC compressor and a small audio encoder before LLaMA-7B; no code or weights published",
    ),
    System(
        "AnyGPT",
        "2402.12226",
        "LLaMA-2-7B over discrete tokens of speech, music, image and text; SpeechTokenizer at 50 Hz",
    ),
    System(
        "AudioPaLM",
        "2306.12925",
        "PaLM-2 8B with 1024 audio tokens at 25 Hz, heard and spoken; no code or weights published",
    ),
    System(
        "SPIRIT-LM",
        "2402.05755",
        "LLaMA-2-7B on interleaved words and units at 25 Hz; pitch and style units in the expressive one",
    ),
    System("VoxtLM", "2309.07937", "OPT on HuBERT units and text under one joint BPE: recognise, speak, continue"),
    System("VALL-E X", "2303.03926", "12 autoregressive and 12 parallel layers over EnCodec's 8 codebooks at 75 Hz"),
    System("LauraGPT", "2310.04673", "Conformer features in, FunCodec tokens at 25 Hz out; Qwen-1.8B"),
    System("AudioGPT", "2304.12995", "an agent: a language model that calls audio tools; nothing is trained"),
)
