"""The card's text and the digests of where a model comes from."""

from __future__ import annotations

import subprocess
from pathlib import Path

import yaml

from components.digest import digest
from components.evaluation.metrics import Hypothesis, score
from components.registry.card import CardData, model_card
from components.registry.lineage import code, code_digest, lineage, packages
from components.schema import AudioManifest, FeatureManifest

AUDIO = AudioManifest(
    dataset="mini", version="0123456789ab", digest="a" * 64, shards=(), samples=60, seconds=456.0, rejected=2,
    splits={"train": 40}, config={}, sources=("LibriSpeech | <b>mini</b>",), licences={"CC-BY-4.0": 60},
)  # fmt: skip
FEATURES = FeatureManifest(
    fingerprint="f" * 16, key={"encoder": "moonshine"}, dataset="mini", version="0123456789ab", audio_digest="a" * 64,
    digest="b" * 64, shards=(), samples=60, frames=9000, width=288,
)  # fmt: skip


def card(**fields: object) -> CardData:
    known = {
        "name": "slam-asr", "architecture": "slam_asr", "preset": "small", "about": "A frozen encoder.",
        "paper": "arXiv 2402.08846", "licence": "Apache-2.0", "languages": ("en",), "tasks": ("asr", "label:emotion"),
        "parameters": 163_000_000, "trainable": 1_200_000, "version": "3",
        "deviations": ("Moonshine instead of HuBERT",),
    }  # fmt: skip
    return CardData.model_validate(known | fields)


def test_the_card_has_front_matter_licences_results_and_use() -> None:
    rows = [Hypothesis(key="k", task="asr", split="test", reference="a b", hypothesis="a c", before="")]
    rows += [
        Hypothesis(key=f"l{i}", task="label:emotion", split="test", reference=t, hypothesis="anger")
        for i, t in enumerate(("anger", "fear"))
    ]
    scores = score(rows)
    text = model_card(
        card(), [AUDIO], scores, score([rows[0].model_copy(update={"hypothesis": ""})]), {"digest": "d" * 64}
    )
    _, front, body = text.split("---\n", 2)
    said = yaml.safe_load(front)
    assert said["license"] == "apache-2.0"
    assert said["language"] == ["en"]
    assert said["metrics"] == ["accuracy", "wer"]
    assert said["pipeline_tag"] == "automatic-speech-recognition"
    assert "slam_asr" in said["tags"]
    assert "| asr | test | 1 | WER | 50.0 % | – | 100.0 % |" in body
    assert "CC-BY-4.0 (60)" in body
    assert "LibriSpeech \\| \\<b\\>mini" in body
    assert "earloom listen slam-asr/3 recording.wav" in body
    assert "0.13 hours" in body
    assert "no better than always answering" in body
    assert "Moonshine instead of HuBERT" in body
    assert "163,000,000, 1,200,000 of them trained" in body
    assert text == model_card(
        card(), [AUDIO], scores, score([rows[0].model_copy(update={"hypothesis": ""})]), {"digest": "d" * 64}
    )


def test_a_card_without_data_or_scores_still_says_so() -> None:
    text = model_card(card(deviations=(), version="", reconstruction=True), [])
    assert "Not evaluated." in text
    assert "Not stated." in text
    assert "None are known." in text
    assert "A reconstruction" in text


def test_lineage_names_everything_and_is_stable() -> None:
    first = lineage([AUDIO], [FEATURES], {"seed": 0}, {"earloom/moonshine-tiny-en": "c" * 64})
    assert first == lineage([AUDIO], [FEATURES], {"seed": 0}, {"earloom/moonshine-tiny-en": "c" * 64})
    assert first["data"][0]["digest"] == "a" * 64
    assert first["features"][0]["audio_digest"] == "a" * 64
    assert first["recipe"]["digest"] == digest({"seed": 0})
    assert len(first["code"]["digest"]) == 64
    assert first["packages"]["torch"]
    assert first["digest"] != lineage([AUDIO], [], {"seed": 0})["digest"]
    assert (
        first["digest"] != lineage([AUDIO], [FEATURES], {"seed": 1}, {"earloom/moonshine-tiny-en": "c" * 64})["digest"]
    )


def test_the_code_digest_sees_every_change_of_a_source(tmp_path: Path) -> None:
    def tree(name: str, files: dict[str, str]) -> str:
        for path, text in files.items():
            file = tmp_path / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return code_digest(tmp_path / name)

    base = tree("a", {"models/x.py": "1", "infra/y.py": "2"})
    assert tree("b", {"models/x.py": "1", "infra/y.py": "2", "models/notes.txt": "n", "tests/z.py": "3"}) == base
    assert tree("c", {"models/x.py": "12", "infra/y.py": ""}) != base
    assert tree("d", {"models/w.py": "1", "infra/y.py": "2"}) != base


def test_the_commit_is_that_of_this_checkout_only(tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "x.py").write_text("1")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], check=True)
    clean = code(tmp_path)
    assert clean["commit"]
    assert len(clean["commit"]) == 40
    assert clean["changed"] is False
    (tmp_path / "models" / "x.py").write_text("2")
    assert code(tmp_path)["changed"] is True
    assert code(tmp_path / "models") == {"commit": None, "changed": None, "digest": code_digest(tmp_path / "models")}


def test_packages_that_are_not_installed_are_left_out() -> None:
    assert list(packages(["numpy", "no-such-package-here"])) == ["numpy"]
