"""The benchmarks' own arithmetic, and that the one for cards runs without one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from measuring import Comparison, interleaved, verdict

HERE = Path(__file__).parent


def test_ways_take_turns_there_and_back() -> None:
    order: list[str] = []
    ways = {name: (lambda name=name: float(order.append(name) or len(order))) for name in ("a", "b")}
    assert interleaved(ways, 2) == {"a": [1.0, 4.0, 5.0, 8.0], "b": [2.0, 3.0, 6.0, 7.0]}
    assert "".join(order) == "abbaabba"


def test_a_ratio_is_the_median_over_neighbours() -> None:
    compared = Comparison(base=[1.0, 2.0, 1.0, 1.0], other=[3.0, 8.0, 2.0, 9.0])
    assert compared.ratio == pytest.approx(3.5)  # of 3, 4, 2, 9
    assert compared.drift == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("ratio", "drift", "at_most", "code", "said"),
    [
        (2.0, 1.0, False, 0, ": met"),
        (1.9, 1.0, False, 1, ": MISSED"),
        (1.9, 1.0, True, 0, ": met"),
        (2.1, 1.0, True, 1, ": MISSED"),
        (9.0, 1.3, False, 1, "NOT MEASURED: two runs of the base differ by 30%"),
    ],
)
def test_a_bar_is_missed_or_met_and_not_by_luck(
    ratio: float, drift: float, at_most: bool, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verdict("speed", ratio, 2.0, drift, at_most) == code
    assert said in capsys.readouterr().out


@pytest.mark.slow
def test_the_one_for_cards_runs_on_any_device(tmp_path: Path) -> None:
    table = tmp_path / "table.md"
    command = [sys.executable, str(HERE / "cuda_training.py"), "--tiny", "--steps", "5", "--budget", "512"]
    done = subprocess.run([*command, "--variants", "plain", "--out", str(table)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert table.read_text() in done.stdout
    lines = [line for line in table.read_text().splitlines() if line.startswith("| tiny")]
    assert len(lines) == 1
    speed = re.search(r"\| plain \| ([\d,]+) \|", lines[0])
    assert speed is not None
    assert float(speed[1].replace(",", "")) > 0
    assert lines[0].endswith("| 0.0% |")  # no padding
