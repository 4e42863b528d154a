"""MU-LLaMA: published counts, the prompt with its slip, and a vector that is added beside LoRA in the last layers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.architectures.mu_llama import BIASES, PROMPT, MuLlama
from models.batch import Batch, collate
from models.checkpoints import import_into
from models.injection import layers_of, without_lora
from models.pretrained import load_tokenizer
from models.rendering import IGNORED, Audio, Message
from models.sizes import TINY_LLAMA

TOKENIZER: Any = load_tokenizer("bytes")
HEADS, HEAD_WIDTH = 4, 8  # of the tiny backbone, whose values have half as many heads


def tiny() -> MuLlama:
    return MuLlama.build(MuLlama.preset("tiny"), TOKENIZER, seed=3)


def opened(model: MuLlama) -> MuLlama:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        model.adapter.gate.copy_(torch.randn(model.adapter.gate.shape, generator=generator))
    return model


def messages(answer: str | None = "a piano") -> list[Message]:
    asked: list[Message] = [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "What plays?"}]}]
    return asked + ([{"role": "assistant", "content": answer}] if answer is not None else [])


def clip_of(model: MuLlama, samples: int = 9000) -> Audio:
    return model.listen([0.2 * torch.randn(samples, generator=torch.Generator().manual_seed(samples))])[0]


def batch_of(model: MuLlama) -> Batch:
    clip = clip_of(model)
    return collate([(model.render(TOKENIZER, messages(), [clip]), [clip])], TOKENIZER.pad_token_id)


def attended(model: MuLlama, batch: Batch) -> list[Tensor]:
    """What enters each layer's output projection, `(rows, length, width)`."""
    found: list[Tensor] = []
    handles = [
        layer.get_submodule("self_attn.o_proj").register_forward_hook(lambda _, args, output: found.append(args[0]))
        for layer in layers_of(model.llm)
    ]
    model.hidden(batch)
    for handle in handles:
        handle.remove()
    return found


# ---- what was published ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paper() -> MuLlama:
    return MuLlama.on_meta(MuLlama.preset("paper"))


def count(model: MuLlama, *groups: str) -> int:
    named = set(model.trained_by(groups))
    return sum(parameter.numel() for name, parameter in model.named_parameters() if name in named)


def test_what_each_phase_trains(paper: MuLlama) -> None:
    """About 608.3 M and 41.3 M on the fact sheet."""
    pretrain, finetune = MuLlama.preset("paper").recipe.stages
    block = 4096 + 3 * 4096 * 16384
    assert count(paper, *pretrain.train) == 26 + 1024 * 4096 + 4096 + 3 * block + 20 * 4096 + 32 * 32 == 608_273_434
    assert count(paper, "norms") == 65 * 4096
    assert count(paper, "biases") == 32 * (2 * 4096 + 2 * 11008 + 4096)
    assert count(paper, "lora") == 32 * 16 * (4 * 8192 + 3 * (4096 + 11008))
    assert count(paper, *finetune.train) == 41_340_928
    assert not any(name.startswith("connector") for name in paper.trained_by(finetune.train))


def test_learning_rates_go_with_the_batch() -> None:
    pretrain, finetune = MuLlama.preset("paper").recipe.stages
    assert pretrain.optimiser.lr == pytest.approx(1.5625e-6)
    assert finetune.optimiser.lr == pytest.approx(1.25e-4)
    assert {stage.optimiser.betas for stage in (pretrain, finetune)} == {(0.9, 0.95)}


def test_lora_is_not_scaled(paper: MuLlama) -> None:
    scales = {
        module.scaling["default"]
        for module in paper.llm.modules()
        if hasattr(module, "scaling") and hasattr(module, "lora_A")
    }
    assert scales == {1.0}


