"""Official checkpoints: files of the published layouts, written by hand, arrive tensor by tensor or are refused."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.architectures import load
from models.checkpoints import (
    CONSTANTS,
    LLAMA,
    LORA,
    Checkpoint,
    expected,
    import_into,
    map_state,
    openai_whisper,
    our_names,
)
from models.contract import SpeechLLM
from models.encoders.base import EncoderSpec
from models.sizes import WHISPER_TINY_RANDOM

SALMONN = load("salmonn").checkpoint
FUNASR = load("funasr_llm").checkpoint
Placed = list[tuple[str, str, tuple[int, ...]]]  # official name, ours, shape


def salmonn_layout(
    widths: tuple[int, int], hidden: int, llm: tuple[int, int], rank: int, layers: int, default: str = ".default"
) -> Placed:
    """The file that SALMONN's runner.py saves: fact sheet a.md, section 4 (7). `llm`: width, and rows of v_proj."""
    bert, ours, wide = "speech_Qformer.bert.encoder.layer", "connector.qformer.encoder.layer", sum(widths)
    placed: Placed = [
        ("speech_query_tokens", "connector.query_tokens", (1, 1, hidden)),
        ("speech_llama_proj.weight", "connector.proj.weight", (llm[0], hidden)),
        ("speech_llama_proj.bias", "connector.proj.bias", (llm[0],)),
    ]
    for end in ("weight", "bias"):
        placed += [
            (f"ln_speech.{end}", f"connector.ln_speech.{end}", (widths[0],)),
            (f"ln_audio.{end}", f"connector.ln_audio.{end}", (widths[1],)),
            (f"speech_Qformer.bert.embeddings.LayerNorm.{end}", f"connector.qformer.layernorm.{end}", (hidden,)),
        ]
    linear = [
        ("attention.self.query", "attention.attention.query", hidden, hidden),
        ("attention.self.key", "attention.attention.key", hidden, hidden),
        ("attention.self.value", "attention.attention.value", hidden, hidden),
        ("attention.output.dense", "attention.output.dense", hidden, hidden),
        ("crossattention.self.query", "crossattention.attention.query", hidden, hidden),
        ("crossattention.self.key", "crossattention.attention.key", hidden, wide),
        ("crossattention.self.value", "crossattention.attention.value", hidden, wide),
        ("crossattention.output.dense", "crossattention.output.dense", hidden, hidden),
        ("intermediate_query.dense", "intermediate_query.dense", 4 * hidden, hidden),
        ("output_query.dense", "output_query.dense", hidden, 4 * hidden),
    ]
    norms = ("attention.output.LayerNorm", "crossattention.output.LayerNorm", "output_query.LayerNorm")
    for i in (0, 1):
        for theirs, name, rows, columns in linear:
            placed.append((f"{bert}.{i}.{theirs}.weight", f"{ours}.{i}.{name}.weight", (rows, columns)))
            placed.append((f"{bert}.{i}.{theirs}.bias", f"{ours}.{i}.{name}.bias", (rows,)))
        for norm in norms:
            placed += [
                (f"{bert}.{i}.{norm}.{end}", f"{ours}.{i}.{norm}.{end}", (hidden,)) for end in ("weight", "bias")
            ]
    for i in range(layers):
        for part, rows in (("q_proj", llm[0]), ("v_proj", llm[1])):
            at = f"layers.{i}.self_attn.{part}"
            peft = f"llama_model.base_model.model.model.{at}"
            placed += [
                (f"{peft}.lora_A{default}.weight", f"llm.model.{at}.lora_A.default.weight", (rank, llm[0])),
                (f"{peft}.lora_B{default}.weight", f"llm.model.{at}.lora_B.default.weight", (rows, rank)),
            ]
    return placed


def tiny_layout(default: str = ".default") -> Placed:
    return salmonn_layout(widths=(32, 24), hidden=32, llm=(32, 16), rank=4, layers=2, default=default)


BUFFERS = {  # the runner drops frozen parameters only, so buffers stay in the file
    "speech_Qformer.bert.embeddings.position_ids": torch.arange(512)[None],
    "llama_model.base_model.model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
}


def values(placed: Placed) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {official: torch.randn(shape, generator=generator) for official, _, shape in placed}


def saved(path: Path, state: dict[str, Tensor], outer: str = "model") -> Path:
    """As training code saves it: among other things. safetensors is flat."""
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    else:
        optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 3e-5}]}
        torch.save({outer: state, "optimizer": optimizer, "epoch": 2, "args": Namespace(lr=1)}, path)
    return path


def tiny(name: str = "salmonn", **changes: object) -> SpeechLLM:
    architecture = load(name)
    return architecture.build(architecture.preset("tiny").model_copy(update=changes), seed=3)


