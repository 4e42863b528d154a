"""MU-LLaMA: published counts, the prompt with its slip, and a vector that is added beside LoRA in the last layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from models.architectures.mu_llama import PROMPT, MuLlama
from models.batch import Batch, collate
from models.injection import layers_of, without_lora
from models.pretrained import load_tokenizer
from models.rendering import IGNORED, Audio, Message

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