def test_keys_and_values_have_no_bias(paper: MuLlama) -> None:
    biases = {name.split(".")[-3] for name in paper.trained_by(("biases",))}
    assert biases == {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


# ---- sequences ------------------------------------------------------------------------------------------------------


def test_every_prompt_carries_the_slip_as_its_input() -> None:
    model = tiny()
    rendered = model.render(TOKENIZER, messages(), [clip_of(model)])
    assert rendered.clip_tokens == [0]
    assert rendered.ids[0] == TOKENIZER.bos_token_id
    assert TOKENIZER.decode(rendered.ids[1:]) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nWhat plays?\n\n### Input:\n<built-in function input>\n\n### Response:a piano<|im_end|>"
    )
    learnt = [label for label in rendered.labels if label != IGNORED]
    assert TOKENIZER.decode(learnt) == "a piano<|im_end|>"
    assert repr(input) in PROMPT.format(instruction="", input=input)


# ---- the gates ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_gated_value_is_added_before_the_output_projection_of_the_last_layers() -> None:
    """Head by head, from the layer's own value matrix; each of its heads serves two of the attention."""
    model = tiny()
    batch = batch_of(model)
    closed = attended(model, batch)
    heard = attended(opened(model), batch)
    assert torch.equal(heard[0], closed[0])  # the first of two layers is not adapted
    vector = model.connect(batch.features, batch.lengths)[0][0, 0]
    weight = without_lora(layers_of(model.llm)[1].get_submodule("self_attn.v_proj")).weight
    assert isinstance(weight, Tensor)
    values = weight @ (model.adapter.prefix_query.weight[0] + vector)
    for head in range(HEADS):
        value = values[HEAD_WIDTH * (head // 2) :][:HEAD_WIDTH]
        added = model.adapter.gate[1, head].tanh() * value
        part = slice(HEAD_WIDTH * head, HEAD_WIDTH * (head + 1))
        for at in range(batch.ids.shape[1]):
            assert torch.allclose(heard[1][0, at, part] - closed[1][0, at, part], added, atol=1e-5)


@torch.no_grad()
def test_what_is_added_bypasses_lora() -> None:
    model = tiny()
    batch = batch_of(model)
    before = attended(opened(model), batch)[1] - attended(tiny(), batch)[1]
    trained = tiny()
    for one in (model, trained):
        for name, parameter in one.named_parameters():
            if "layers.1.self_attn.v_proj.lora_B" in name:
                parameter.fill_(0.5)
    with_lora = attended(trained, batch)[1]
    assert not torch.allclose(with_lora, attended(tiny(), batch)[1], atol=1e-2)
    assert torch.allclose(attended(model, batch)[1] - with_lora, before, atol=1e-5)


@torch.no_grad()
def test_lora_of_the_output_projection_sees_what_was_added() -> None:
    """The hook stands before peft's layer, not before the one that it wraps."""
    model = opened(tiny())
    projection = layers_of(model.llm)[1].get_submodule("self_attn.o_proj")
    entered: dict[str, Tensor] = {}
    for name in ("base_layer", "lora_A.default"):
        projection.get_submodule(name).register_forward_hook(
            lambda _, args, output, name=name: entered.update({name: args[0]})
        )
    heard = attended(model, batch_of(model))[1]
    assert torch.equal(entered["base_layer"], heard)
    assert torch.equal(entered["lora_A.default"], heard)


@torch.no_grad()
def test_the_vector_is_a_mean_over_the_clip_that_no_loudness_of_the_encoder_changes() -> None:
    model = tiny()
    model.adapter.agg.bias.zero_()  # type: ignore[union-attr]
    frames, one = torch.randn(1, 1, 3 * 24), torch.tensor([1])
    vector, counts = model.connect({"music": frames}, {"music": one})
    assert vector.shape == (1, 1, 32)
    assert counts.tolist() == [1]
    assert torch.allclose(model.connect({"music": 5 * frames}, {"music": one})[0], vector, atol=1e-5)


# ---- the released file ----------------------------------------------------------------------------------------------

SIZES = TINY_LLAMA | BIASES | {"hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2}  # heads of 128
PLACES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}


def official(model: MuLlama) -> dict[str, Tensor]:
    """A file of the released layout: fact sheet a.md, section 9 (7). Gates are a tensor for each layer."""
    generator = torch.Generator().manual_seed(9)
    found: dict[str, Tensor] = {}
    for name in model.trained_by(("connector", "norms", "biases", "lora")):
        value = model.state_dict()[name]
        theirs = name.replace("llm.model.", "llama.").replace(".base_layer", "").replace(".default", "")
        theirs = theirs.replace("input_layernorm", "attention_norm").replace("post_attention_layernorm", "ffn_norm")
        for place, ours in PLACES.items():
            block, matrix = place.split(".")
            for end, half in (("l1", "lora_A"), ("l2", "lora_B")):
                theirs = theirs.replace(f"{ours}.{half}", f"{block}.lora_{matrix}_{end}")
            theirs = theirs.replace(ours, place)
        theirs = re.sub(r"connector\.(agg|proj)", r"mu_mert_\1", theirs)
        theirs = theirs.replace("connector.blocks.0.norm", "mu_mert_norm_1").replace("connector.", "")
        theirs = re.sub(r"blocks\.0\.w(\d)", r"mu_mert_f1_\1", theirs)
        found[theirs] = torch.randn(value.shape, generator=generator)
    gates = found.pop("gate")
    return found | {f"llama.layers.{i}.attention.gate": gate[None, :, None, None] for i, gate in enumerate(gates)}


def larger() -> MuLlama:
    preset = MuLlama.preset("tiny")
    return MuLlama.build(preset.model_copy(update={"backbone": preset.backbone.model_copy(update={"config": SIZES})}))


def test_every_tensor_of_the_released_file_arrives(tmp_path: Path) -> None:
    model = larger()
    state = official(model)
    torch.save({"model": state | {"llama.rope.freqs": torch.ones(3)}}, tmp_path / "checkpoint.pth")
    report = import_into(model, MuLlama.checkpoint, tmp_path / "checkpoint.pth")
    assert set(report.loaded) == set(model.trained_by(("connector", "norms", "biases", "lora")))
    assert report.ignored == ("llama.rope.freqs",)
    ours = model.state_dict()
    assert torch.equal(
        ours["connector.gate"], torch.stack([state[f"llama.layers.{i}.attention.gate"].flatten() for i in (0, 1)])
    )
    for theirs, name in (
        ("mu_mert_f1_2.weight", "connector.blocks.0.w2.weight"),
        ("llama.layers.1.feed_forward.lora_w3_l2.weight", "llm.model.layers.1.mlp.up_proj.lora_B.default.weight"),
        ("llama.layers.0.feed_forward.w2.bias", "llm.model.layers.0.mlp.down_proj.base_layer.bias"),
        ("llama.layers.0.attention.lora_wv_l2.weight", "llm.model.layers.0.self_attn.v_proj.lora_B.default.weight"),
        ("llama.layers.0.ffn_norm.weight", "llm.model.layers.0.post_attention_layernorm.weight"),
    ):
        assert torch.equal(ours[name], state[theirs]), name
    bias = state["llama.layers.1.attention.wq.bias"]
    turned = ours["llm.model.layers.1.self_attn.q_proj.base_layer.bias"]
    for at in range(64):  # a pair of neighbours is a pair of halves, in each head
        for head in (0, 128):
            assert turned[head + at] == bias[head + 2 * at]
            assert turned[head + 64 + at] == bias[head + 2 * at + 1]


def test_a_file_without_the_gate_of_a_layer_is_refused(tmp_path: Path) -> None:
    model = larger()
    state = official(model)
    state.pop("llama.layers.0.attention.gate")
    torch.save({"model": state}, tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match=r"rows \[1\] do not make up 'connector.gate' of ours"):
        import_into(model, MuLlama.checkpoint, tmp_path / "checkpoint.pth")
