"""WavLLM: published sizes and rates, its prompt, and the gate that sets the strength of LoRA by the request."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from components.curriculum.tasks import question
from models.architectures import load
from models.architectures.wavllm import SYSTEM, WavLLM
from models.batch import Batch, Layout, Pair, collate
from models.connectors.prompt_gate import PromptGate, request_states
from models.encoders import build_encoder
from models.pretrained import load_tokenizer, random_llm
from models.recipe import Decoding
from models.rendering import Message

TOKENIZER: Any = load_tokenizer("bytes")
REQUESTS = ("Transcribe speech to text.", "What is the room in this audio?", "Say it in German, as text.")


def trainable(model: WavLLM, *groups: str) -> int:
    named = set(model.freeze(groups))
    return sum(p.numel() for name, p in model.named_parameters() if name in named)


def tiny(seed: int = 3, opened: bool = True) -> WavLLM:
    """`opened`: LoRA and gate have learnt something."""
    model = cast(WavLLM, load("wavllm").build(WavLLM.preset("tiny"), TOKENIZER, seed=seed))
    if opened:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name or name.startswith("gate"):
                    p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def answered(request: str, answer: str = "stop") -> list[Message]:
    return [*question(request), {"role": "assistant", "content": answer}]


def pairs_of(model: WavLLM, requests: tuple[str, ...] = REQUESTS, answer: bool = True) -> list[Pair]:
    generator = torch.Generator().manual_seed(1)
    clips = model.listen([torch.randn(6000 + 2000 * i, generator=generator) * 0.1 for i in range(len(requests))])
    return [
        (model.render(TOKENIZER, answered(request) if answer else question(request), [clip]), [clip])
        for request, clip in zip(requests, clips, strict=True)
    ]


def batch_of(pairs: list[Pair], layout: Layout = "right") -> Batch:
    return collate(pairs, TOKENIZER.pad_token_id, layout)


# ---- sizes and rates ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_published_numbers_of_parameters() -> None:
    preset = WavLLM.preset("paper")
    model = WavLLM.on_meta(preset)
    assert trainable(model, "lora") == 33_554_432  # r 32 on q, k, v and o of 32 layers
    assert trainable(model, "gate") == 8_397_825
    assert trainable(model, "connector", "lora") == 68_244_237
    preset.connector["audio_proj"] = True  # the projection that no path uses: published are 76.6 M
    whole = WavLLM.on_meta(preset)
    assert trainable(whole, "connector", "lora") == 76_636_941
    assert preset.lora is not None
    assert preset.lora.alpha / preset.lora.rank == 1.0


@pytest.mark.parametrize(("seconds", "tokens"), [(1, 13), (10, 125), (30, 375), (40, 375)])
def test_twelve_and_a_half_tokens_a_second(seconds: int, tokens: int) -> None:
    """And no more than a window of Whisper."""
    preset = WavLLM.preset("paper").without_weights()
    with torch.device("meta"):
        encoders = {role: build_encoder(spec) for role, spec in preset.encoders.items()}
        connector = WavLLM.build_connector(tiny(), preset, 4096)
    assert encoders["speech"].width == 1280
    assert encoders["voice"].width == 13 * 768
    lengths = [encoders[role].output_length(seconds * 16_000) for role in ("speech", "voice")]
    assert connector.tokens(*lengths) == tokens  # type: ignore[operator]


# ---- the sequence ---------------------------------------------------------------------------------------------------


def test_the_prompt_is_the_official_one() -> None:
    model = tiny()
    rendered, _ = pairs_of(model, ("What is said?",))[0]
    tokens = rendered.clip_tokens[0]
    before, after = rendered.ids[: rendered.clip_at[0]], rendered.ids[rendered.clip_at[0] + tokens :]
    assert before[0] == TOKENIZER.bos_token_id
    assert TOKENIZER.bos_token_id not in before[1:] + after
    assert TOKENIZER.decode(before[1:]) == f"[INST]<<SYS>>\n{SYSTEM}\n<</SYS>>\n\n<SPEECH>"
    assert TOKENIZER.decode(after[:-1]) == " </SPEECH> What is said? [/INST] stop"
    learnt = [i for i in rendered.labels if i != -100]
    assert TOKENIZER.decode(learnt[:-1]) == " stop"
    assert learnt[-1] == TOKENIZER.eos_token_id


def test_the_gate_reads_the_request_in_double_quotes_and_without_bos() -> None:
    rendered, _ = pairs_of(tiny(), ("What is said?",))[0]
    assert TOKENIZER.decode(rendered.instruction) == '"What is said?"'
    assert rendered.instruction[0] != TOKENIZER.bos_token_id


def test_a_request_without_audio_has_no_speech_tags() -> None:
    messages: list[Message] = [{"role": "user", "content": "Say no."}, {"role": "assistant", "content": "no"}]
    rendered = tiny().render(TOKENIZER, messages, [])
    assert rendered.clip_at == rendered.audio_at == []
    assert TOKENIZER.decode(rendered.ids[1:-1]) == f"[INST]<<SYS>>\n{SYSTEM}\n<</SYS>>\n\nSay no. [/INST] no"


# ---- the gate alone -------------------------------------------------------------------------------------------------


def test_a_new_gate_gives_alpha_over_rank_for_any_request() -> None:
    gate = PromptGate(8, 4, plain=0.5)
    assert torch.allclose(gate(torch.randn(3, 5, 8) * 100, torch.tensor([5, 1, 3])), torch.full((3, 8), 0.5))
    assert gate.counts  # it learns
    assert not gate.requires_grad_(False).counts
    nn.init.constant_(gate.scale_fc_2.weight, 1e-3)
    assert gate.counts


def test_the_gate_lies_between_zero_and_three_and_sees_no_padding() -> None:
    torch.manual_seed(0)
    gate = PromptGate(8, 4, plain=1.0)
    nn.init.normal_(gate.scale_fc_2.weight, std=3.0)
    states, lengths = torch.randn(6, 7, 8) * 3, torch.tensor([7, 2, 4, 1, 6, 3])
    found = gate(states, lengths)
    assert found.min() == 0
    assert found.max() == 3
    for i, n in enumerate(lengths.tolist()):
        made = gate.scale_fc_2(nn.functional.gelu(gate.scale_fc_1(states[i, :n])))
        weights = gate.scale_weight_attention(made)[:, 0].softmax(0)
        assert torch.allclose(found[i], (weights @ made).relu().clamp(max=3), atol=1e-5)


def test_a_scale_that_the_gate_cannot_give_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at most 3\.0.*got 4"):
        PromptGate(8, 4, plain=4.0)


# ---- the gate in the model -------------------------------------------------------------------------------------------


def plain_backbone(model: WavLLM, strength: Tensor | None) -> Any:
    """The backbone without peft; with the strength of one sample, `(width,)`, LoRA is merged into its weights."""
    bare: Any = random_llm(model.config.llm).eval()
    state = {n.replace(".base_layer", ""): p for n, p in model.llm.state_dict().items() if ".lora_" not in n}
    bare.load_state_dict(state)
    for (name, layer), (_, ours) in zip(_projections(bare), _projections(model.llm), strict=True):
        if strength is None:
            continue
        product = ours.lora_B["default"].weight @ ours.lora_A["default"].weight
        each = strength.reshape(len(product), -1).mean(1)  # keys and values have half of the channels
        assert layer.weight.shape == product.shape, name
        layer.weight.data += each[:, None] * product
    return bare


def _projections(llm: Any) -> list[tuple[str, Any]]:
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj")
    return [(kind, getattr(layer.self_attn, kind)) for layer in llm.model.layers for kind in kinds]


def strength_of(model: WavLLM, request: str) -> Tensor:
    """By transformers' own way to the states before the final norm: of a model without one."""
    bare = plain_backbone(model, None)
    bare.model.norm = nn.Identity()
    ids = torch.tensor([TOKENIZER(f'"{request}"', add_special_tokens=False)["input_ids"]])
    states = bare.model(input_ids=ids, use_cache=False).last_hidden_state
    return cast(Tensor, model.gate(states, torch.tensor([ids.shape[1]]))[0])


