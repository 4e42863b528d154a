"""An architecture that nobody named anywhere: one file in the folder, and every contract test runs on it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from models.architectures import names

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

FILE = '''"""Made up for a test: mean over four frames, one linear layer, the request behind the audio."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from models.connectors.linear import LinearProjector
from models.contract import SpeechLLM, SpeechLLMConfig
from models.encoders.base import EncoderSpec
from models.preset import Backbone, LoRA, Preset, PresetName
from models.recipe import Decoding, Optimiser, Recipe, Stage
from models.rendering import Audio, Message, Rendered, answer_text, user_text
from models.sizes import MOONSHINE_TINY_RANDOM, TINY_LLAMA


class MadeUpConfig(SpeechLLMConfig):
    model_type = "earloom_made_up"


class MadeUp(SpeechLLM):
    config_class = MadeUpConfig
    title = "Made up"
    paper = "none"
    code = "none"

    @classmethod
    def preset(cls, name: PresetName) -> Preset:
        learn = Stage(name="learn", train=("connector", "lora"), optimiser=Optimiser(lr=1e-3), max_steps=3)
        return Preset(
            encoders={"speech": EncoderSpec(kind="moonshine", config=MOONSHINE_TINY_RANDOM)},
            backbone=Backbone(config=TINY_LLAMA),
            lora=LoRA(rank=2),
            recipe=Recipe(stages=[learn], decoding=Decoding(max_new_tokens=4)),
        )

    def build_connector(self, preset: Preset, llm_width: int) -> nn.Module:
        return LinearProjector(32, llm_width, pool=4)

    def audio_tokens(self, frames: dict[str, int]) -> int:
        return self.connector.tokens(frames["speech"])

    def connect(self, features: dict[str, Tensor], lengths: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self.connector(features["speech"], lengths["speech"])

    def render(self, tokenizer: PreTrainedTokenizerBase, messages: list[Message], clips: Sequence[Audio]) -> Rendered:
        rendered = Rendered().audio(self.audio_tokens(clips[0].frames), filler=0)
        rendered.text(tokenizer, user_text(messages) + " ")
        answer = answer_text(messages)
        if answer is None:
            return rendered
        return rendered.text(tokenizer, answer, learn=True).tokens([tokenizer.eos_token_id], learn=True)
'''
PLUGIN = """import os
import models.architectures
models.architectures.__path__.append(os.environ["MADE_UP"])
"""


def test_one_file_is_all_that_a_new_architecture_takes(tmp_path: Path) -> None:
    folder = tmp_path / "architectures"
    folder.mkdir()
    (folder / "made_up.py").write_text(FILE)
    (tmp_path / "more_architectures.py").write_text(PLUGIN)
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    gates = ROOT / "tests" / "contract" / "test_gates.py"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "more_architectures",
            "-p",
            "no:cacheprovider",
            "-q",
            "-k",
            "made_up",
            gates,
        ],
        env=os.environ | {"PYTHONPATH": path, "MADE_UP": str(folder)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    tests = len(re.findall(r"^def test_\w+\(subject", gates.read_text(), re.MULTILINE))
    assert passed is not None and int(passed[1]) == tests >= 19
    assert "made_up" not in names()