def copies(model: SpeechLLM) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


# ---- SALMONN ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["salmonn.pth", "salmonn.safetensors"])
@pytest.mark.parametrize("default", [".default", ""])
def test_every_tensor_of_salmonn_arrives_at_its_place(tmp_path: Path, file: str, default: str) -> None:
    placed = tiny_layout(default)
    state = values(placed)
    model = tiny()
    before = copies(model)
    report = import_into(model, SALMONN, saved(tmp_path / file, state | BUFFERS))
    after = model.state_dict()
    for official, ours, _ in placed:
        assert torch.equal(after[ours], state[official]), official
        assert not torch.equal(after[ours], before[ours]), ours
    moved = {ours for _, ours, _ in placed}
    assert all(torch.equal(after[name], before[name]) for name in after if name not in moved)
    assert sorted(report.loaded) == sorted(moved)
    assert report.parameters == sum(value.numel() for value in state.values())
    assert sorted(report.ignored) == sorted(BUFFERS)
    assert report.fits and report.problems() == ""


def test_salmonn_at_its_published_size_fills_33_332_992_parameters() -> None:
    placed = salmonn_layout(widths=(1280, 768), hidden=768, llm=(5120, 5120), rank=8, layers=40)
    model = load("salmonn").on_meta(load("salmonn").preset("paper"))
    with torch.device("meta"):
        mapped, unexpected = map_state(SALMONN, {official: torch.empty(shape) for official, _, shape in placed})
    ours = model.state_dict()
    wanted = expected(model, SALMONN)
    assert unexpected == []
    assert wanted == {name for _, name, _ in placed}
    assert {name.replace(".default", "") for name in wanted} == set(mapped)
    assert all(ours[name].shape == shape for _, name, shape in placed)
    assert sum(tensor.numel() for tensor in mapped.values()) == 33_332_992