@torch.no_grad()
def test_a_gated_lora_is_one_whose_rows_are_scaled_before_it_is_merged() -> None:
    model = tiny()
    for request, pair in zip(REQUESTS, pairs_of(model), strict=True):
        batch = batch_of([pair])
        found = model.hidden(batch)
        strength = strength_of(model, request)
        assert strength.std() > 0.1
        merged = plain_backbone(model, strength)
        embedded, _ = model.embed(batch)
        expected = merged.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        assert torch.allclose(found, expected, atol=2e-5)


@torch.no_grad()
def test_each_sample_of_a_batch_has_its_own_request_in_every_layout() -> None:
    model = tiny()
    pairs = pairs_of(model)
    alone = [model.hidden(batch_of([pair]))[0] for pair in pairs]
    layouts: tuple[Layout, ...] = ("right", "left", "packed")
    for layout in layouts:
        batch = batch_of(pairs, layout)
        together = model.hidden(batch)
        for i, expected in enumerate(alone):
            assert torch.allclose(together[batch.segments == i + 1], expected, atol=2e-5), layout
    others = pairs_of(model, (REQUESTS[1], *REQUESTS[1:]))  # another request of the first, the same audio
    changed = model.hidden(batch_of(others, "packed"))
    assert torch.allclose(changed[0, -len(alone[2]) :], alone[2], atol=2e-5)


