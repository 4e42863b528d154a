"""Recognisers as encoders: transcripts as bytes in a cache, and the decoder's hidden states as frames."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.encoders import EncoderSpec, build_encoder
from models.encoders.base import pad
from models.encoders.decoder_states import DecoderStatesEncoder
from models.encoders.recogniser import Recogniser
from models.encoders.transcriber import TranscriberEncoder, as_bytes, transcript_of, without_hallucinations
from models.sizes import WHISPER_LARGE_V2
from models.tokenizers.bytes import byte_tokenizer
from tests.models.encoder_helpers import clips

VOCABULARY = 259
MOONSHINE: dict[str, Any] = {
    "model": "moonshine",
    "hidden_size": 32,
    "intermediate_size": 48,
    "encoder_num_hidden_layers": 2,
    "decoder_num_hidden_layers": 2,
    "encoder_num_attention_heads": 4,
    "decoder_num_attention_heads": 2,
    "vocab_size": VOCABULARY,
    "initializer_range": 1.0,
}
WHISPER: dict[str, Any] = {
    "model": "whisper",
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "max_source_positions": 100,
    "max_target_positions": 40,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "init_std": 1.0,
}
LENGTHS = (9000, 16161, 100, 40000, 894, 32000)


def transcriber(config: dict[str, Any], **entries: Any) -> TranscriberEncoder:
    encoder = build_encoder(EncoderSpec(kind="transcriber", config=config, **entries))
    assert isinstance(encoder, TranscriberEncoder)
    return encoder


def decoder_states(config: dict[str, Any], **entries: Any) -> DecoderStatesEncoder:
    encoder = build_encoder(EncoderSpec(kind="decoder_states", config=config, **entries))
    assert isinstance(encoder, DecoderStatesEncoder)
    return encoder


def ids_of(recogniser: Recogniser, batch: list[Tensor]) -> list[list[int]]:
    waveforms, lengths = pad(batch)
    with torch.inference_mode():
        return recogniser.decode(*recogniser.listen(waveforms, lengths), [recogniser.limit(int(n)) for n in lengths])


def slowly(recogniser: Recogniser, clip: Tensor, prompt: list[int]) -> list[int]:
    """Greedy ids of one clip without cache, batch or mask: the whole sequence again at each step."""
    waveforms, lengths = pad([clip])
    with torch.inference_mode():
        frames, _ = recogniser.listen(waveforms, lengths)
        ids = list(prompt)
        for _ in range(recogniser.limit(len(clip))):
            hidden = recogniser.decoder(torch.tensor([ids]), encoder_hidden_states=frames).last_hidden_state[0, -1]
            ids.append(int((recogniser.decoder.embed_tokens.weight @ hidden).argmax()))
            if ids[-1] in recogniser.ends:
                break
    return ids[len(prompt) :]


# ---- transcripts as frames ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [MOONSHINE, WHISPER], ids=["moonshine", "whisper"])
def test_a_clip_does_not_change_the_transcript_of_another(config: dict[str, Any]) -> None:
    encoder = transcriber(config)
    batch = clips(*LENGTHS)
    together, alone = encoder(batch), [encoder([clip])[0] for clip in batch]
    for clip, one, other in zip(batch, together, alone, strict=True):
        assert one.shape == (encoder.output_length(len(clip)), 1) == (encoder.frames_of(len(clip)), encoder.width)
        assert torch.equal(one, other)
        assert torch.equal(one.bfloat16().float(), one)  # what a cache holds
    texts = [transcript_of(frames) for frames in together]
    assert len(set(texts)) == len(texts)
    assert all(text.isprintable() and text.isascii() for text in texts)
    waveforms, lengths = pad(batch)
    noisy = waveforms + (torch.arange(waveforms.shape[1])[None] >= lengths[:, None]) * 0.7
    assert encoder.transcribe(noisy, lengths) == encoder.transcribe(waveforms, lengths)


@pytest.mark.parametrize("config", [MOONSHINE, WHISPER], ids=["moonshine", "whisper"])
def test_greedy_ids_equal_decoding_without_cache(config: dict[str, Any]) -> None:
    recogniser = transcriber(config).recogniser
    batch = clips(*LENGTHS)
    found = ids_of(recogniser, batch)
    assert found == [slowly(recogniser, clip, [recogniser.start]) for clip in batch]
    for ids, n in zip(found, LENGTHS, strict=True):
        assert len(ids) == recogniser.limit(n) or ids[-1] in recogniser.ends


def test_a_clip_stops_at_its_end_while_others_go_on() -> None:
    """An id that some clip writes becomes the end token: it stops there, and the rest is as it was."""
    recogniser = transcriber(MOONSHINE).recogniser
    batch = clips(*LENGTHS)
    free = ids_of(recogniser, batch)
    end = free[3][4]
    stopping = transcriber(MOONSHINE | {"eos_token_id": end}).recogniser
    found = ids_of(stopping, batch)
    assert found == [ids[: ids.index(end) + 1] if end in ids else ids for ids in free]
    assert found[3] == free[3][: free[3].index(end) + 1] and len(found[5]) > 5
    assert stopping.text([end]) == ""


def test_limits_of_length() -> None:
    recogniser = transcriber(MOONSHINE).recogniser
    assert [recogniser.limit(n) for n in (0, 16_000, 160_000, 10**7)] == [4, 10, 69, 512]
    assert transcriber(WHISPER).recogniser.limit(160_000) == 20  # half the positions
    encoder = transcriber(MOONSHINE)
    assert [encoder.frames_of(n) for n in (1, 16_000, 16_001, 160_000)] == [17, 40, 41, 256]
    assert encoder.frame_rate == 24.0
    assert encoder.seconds_of(160_000) == pytest.approx(10, abs=0.1)
    assert transcriber(WHISPER).seconds_of(1) == 2.0  # the window


def test_text_becomes_bytes_and_text_again() -> None:
    for text in ("", "four score", "naïve – Привет 你好 😀"):
        data = as_bytes(text, 200)
        frames = torch.zeros(200, 1)
        frames[: len(data), 0] = torch.tensor(list(data), dtype=torch.float32)
        assert transcript_of(frames.bfloat16()) == text
        assert transcript_of(frames[: len(data)]) == text
    assert [as_bytes("aé😀", n) for n in range(8)] == [b"", b"a", b"a", "aé".encode()] + ["aé".encode()] * 3 + [
        "aé😀".encode()
    ]
    assert as_bytes("a\0b", 9) == b"ab"
    for frames in (torch.full((3, 1), 0.5), torch.full((3, 1), -3.0), torch.full((3, 1), 300.0)):
        with pytest.raises(ValueError, match="not the bytes of a transcript"):
            transcript_of(frames)


def test_what_whisper_writes_over_silence_is_taken_out() -> None:
    assert without_hallucinations("Thanks for watching!") == ""
    assert without_hallucinations("A dog. THANK YOU FOR WATCHING. It barks.") == "A dog. It barks."
    assert without_hallucinations("thanks for watching the dog") == "the dog"
    assert without_hallucinations("Thank you. I watch birds.") == "Thank you. I watch birds."


def test_a_transcriber_gives_no_gradient_and_can_stand_in_training() -> None:
    encoder = transcriber(MOONSHINE).train()
    frames = encoder(clips(9000))[0]
    assert not frames.requires_grad and not frames.is_inference()


# ---- real tokenizers and Whisper's prompt -------------------------------------------------------------------------


def whisper_folder(folder: Path) -> Path:
    """A multilingual Whisper with the byte tokenizer: language 10 or 11, task 12, no timestamps 13."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(4)
    sizes = {name: value for name, value in WHISPER.items() if name != "model"}
    WhisperForConditionalGeneration(WhisperConfig(**sizes)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    said = {
        "lang_to_id": {"<|en|>": 10, "<|de|>": 11},
        "task_to_id": {"transcribe": 12, "translate": 14},
        "no_timestamps_token_id": 13,
        "suppress_tokens": list(range(3, 200)),
        "begin_suppress_tokens": [2, 220],
    }
    (folder / "generation_config.json").write_text(json.dumps(said))
    return folder


def test_whisper_is_prompted_with_language_and_task(tmp_path: Path) -> None:
    folder = str(whisper_folder(tmp_path))
    heard = transcriber({"model": "whisper"}, weights=folder).recogniser
    german = transcriber({"model": "whisper", "language": "de"}, weights=folder).recogniser
    batch = clips(9000, 30000)
    with torch.inference_mode():
        frames, valid = heard.listen(*pad(batch))
        assert german.prompts(frames, valid).tolist() == [[1, 11, 12, 13]] * 2
        likely = heard.logits(heard.hidden(torch.ones(2, 1, dtype=torch.long), frames, valid)[:, -1])[:, [10, 11]]
        assert heard.prompts(frames, valid)[:, 1].tolist() == (10 + likely.argmax(dim=1)).tolist()
    ids = ids_of(german, batch)
    assert all(200 <= i < VOCABULARY or i <= 2 for row in ids for i in row)
    assert all(row[0] not in (2, 220) for row in ids)
    with pytest.raises(ValueError, match="does not know the language 'xx'"):
        ids_of(transcriber({"model": "whisper", "language": "xx"}, weights=folder).recogniser, batch)


def test_weights_and_tokenizer_come_from_a_folder_and_survive_a_rebuild(tmp_path: Path) -> None:
    """A saved model is rebuilt without `weights`: `tokenizer` in the configuration still says which text ids are."""
    folder = str(whisper_folder(tmp_path))
    read = transcriber({"model": "whisper"}, weights=folder)
    rebuilt = transcriber(WHISPER | {"tokenizer": folder})
    rebuilt.load_state_dict(read.state_dict())
    waveforms, lengths = pad(clips(9000, 30000))
    texts = read.transcribe(waveforms, lengths)
    assert texts == rebuilt.transcribe(waveforms, lengths)
    expected = [
        byte_tokenizer().decode(ids, skip_special_tokens=True).strip()
        for ids in ids_of(read.recogniser, clips(9000, 30000))
    ]
    assert texts == expected
    described = read.describe()
    assert described["weights"] == rebuilt.describe()["weights"]
    assert len(described["preprocessing"]["vocabulary"]["tokenizer.json"]) == 64
    assert described["preprocessing"]["generation"]["no_timestamps_token_id"] == 13
    json.dumps(described)


def test_recognisers_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for kind in ("transcriber", "decoder_states"):
        with pytest.raises(ValueError, match="moonshine or whisper, the recogniser to run; got 'ears'"):
            build_encoder(EncoderSpec(kind=kind, config={"model": "ears"}))
        for entries in ({"pool": 2}, {"layer": 1}, {"layers": (0, 1)}, {"window": True}):
            with pytest.raises(ValueError, match="neither layers nor pooling"):
                build_encoder(EncoderSpec.model_validate({"kind": kind, "config": MOONSHINE} | entries))
        with pytest.raises(ValueError, match="weights of its own"):
            build_encoder(EncoderSpec(kind=kind, config=MOONSHINE | {"tie_word_embeddings": False}))
    for positions in (0, 41):
        with pytest.raises(ValueError, match=f"between 1 and 40, those of the decoder; got {positions}"):
            decoder_states(WHISPER | {"positions": positions})


# ---- decoder states ---------------------------------------------------------------------------------------------


def test_whispers_states_are_those_of_copies_of_the_start() -> None:
    """LLaSM's trick, against transformers' whole model."""
    from transformers import WhisperConfig, WhisperModel

    encoder = decoder_states(WHISPER | {"positions": 16})
    sizes = {name: value for name, value in WHISPER.items() if name != "model"}
    whole = WhisperModel(WhisperConfig(**sizes)).eval()
    whole.encoder.load_state_dict(encoder.recogniser.encoder.layers.state_dict())  # type: ignore[union-attr]
    whole.decoder.load_state_dict(encoder.recogniser.decoder.state_dict())
    batch = clips(9000, 40000, 300)
    with torch.inference_mode():
        found = encoder(batch)
        mels = torch.stack([encoder_mel(encoder, clip) for clip in batch])
        start = torch.full((3, 16), encoder.recogniser.start)
        theirs = whole(input_features=mels, decoder_input_ids=start).last_hidden_state
    assert [frames.shape for frames in found] == [(16, 32)] * 3
    assert (torch.stack(found) - theirs).abs().max() < 1e-4
    assert (found[0][0] - found[0][1]).abs().max() > 1e-2  # learned positions set the copies apart
    assert encoder.output_length(1) == encoder.output_length(10**7) == 16


def encoder_mel(encoder: DecoderStatesEncoder, clip: Tensor) -> Tensor:
    from models.encoders.frontend import log_mel
    from models.encoders.whisper import WhisperEncoder

    inner = encoder.recogniser.encoder
    assert isinstance(inner, WhisperEncoder)
    return log_mel(inner.trim(clip))


def test_moonshines_states_are_those_that_predicted_its_ids() -> None:
    encoder = decoder_states(MOONSHINE | {"positions": 12, "eos_token_id": 7})
    batch = clips(*LENGTHS)
    ids = [row[:12] for row in ids_of(encoder.recogniser, batch)]
    with torch.inference_mode():
        found = encoder(batch)
        alone = [encoder([clip])[0] for clip in batch]
    for row, frames, one in zip(ids, found, alone, strict=True):
        assert frames.shape == (12, 32) == (encoder.output_length(1), encoder.width)
        assert (frames - one).abs().max() < 5e-4  # sums in another order: 1.0e-4 was seen without AVX-512
        with torch.inference_mode():
            assert encoder.recogniser.logits(frames[: len(row)]).argmax(dim=1).tolist() == row
        assert not frames[len(row) :].any()


@pytest.mark.parametrize("config", [MOONSHINE, WHISPER], ids=["moonshine", "whisper"])
def test_gradients_reach_encoder_and_decoder(config: dict[str, Any]) -> None:
    encoder = decoder_states(config | {"positions": 8})
    sum(frames.square().sum() for frames in encoder(clips(9000, 40000))).backward()  # type: ignore[union-attr]
    silent = {name for name, parameter in encoder.named_parameters() if parameter.grad is None}
    assert silent <= {"recogniser.encoder.layers.embed_positions.weight"}
    assert all(
        p.grad.abs().max() > 0
        for n, p in encoder.named_parameters()
        if n.endswith("q_proj.weight") and p.grad is not None
    )


def test_published_sizes() -> None:
    """Whisper-large-v2 is 1,543,304,960 parameters; Moonshine tiny 27.1 M."""
    decoder = {"decoder_layers": 32, "decoder_attention_heads": 20, "decoder_ffn_dim": 5120, "vocab_size": 51865}
    with torch.device("meta"):
        llasm = decoder_states(
            WHISPER_LARGE_V2 | decoder | {"model": "whisper", "tokenizer": "openai/whisper-large-v2"}
        )
        small = decoder_states({"model": "moonshine"})
    assert sum(parameter.numel() for parameter in llasm.parameters()) == 1_543_304_960
    assert sum(parameter.numel() for parameter in small.parameters()) == 27_092_736
    assert (llasm.output_length(16_000), llasm.width, llasm.seconds_of(16_000)) == (64, 1280, 30.0)
    assert (small.output_length(16_000), small.width) == (64, 288)


# ---- real weights -----------------------------------------------------------------------------------------------


def real(kind: str) -> Any:
    try:
        return build_encoder(EncoderSpec(kind=kind, weights="earloom/moonshine-tiny-en", config={"model": "moonshine"}))
    except FileNotFoundError as error:
        pytest.skip(str(error))


def librispeech(shared_data: Path, start: int, stop: int) -> tuple[list[Tensor], list[str]]:
    import soundfile

    folder = shared_data / "librispeech_mini"
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()][start:stop]
    speech = [torch.from_numpy(soundfile.read(folder / row["audio"], dtype="float32")[0]) for row in rows]
    return speech, [row["text"] for row in rows]


