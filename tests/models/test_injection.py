"""Hooks inside a backbone: the same with a cache, with beams, in packed rows, and when layers are computed again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.architectures import load
from models.batch import Batch, Pair, collate
from models.contract import SpeechLLM
from models.injection import Injection, layers_of, of_rows, seen
from models.pretrained import load_llm, load_tokenizer
from models.recipe import Decoding
from models.rendering import Message
from models.sizes import TINY_GPT2, TINY_LLAMA, TINY_OPT

BOTH = ("mu_llama", "audio_flamingo")
GATES = {"mu_llama": "gate", "audio_flamingo": "_gate"}
CLIPS = (6000, 14000, 21000)


class Made:
    """A tiny model with open gates, its tokenizer, and three requests about three clips."""

    def __init__(self, name: str, gates: float = 1.0) -> None:
        architecture = load(name)
        preset = architecture.preset("tiny")
        self.tokenizer: Any = load_tokenizer("bytes")
        self.tokenizer.add_tokens(architecture.added_tokens(preset))
        self.model: SpeechLLM = architecture.build(preset, self.tokenizer, seed=3)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for _, parameter in self.model.connector.named_parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            for parameter_name, parameter in self.model.connector.named_parameters():
                if parameter_name.endswith(GATES[name]):
                    parameter.fill_(gates)
        waves = [0.2 * torch.randn(samples, generator=generator) for samples in CLIPS]
        self.audios = self.model.listen(waves)

    def pair(self, number: int, text: str, answer: str | None = None, audio: bool = True) -> Pair:
        content = [{"type": "audio"}] * audio + [{"type": "text", "text": text}]
        messages: list[Message] = [{"role": "user", "content": content}]
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        clips = [self.audios[number]]
        return self.model.render(self.tokenizer, messages, clips), clips

    def prompts(self) -> list[Pair]:
        return [self.pair(i, text) for i, text in enumerate(("what is it", "who", "describe the sound"))]

    def answered(self) -> list[Pair]:
        return [self.pair(0, "what is it", "a dog"), self.pair(1, "who", "nobody"), self.pair(2, "where", "here")]

    def batch(self, pairs: list[Pair], layout: Any = "right") -> Batch:
        return collate(pairs, self.tokenizer.pad_token_id, layout)

    def plain(self, ids: Tensor) -> Tensor:
        """What the backbone alone makes of one row, `(1, length)`."""
        self.model.injection.state = None  # type: ignore[union-attr]
        states = self.model.llm.get_decoder()(inputs_embeds=self.model.llm.get_input_embeddings()(ids), use_cache=False)
        hidden: Tensor = states.last_hidden_state
        return hidden


@pytest.fixture(params=BOTH)
def made(request: pytest.FixtureRequest) -> Made:
    return Made(request.param)


@pytest.mark.parametrize(("config", "name"), [(TINY_LLAMA, "layers"), (TINY_GPT2, "h"), (TINY_OPT, "layers")])
def test_layers_are_found_whatever_they_are_called(config: dict[str, Any], name: str) -> None:
    llm = load_llm(None, config)
    assert layers_of(llm) == list(getattr(llm.get_decoder(), name))


@torch.no_grad()
@pytest.mark.parametrize("name", BOTH)
def test_with_closed_gates_the_backbone_is_as_it_was(name: str) -> None:
    made = Made(name, gates=0.0)
    for pair in made.answered():
        batch = made.batch([pair])
        assert torch.allclose(made.model.hidden(batch), made.plain(batch.ids), atol=1e-6)


@torch.no_grad()
def test_with_open_gates_it_hears_the_clip(made: Made) -> None:
    batch = made.batch(made.answered()[:1])
    heard, plain = made.model.hidden(batch), made.plain(batch.ids)
    assert (heard - plain).abs().amax(-1).min() > 1e-3  # every token of the sample hears it
    other = made.batch([made.pair(1, "what is it", "a dog")])
    assert torch.equal(other.ids, batch.ids)
    assert (made.model.hidden(other) - heard).abs().max() > 1e-3


@torch.no_grad()
def test_samples_of_a_packed_row_hear_their_own_clip_or_none(made: Made) -> None:
    pairs = [*made.answered()[:2], made.pair(2, "say hello", "hello", audio=False), made.answered()[2]]
    assert [len(rendered.clip_at) for rendered, _ in pairs] == [1, 1, 0, 1]
    packed = made.batch(pairs, "packed")
    hidden = made.model.hidden(packed)[0]
    for number, pair in enumerate(pairs):
        alone = made.model.hidden(made.batch([pair]))[0]
        assert torch.allclose(hidden[packed.segments[0] == number + 1], alone, atol=1e-5), number
    silent = made.batch([pairs[2]])
    assert torch.allclose(hidden[packed.segments[0] == 3], made.plain(silent.ids)[0], atol=1e-5)


def generated(made: Made, pairs: list[Pair], beams: int) -> list[list[int]]:
    decoding = Decoding(beams=beams, max_new_tokens=8)
    return made.model.generate(made.batch(pairs, "left"), decoding, made.tokenizer, 8)


@torch.no_grad()
def test_with_a_cache_each_token_is_the_one_of_a_whole_pass(made: Made) -> None:
    pairs = made.prompts()
    answers = generated(made, pairs, beams=1)
    assert sum(map(len, answers)) > 12
    for (rendered, clips), ids in zip(pairs, answers, strict=True):
        start = len(rendered)
        hidden = made.model.hidden(made.batch([(rendered.tokens(ids), clips)]))[0, start - 1 : -1]
        logits = made.model.llm.get_output_embeddings()(hidden)
        assert logits.argmax(-1).tolist() == ids


@torch.no_grad()
def test_beams_hear_the_clip_of_their_own_prompt(made: Made) -> None:
    together = generated(made, made.prompts(), beams=3)
    assert together == [generated(made, [pair], beams=3)[0] for pair in made.prompts()]


def gradients(made: Made, recompute: bool) -> tuple[Tensor, Tensor]:
    """Of two batches whose backward pass comes behind both forward passes."""
    model = made.model
    model.freeze(("connector", "llm"))
    model.train()
    if recompute:
        model.llm.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    first, second, third = made.answered()
    loss = model(made.batch([first, second], "packed"))[0] + model(made.batch([third]))[0]
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", BOTH)
def test_layers_that_are_computed_again_read_what_they_read_at_first(name: str) -> None:
    loss, gradient = gradients(Made(name), recompute=False)
    again = Made(name)
    runs: list[str] = []
    for part, module in again.model.connector.named_modules():
        module.register_forward_pre_hook(lambda *_, part=part: runs.append(part))
    other, recomputed = gradients(again, recompute=True)
    assert torch.equal(loss, other)
    assert torch.allclose(gradient, recomputed, atol=1e-6 * float(gradient.abs().max()))
    if name == "audio_flamingo":  # its cross-attention is computed again as well: twice for each of the two batches
        assert runs.count("blocks.0") == runs.count("blocks.1") == 4


@pytest.mark.slow  # the compiler takes seconds
@torch.no_grad()
def test_compiled_layers_keep_their_own_hooks() -> None:
    """The first layer of this one has none; its compiled form must not be taken for the second, which has."""
    made = Made("mu_llama")
    batch = made.batch(made.answered())
    expected = made.model.hidden(batch)
    for layer in layers_of(made.model.llm):
        layer.compile(dynamic=True, backend="eager")
    assert torch.allclose(made.model.hidden(batch), expected, atol=1e-5)


def test_what_belongs_to_a_token_follows_beams_and_cache() -> None:
    per_token = torch.arange(6).reshape(2, 3)
    assert torch.equal(seen(per_token, torch.zeros(2, 3, 4)), per_token)
    assert seen(per_token, torch.zeros(4, 3, 4)).tolist() == [[0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5]]
    assert seen(per_token, torch.zeros(6, 1, 4)).tolist() == [[2], [2], [2], [5], [5], [5]]
    assert of_rows(per_token, 2) is per_token
    with pytest.raises(ValueError, match="a layer sees 2 tokens of 3; all or one were expected"):
        seen(per_token, torch.zeros(2, 2, 4))


def test_a_change_stands_before_the_module_and_ends_with_the_state() -> None:
    llm = load_llm(None, TINY_LLAMA)
    injection: Injection[Tensor] = Injection(llm)
    inputs: list[Tensor] = []
    layer = layers_of(llm)[1]
    norm = layer.get_submodule("input_layernorm")
    injection.add(layer, layer, lambda hidden, state: hidden + state)
    assert isinstance(norm, nn.Module)
    norm.register_forward_hook(lambda _, args, output: inputs.append(args[0]))
    embedded = torch.randn(1, 4, 32)
    decoder = llm.get_decoder()
    decoder(inputs_embeds=embedded, use_cache=False)
    injection.state = torch.full((1, 4, 1), 0.5)
    decoder(inputs_embeds=embedded, use_cache=False)
    injection.state = None
    decoder(inputs_embeds=embedded, use_cache=False)
    assert torch.allclose(inputs[1], inputs[0] + 0.5)
    assert torch.equal(inputs[2], inputs[0])
