"""Connectors: token counts, the remainder, and nothing leaking from padding."""

from __future__ import annotations

import pytest
import torch

from models.alignment import connector_ctc
from models.connectors.stacking import StackMLP
from models.connectors.window_qformer import WindowQFormer


@pytest.mark.parametrize(("frames", "tokens"), [(1, 1), (4, 1), (5, 1), (9, 1), (10, 2), (1500, 300)])
def test_stacking_drops_the_remainder_but_never_the_clip(frames: int, tokens: int) -> None:
    connector = StackMLP(width=8, stack=5, hidden=6, out=4)
    out, counts = connector(torch.randn(1, frames, 8), torch.tensor([frames]))
    assert out.shape == (1, tokens, 4)
    assert counts.tolist() == [tokens] == [connector.tokens(frames)]


def test_stacked_tokens_do_not_depend_on_the_batch() -> None:
    connector = StackMLP(width=8, stack=3, hidden=6, out=4)
    clips = [torch.randn(n, 8) for n in (2, 7, 12)]
    padded = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
    together, counts = connector(padded, torch.tensor([2, 7, 12]))
    for row, clip, count in zip(together, clips, counts.tolist(), strict=True):
        alone, _ = connector(clip[None], torch.tensor([len(clip)]))
        assert torch.allclose(row[:count], alone[0], atol=1e-6)


def qformer(window: int = 17) -> WindowQFormer:
    torch.manual_seed(0)
    return WindowQFormer((12, 8), window=window, queries=1, layers=2, hidden=16, heads=2, out=10).eval()


def test_1500_frames_are_88_windows_of_17_and_four_frames_are_dropped() -> None:
    speech, audio = torch.randn(1, 1500, 12), torch.randn(1, 500, 8)
    lengths = (torch.tensor([1500]), torch.tensor([500]))
    tokens, counts = qformer()(speech, audio, *lengths)
    assert tokens.shape == (1, 88, 10)
    assert counts.tolist() == [88]
    speech[:, 1496:] = 99.0
    assert torch.equal(qformer()(speech, audio, *lengths)[0], tokens)


def test_padding_behind_the_shorter_stream_is_zero_after_its_layer_norm() -> None:
    """What lies in the padding must not matter, though the LayerNorm has a bias."""
    connector = qformer()
    with torch.no_grad():
        connector.ln_audio.bias.fill_(3.0)
    speech, audio = torch.randn(1, 68, 12), torch.randn(1, 40, 8)
    lengths = (torch.tensor([68]), torch.tensor([20]))
    before, _ = connector(speech, audio, *lengths)
    audio[:, 20:] = 50.0
    assert torch.equal(connector(speech, audio, *lengths)[0], before)


def test_each_token_sees_its_own_window_only() -> None:
    connector, speech, audio = qformer(), torch.randn(1, 51, 12), torch.randn(1, 51, 8)
    lengths = (torch.tensor([51]), torch.tensor([51]))
    before, _ = connector(speech, audio, *lengths)
    speech[:, 17:34] = torch.randn(1, 17, 12)
    after, _ = connector(speech, audio, *lengths)
    changed = (before != after).any(-1)[0].tolist()
    assert changed == [False, True, False]


def test_ctc_is_nearly_zero_for_the_embeddings_of_the_labels_and_large_for_others() -> None:
    table = torch.nn.functional.normalize(torch.randn(20, 32, generator=torch.Generator().manual_seed(1)), dim=-1)
    vocabulary, blank = torch.tensor([0, 3, 7, 11]), 0
    right = table[torch.tensor([[3, 0, 7, 11]])]
    arguments = (torch.tensor([4]), [torch.tensor([3, 7, 11])], table, vocabulary, blank)
    good = float(connector_ctc(right * 2, *arguments))
    bad = float(connector_ctc(table[torch.tensor([[11, 11, 3, 3]])] * 2, *arguments))
    assert good < 0.01
    assert bad > 10


def test_ctc_counts_no_clip_that_cannot_be_aligned() -> None:
    table = torch.randn(20, 8)
    loss = connector_ctc(
        torch.randn(1, 2, 8), torch.tensor([2]), [torch.tensor([3, 7, 11])], table, torch.tensor([0, 3, 7, 11]), 0
    )
    assert float(loss) == 0.0
