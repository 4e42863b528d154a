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
    System("LTU", "2305.10790"),
    System("LTU-AS", "2309.14405"),
    System("Qwen-Audio", "2311.07919"),
    System("Audio Flamingo", "2402.01831"),
    System("LLaSM", "2308.15930"),
    System("WavLLM", "2404.00656"),
    System("Pengi", "2305.11834"),
    System("MU-LLaMA", "2308.11276"),
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
    System("SLM", "2310.00230"),
    System("COSMIC", "2311.02248"),
    System("Seed-ASR", "2407.04675"),
    System("Speech-LLaMA", "2307.03917"),
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
