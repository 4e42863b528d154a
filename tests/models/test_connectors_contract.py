"""What every connector promises: the count it announces, and nothing of what lies behind a clip's end."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from models.connectors.conv_bottleneck import ConvBottleneck, JoinedBranches
from models.connectors.gated_cross_attention import AudioTransformer
from models.connectors.linear import LinearProjector
from models.connectors.prefix_mapper import TransformerMapper
from models.connectors.stacking import StackMLP
from models.connectors.tltr import TLTR
from models.connectors.transformer import TransformerAdapter
from models.connectors.window_qformer import WindowQFormer
from models.connectors.zero_adapter import ZeroAdapter

WIDTH = 12
CONNECTORS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: LinearProjector(WIDTH, 6),
    "linear, pool 3, drop": lambda: LinearProjector(WIDTH, 6, pool=3, norm="plain"),
    "linear, pool 3, keep": lambda: LinearProjector(WIDTH, 6, pool=3, norm="affine", drop_remainder=False),
    "stack, drop": lambda: StackMLP(WIDTH, 4, 5, 6),
    "stack, one layer, pad": lambda: StackMLP(WIDTH, 4, None, 6, drop_remainder=False),
    "window Q-Former, one stream": lambda: WindowQFormer((WIDTH,), 3, 2, 1, 8, 2, 6),
    "TLTR": lambda: TLTR(3, 4, 6, time_heads=1, layer_heads=2),
    "convolutions": lambda: ConvBottleneck(WIDTH, 8, 6, channels=4, bottleneck=3),
    "convolutions over layers": lambda: ConvBottleneck(4, 8, 6, channels=4, bottleneck=3, layers=3),
    "prompt mapper": lambda: TransformerMapper(WIDTH, WIDTH, 3, layers=2, heads=2, sequence=True),
    "window transformer": lambda: AudioTransformer(WIDTH, layers=2, heads=2, ffn=8, positions=16),
    "one vector": lambda: ZeroAdapter(3, 4, 8, layers=4, heads=2, adapted=3, blocks=1),
    "adapter": lambda: TransformerAdapter(WIDTH, 2, 2, 10, 6),
    "adapter, causal, stride 2": lambda: TransformerAdapter(WIDTH, 2, 2, 10, 6, hidden=8, stride=2, causal=True),
}
LENGTHS = (1, 3, 7, 10)


@pytest.fixture(params=CONNECTORS)
def connector(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    made = CONNECTORS[request.param]().eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)  # biases and gates too: a zero bias would hide what padding leaks
    return made


@torch.no_grad()
def test_tokens_do_not_depend_on_the_batch_or_on_what_lies_behind_the_end(connector: nn.Module) -> None:
    clips = [torch.randn(n, WIDTH) for n in LENGTHS]
    padded = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True, padding_value=float("nan"))
    together, counts = connector(nn.functional.pad(padded, (0, 0, 0, 2), value=50.0), torch.tensor(LENGTHS))
    for row, clip, count in zip(together, clips, counts.tolist(), strict=True):
        alone, own = connector(clip[None], torch.tensor([len(clip)]))
        assert own.tolist() == [count]
        assert torch.allclose(row[:count], alone[0, :count], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("frames", range(1, 14))
def test_a_connector_gives_as_many_tokens_as_it_says(connector: nn.Module, frames: int) -> None:
    tokens, counts = connector(torch.randn(1, frames, WIDTH), torch.tensor([frames]))
    assert tokens.shape[:2] == (1, connector.tokens(frames))  # type: ignore[operator]
    assert counts.tolist() == [connector.tokens(frames)]  # type: ignore[operator]


def test_gradients_reach_frames_of_the_clip_and_none_behind_it(connector: nn.Module) -> None:
    frames = torch.randn(2, 9, WIDTH, requires_grad=True)
    tokens, counts = connector(frames, torch.tensor([9, 4]))
    sum(
        (row[:count] * torch.randn(count, row.shape[1])).sum() for row, count in zip(tokens, counts, strict=True)
    ).backward()
    assert frames.grad is not None
    assert float(frames.grad[1, 4:].abs().max()) == 0
    assert float(frames.grad[1, :2].abs().max()) > 0


@torch.no_grad()
@pytest.mark.parametrize(("audio", "wavlm", "tokens"), [(8, 8, 2), (9, 8, 2), (9, 12, 3), (1, 30, 1)])
def test_joined_branches_are_trimmed_to_the_shorter(audio: int, wavlm: int, tokens: int) -> None:
    first, second = ConvBottleneck(WIDTH, 8, 6, 4, 3), ConvBottleneck(5, 4, 6, 4, 3)
    joined = JoinedBranches(first, second, 10)
    assert joined.tokens(audio, wavlm) == tokens
    one, other = torch.randn(2, audio, WIDTH), torch.randn(2, wavlm, 5)
    lengths = torch.tensor([audio, 1]), torch.tensor([wavlm, 1])
    out, counts = joined(one, other, *lengths)
    assert out.shape == (2, tokens, 10)
    assert counts.tolist() == [tokens, 1]
    halves = torch.cat([first(one, lengths[0])[0][:, :tokens], second(other, lengths[1])[0][:, :tokens]], dim=-1)
    assert torch.equal(out, joined.wavlm_audio_proj(halves))


def test_a_stream_without_a_name_or_a_length_is_refused() -> None:
    with pytest.raises(ValueError, match="3 widths"):
        WindowQFormer((4, 4, 4), 3, 1, 1, 8, 2, 6)
    frames = torch.randn(1, 3, 4)
    with pytest.raises(ValueError, match="speech, audio; got 2 tensors"):
        WindowQFormer((4, 4), 3, 1, 1, 8, 2, 6)(frames, torch.tensor([3]))