def test_half_precision_is_taken_over_in_ours(tmp_path: Path) -> None:
    state = {name: value.half() for name, value in values(tiny_layout()).items()}
    model = tiny()
    import_into(model, SALMONN, saved(tmp_path / "half.pth", state))
    assert model.connector.proj.weight.dtype == torch.float32
    assert torch.equal(model.connector.proj.weight, state["speech_llama_proj.weight"].float())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("ln_audio.bias"), r"1 missing: connector\.ln_audio\.bias"),
        (lambda s: s.update({"speech_extra.weight": torch.ones(2)}), r"1 unexpected: speech_extra\.weight"),
        (
            lambda s: s.update({"speech_llama_proj.bias": torch.ones(48)}),
            r"1 of another shape: connector\.proj\.bias \(48,\) for ours of \(32,\)",
        ),
        (
            lambda s: s.update({"speech_Qformer.bert.encoder.layer.2.output_query.dense.bias": torch.ones(32)}),
            r"1 unexpected: connector\.qformer\.encoder\.layer\.2\.output_query\.dense\.bias \(ours has none",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_changed(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], said: str
) -> None:
    state = values(tiny_layout())
    change(state)
    model = tiny()
    before = copies(model)
    path = saved(tmp_path / "other.pth", state)
    with pytest.raises(ValueError, match=said) as refused:
        import_into(model, SALMONN, path)
    assert str(path) in str(refused.value) and "salmonn_v1.pth" in str(refused.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_not_strict_takes_what_fits(tmp_path: Path) -> None:
    state = values(tiny_layout())
    del state["ln_audio.bias"]
    state["speech_llama_proj.bias"] = torch.ones(48)
    state |= {f"other.{i}": torch.ones(1) for i in range(13)}
    model = tiny()
    report = import_into(model, SALMONN, saved(tmp_path / "part.pth", state), strict=False)
    assert report.missing == ("connector.ln_audio.bias",)
    assert report.wrong == ("connector.proj.bias (48,) for ours of (32,)",)
    assert len(report.loaded) == len(tiny_layout()) - 2
    assert torch.equal(model.connector.query_tokens, state["speech_query_tokens"])
    assert "13 unexpected: other.0, other.1," in report.problems()
    assert report.problems().endswith("for ours of (32,)") and "other.9 and 3 more\n" in report.problems()


def test_a_model_on_the_meta_device_is_only_compared(tmp_path: Path) -> None:
    model = load("salmonn").on_meta(load("salmonn").preset("tiny"))
    for file in ("meta.pth", "meta.safetensors"):
        report = import_into(model, SALMONN, saved(tmp_path / file, values(tiny_layout()) | BUFFERS))
        assert len(report.loaded) == len(tiny_layout()) and report.fits
    assert all(value.is_meta for value in model.state_dict().values())


# ---- FunASR ----------------------------------------------------------------------------------------------------------

WHISPER = EncoderSpec(kind="whisper", config=WHISPER_TINY_RANDOM | {"num_mel_bins": 128})


def funasr_layout() -> Placed:
    """The whole model as the toolkit's trainer saves it, section 8.10 of b.md, with LoRA on the backbone."""
    ours = "encoders.speech.layers"
    placed: Placed = [
        ("audio_adaptor.linear1.weight", "connector.linear1.weight", (48, 48)),
        ("audio_adaptor.linear1.bias", "connector.linear1.bias", (48,)),
        ("audio_adaptor.linear2.weight", "connector.linear2.weight", (32, 48)),
        ("audio_adaptor.linear2.bias", "connector.linear2.bias", (32,)),
        ("audio_encoder.conv1.weight", f"{ours}.conv1.weight", (24, 128, 3)),
        ("audio_encoder.conv1.bias", f"{ours}.conv1.bias", (24,)),
        ("audio_encoder.conv2.weight", f"{ours}.conv2.weight", (24, 24, 3)),
        ("audio_encoder.conv2.bias", f"{ours}.conv2.bias", (24,)),
        ("audio_encoder.positional_embedding", f"{ours}.embed_positions.weight", (100, 24)),
        ("audio_encoder.ln_post.weight", f"{ours}.layer_norm.weight", (24,)),
        ("audio_encoder.ln_post.bias", f"{ours}.layer_norm.bias", (24,)),
        ("llm.base_model.model.model.embed_tokens.weight", "llm.model.embed_tokens.weight", (259, 32)),
        ("llm.base_model.model.model.norm.weight", "llm.model.norm.weight", (32,)),
    ]
    for i in (0, 1):
        block, layer = f"audio_encoder.blocks.{i}", f"{ours}.layers.{i}"
        linear = [
            ("attn.query", "self_attn.q_proj", 24, 24),
            ("attn.value", "self_attn.v_proj", 24, 24),
            ("attn.out", "self_attn.out_proj", 24, 24),
            ("mlp.0", "fc1", 48, 24),
            ("mlp.2", "fc2", 24, 48),
        ]
        placed.append((f"{block}.attn.key.weight", f"{layer}.self_attn.k_proj.weight", (24, 24)))  # no bias
        for theirs, name, rows, columns in linear:
            placed.append((f"{block}.{theirs}.weight", f"{layer}.{name}.weight", (rows, columns)))
            placed.append((f"{block}.{theirs}.bias", f"{layer}.{name}.bias", (rows,)))
        for theirs, name in (("attn_ln", "self_attn_layer_norm"), ("mlp_ln", "final_layer_norm")):
            placed += [(f"{block}.{theirs}.{end}", f"{layer}.{name}.{end}", (24,)) for end in ("weight", "bias")]
        llm, at = f"llm.base_model.model.model.layers.{i}", f"llm.model.layers.{i}"
        for part, rows in (("q_proj", 32), ("v_proj", 16)):
            placed += [
                (f"{llm}.self_attn.{part}.weight", f"{at}.self_attn.{part}.base_layer.weight", (rows, 32)),
                (f"{llm}.self_attn.{part}.lora_A.weight", f"{at}.self_attn.{part}.lora_A.default.weight", (4, 32)),
                (f"{llm}.self_attn.{part}.lora_B.weight", f"{at}.self_attn.{part}.lora_B.default.weight", (rows, 4)),
            ]
        plain = {
            "self_attn.k_proj": (16, 32),
            "self_attn.o_proj": (32, 32),
            "mlp.gate_proj": (64, 32),
            "mlp.up_proj": (64, 32),
            "mlp.down_proj": (32, 64),
            "input_layernorm": (32,),
            "post_attention_layernorm": (32,),
        }
        placed += [(f"{llm}.{part}.weight", f"{at}.{part}.weight", shape) for part, shape in plain.items()]
    return placed


def tiny_funasr() -> SpeechLLM:
    return tiny("funasr_llm", encoders={"speech": WHISPER}, connector={"width": 24, "stack": 2, "hidden": 48})


def test_the_whole_model_of_funasr_arrives(tmp_path: Path) -> None:
    placed = funasr_layout()
    state = values(placed)
    model = tiny_funasr()
    import_into(model, FUNASR, saved(tmp_path / "model.pt.ep1", state, outer="state_dict"))
    after = model.state_dict()
    for official, ours, _ in placed:
        assert torch.equal(after[ours], state[official]), official
    assert {ours for _, ours, _ in placed} == {name for name, _ in model.named_parameters()}


def test_the_adaptor_of_funasr_alone_is_enough_but_half_an_adapter_is_not(tmp_path: Path) -> None:
    state = {name: value for name, value in values(funasr_layout()).items() if name.startswith("audio_adaptor")}
    model = tiny_funasr()
    assert import_into(model, FUNASR, saved(tmp_path / "model.pt", state, outer="state_dict")).parameters == 3_920
    state["llm.base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.ones(4, 32)
    with pytest.raises(ValueError, match=r"7 missing: llm\.model\.layers\.0\.self_attn\.q_proj\.lora_B"):
        import_into(model, FUNASR, saved(tmp_path / "half.pt", state, outer="state_dict"))


# ---- names -----------------------------------------------------------------------------------------------------------


def test_shared_renames() -> None:
    adapter = Checkpoint(file="an adapter", renames=(*LORA, *LLAMA))
    at = "model.layers.3.self_attn.q_proj"
    for official, ours in {
        f"base_model.model.{at}.lora_A.weight": f"llm.{at}.lora_A.weight",
        f"base_model.model.{at}.lora_B.default.weight": f"llm.{at}.lora_B.weight",
        f"base_model.model.{at}.base_layer.weight": f"llm.{at}.weight",
        f"module.{at}.weight": f"llm.{at}.weight",
        f"_orig_mod.{at.replace('.self', '._checkpoint_wrapped_module.self')}.weight": f"llm.{at}.weight",
        "model.embed_tokens.weight": "llm.model.embed_tokens.weight",
        "lm_head.weight": "llm.lm_head.weight",
    }.items():
        assert our_names(adapter, official) == (ours,)
    assert our_names(adapter, f"{at.removesuffix('q_proj')}rotary_emb.inv_freq") is None
    assert our_names(adapter, "audio_encoder.model.layers.0.weight") == ()
    whisper = Checkpoint(file="", renames=openai_whisper(r"transformer\.audio\.", "encoders.speech.layers."))
    assert our_names(whisper, "transformer.audio.blocks.31.mlp.2.bias") == (
        "encoders.speech.layers.layers.31.fc2.bias",
    )


def test_the_first_rename_counts_and_ignored_names_are_whole() -> None:
    checkpoint = Checkpoint(
        file="", renames=((r"a\.b\.", "connector."), (r"a\.", "llm.")), ignored=(*CONSTANTS, r"a\.b\.unused")
    )
    assert our_names(checkpoint, "a.b.weight") == ("connector.weight",)
    assert our_names(checkpoint, "a.c.weight") == ("llm.c.weight",)
    assert our_names(checkpoint, "a.b.unused") is None
    assert our_names(checkpoint, "a.b.unused.weight") == ("connector.unused.weight",)


def test_a_fused_tensor_is_cut_and_transformed() -> None:
    checkpoint = Checkpoint(
        file="",
        renames=((r"h\.(\d+)\.c_attn\.", (r"llm.\1.q.", r"llm.\1.k.", r"llm.\1.v.")),),
        transform=lambda name, value: value.T if name.endswith("k.weight") else value,
    )
    fused = torch.arange(12.0).reshape(6, 2)
    mapped, unexpected = map_state(checkpoint, {"h.7.c_attn.weight": fused, "h.7.c_proj.weight": fused})
    assert unexpected == ["h.7.c_proj.weight"]
    assert mapped["llm.7.q.weight"].tolist() == [[0, 1], [2, 3]]
    assert mapped["llm.7.k.weight"].tolist() == [[4, 6], [5, 7]]
    assert mapped["llm.7.v.weight"].tolist() == [[8, 9], [10, 11]]
    with pytest.raises(ValueError, match=r"h\.0\.c_attn\.bias.* of shape \(4,\) cannot be cut into 3"):
        map_state(checkpoint, {"h.0.c_attn.bias": torch.ones(4)})


def test_two_tensors_for_one_place_are_refused() -> None:
    checkpoint = Checkpoint(file="two of them", renames=((r"(?:old|new)\.", "connector."),))
    with pytest.raises(ValueError, match=r"two of them: 'old\.weight' and 'new\.weight' are both 'connector\.weight'"):
        map_state(checkpoint, {"old.weight": torch.ones(1), "new.weight": torch.ones(1)})


def test_batch_statistics_are_expected_and_a_function_may_say_what_is() -> None:
    class WithNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.connector = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))

        def trained_by(self, groups: tuple[str, ...]) -> list[str]:
            return [name for name, _ in self.named_parameters()]

    model = WithNorm()
    wanted = expected(model, Checkpoint(file="", renames=()))  # type: ignore[arg-type]
    assert wanted == {f"connector.{name}" for name in ("0.weight", "0.bias", "1.weight", "1.bias")} | {
        "connector.1.running_mean",
        "connector.1.running_var",
    }
    chosen = Checkpoint(file="", renames=(), expects=lambda _: ["connector.0.weight"])
    assert expected(model, chosen) == {"connector.0.weight"}  # type: ignore[arg-type]