@torch.no_grad()
def test_states_of_a_request_are_those_before_the_final_norm_and_without_lora() -> None:
    model = tiny()
    ids, lengths = torch.randint(3, 259, (2, 9)), torch.tensor([9, 4])
    bare = plain_backbone(model, None)
    with model.gated.without():
        states = request_states(model.llm, ids, lengths)
    for i, n in enumerate(lengths.tolist()):
        expected = bare.model(input_ids=ids[i : i + 1, :n], use_cache=False).last_hidden_state
        assert torch.allclose(bare.model.norm(states[i, :n]), expected[0], atol=1e-5)


@torch.no_grad()
def test_before_the_second_stage_the_gate_is_not_run() -> None:
    """A stage that does not train it runs the backbone once a batch, with alpha / r; a new gate changes nothing."""
    model = tiny(opened=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    batch = batch_of(pairs_of(model))
    lengths: list[int] = []
    model.llm.get_decoder().norm.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    model.freeze(("connector", "lora"))
    plain = model.hidden(batch)
    assert lengths == [batch.ids.shape[1]]
    model.freeze(("connector", "lora", "gate"))
    gated = model.hidden(batch)
    assert batch.instructions is not None
    assert lengths[1:] == [batch.instructions.shape[1], batch.ids.shape[1]]
    assert torch.allclose(gated, plain, atol=1e-5)


@torch.no_grad()
def test_generation_with_a_cache_and_beams_keeps_each_request() -> None:
    model = tiny()
    prompts = pairs_of(model, answer=False)
    for beams in (1, 3):
        decoding = Decoding(beams=beams)
        together = model.generate(batch_of(prompts, "left"), decoding, TOKENIZER, 5)
        alone = [model.generate(batch_of([pair], "left"), decoding, TOKENIZER, 5)[0] for pair in prompts]
        assert together == alone
    rendered, clips = prompts[1]
    greedy = model.generate(batch_of([prompts[1]], "left"), Decoding(), TOKENIZER, 5)[0]
    for _ in greedy:  # the same without a cache
        states = model.hidden(batch_of([(rendered, clips)]))
        rendered.tokens([int(model.llm.get_output_embeddings()(states[0, -1]).argmax())])
    assert rendered.ids[-len(greedy) :] == greedy
    assert len(greedy) > 0


@torch.no_grad()
def test_rows_of_beams_belong_to_the_sample_that_they_follow() -> None:
    model = tiny()
    embedded, strength = torch.randn(2, 6, 32), torch.rand(2, 32) * 3
    model.gated.set(strength)
    expected = model.llm.get_decoder()(inputs_embeds=embedded, use_cache=False).last_hidden_state
    repeated = embedded.repeat_interleave(3, 0)
    found = model.llm.get_decoder()(inputs_embeds=repeated, use_cache=False).last_hidden_state
    assert torch.allclose(found, expected.repeat_interleave(3, 0), atol=1e-5)
    assert not torch.allclose(found[1], found[4], atol=1e-2)


def test_gradients_reach_lora_and_gate_under_autocast() -> None:
    """The request's pass has none, and what it casts must not be taken for the pass that learns."""
    model = tiny()
    model.freeze(("lora", "gate"))
    with torch.autocast("cpu", torch.bfloat16):
        model(batch_of(pairs_of(model), "packed"))[0].backward()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in named.values())