def words(text: str) -> str:
    return "".join(letter for letter in text.lower() if letter.isalnum() or letter in " '")


@pytest.mark.slow
def test_moonshine_transcribes_real_speech(shared_data: Path) -> None:
    import jiwer

    encoder = real("transcriber")
    speech, spoken = librispeech(shared_data, 0, 12)
    together = [transcript_of(frames.bfloat16()) for frames in encoder(speech)]
    assert together == [transcript_of(encoder([clip])[0]) for clip in speech]
    assert together[2] == "You don't mean that you thought me so silly."
    assert jiwer.wer([words(text) for text in spoken], [words(text) for text in together]) < 0.15


@pytest.mark.slow
def test_moonshines_ids_are_those_of_generate(shared_data: Path) -> None:
    from transformers import MoonshineForConditionalGeneration

    from models.pretrained import resolve

    encoder = real("transcriber")
    speech, _ = librispeech(shared_data, 2, 6)
    whole = MoonshineForConditionalGeneration.from_pretrained(resolve("earloom/moonshine-tiny-en")).eval()
    for clip, ids in zip(speech, ids_of(encoder.recogniser, speech), strict=True):
        limit = encoder.recogniser.limit(len(clip))
        assert whole.generate(clip[None], max_new_tokens=limit, do_sample=False)[0, 1:].tolist() == ids
    states = real("decoder_states")
    with torch.inference_mode():
        frames = states(speech)[0]
        ids = ids_of(states.recogniser, speech)[0]
        fed = torch.tensor([[states.recogniser.start, *ids[:-1]]])
        theirs = whole(input_values=speech[0][None], decoder_input_ids=fed, output_hidden_states=True)
    assert (frames[: len(ids)] - theirs.decoder_hidden_states[-1][0]).abs().max() < 1e-3
    assert not frames[len(ids) :].any()


@pytest.mark.slow
def test_a_thousand_seconds_take_less_than_a_minute_or_so(shared_data: Path) -> None:
    encoder = real("transcriber")
    speech, _ = librispeech(shared_data, 0, 20)
    sound = torch.cat(speech)
    seconds = [sound[i * 8000 :][:16000] for i in range(128)]
    encoder(seconds[:32])
    start = time.perf_counter()
    for i in range(0, 128, 32):
        encoder(seconds[i : i + 32])
    assert (time.perf_counter() - start) / 128 * 1000 < 120  # 15 s on two quiet cores
