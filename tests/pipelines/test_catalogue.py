"""What there is to run: the README's table is what the code says, and its figures are the published ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from models.architectures import load, names
from pipelines import catalogue
from pipelines.catalogue import BEGIN, COLUMNS, END, arxiv, markdown, short_number, token_rate, write_markdown
from pipelines.cli import app
from pipelines.systems import SYSTEMS

README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.fixture(scope="module")
def table() -> str:
    return markdown()


@pytest.fixture(scope="module")
def cells(table: str) -> dict[str, dict[str, str]]:
    """Rows by their system, cells by their column."""
    rows = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in table.splitlines()[2:]]
    return {row[0].partition(" (`")[0]: dict(zip(COLUMNS, row, strict=True)) for row in rows}


@pytest.mark.slow
def test_the_table_of_the_readme_is_what_the_code_says(table: str) -> None:
    text = README.read_text(encoding="utf-8")
    printed = text.partition(BEGIN)[2].partition(END)[0].strip()
    assert printed == table, "the README's table is old; run: .venv/bin/earloom architectures --into README.md"


@pytest.mark.slow
def test_every_system_of_the_list_has_a_row(cells: dict[str, dict[str, str]]) -> None:
    assert list(cells) == [system.name for system in SYSTEMS]
    assert len(cells) == len({row["arXiv"] for row in cells.values()}) == 26
    assert all(row["what it is"] for row in cells.values())
    planned = [row for row in cells.values() if row["state"] == "planned"]
    assert all(not row["stages"] and not row["importer"] for row in planned)
    running = [row for row in cells.values() if row["state"] == "runs"]
    assert all(all(row.values()) for row in running), "summary, encoder_name and connector_name belong to each class"
    assert {row["system"].rpartition(" (`")[2].removesuffix("`)") for row in running} == set(names())


def test_every_architecture_cites_a_paper_of_the_list() -> None:
    assert [name for name in names() if arxiv(load(name)) is None] == []
    assert len({arxiv(load(name)) for name in names()}) == len(names())


@pytest.mark.slow
def test_figures_are_the_published_ones(cells: dict[str, dict[str, str]]) -> None:
    assert cells["SALMONN"]["trained / total"].startswith("33.3 M / ")
    assert cells["SALMONN"]["audio tokens / s"] == "88 / clip"
    assert cells["SALMONN"]["backbone"] == "vicuna-13b-v1.1"
    assert cells["SALMONN"]["stages"] == "pretrain → instruct → activate"
    assert cells["FunASR-LLM"]["audio tokens / s"] == "300 / clip"  # 10 a second of a window of 30 s
    assert cells["FunASR-LLM"]["trained / total"].startswith("29.9 M / ")  # adaptor 21.50 M, LoRA 8.39 M
    assert cells["SpeechGPT"]["audio tokens / s"] == "≤ 50"  # 50 Hz before neighbouring duplicates are merged
    assert cells["SpeechGPT"]["trained / total"].startswith("6.75 B / ")
    assert {name: row["importer"] for name, row in cells.items() if row["importer"] == "yes"}.keys() >= {
        "SALMONN",
        "FunASR-LLM",
    }


def test_tokens_a_second_where_the_length_of_a_clip_counts() -> None:
    model = load("funasr_llm").on_meta(load("funasr_llm").preset("tiny"))
    encoder = model.encoder("speech")
    assert token_rate(model) == f"{(encoder.output_length(480_000) // 2) / 30:.3g}"
    model.spliced = False  # type: ignore[misc]
    assert token_rate(model) == "none"


@pytest.mark.parametrize(
    ("count", "text"),
    [(33_332_992, "33.3 M"), (999_400_000, "999 M"), (999_600_000, "1.00 B"), (6_746_656_768, "6.75 B")],
)
def test_three_digits(count: int, text: str) -> None:
    assert short_number(count) == text


@pytest.mark.slow
def test_the_table_is_put_between_its_marks(tmp_path: Path, table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "markdown", lambda: table)
    document = tmp_path / "x.md"
    document.write_text(f"# Before\n{BEGIN}\nold\n{END}\nafter {END}\n")
    for _ in range(2):
        write_markdown(document)
        assert document.read_text() == f"# Before\n{BEGIN}\n\n{table}\n\n{END}\nafter {END}\n"
    document.write_text(f"{END} {BEGIN}")
    with pytest.raises(ValueError, match=r"x\.md has no .*begin.*followed by"):
        write_markdown(document)


@pytest.mark.slow
def test_the_command_prints_it(table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "markdown", lambda: table)
    assert CliRunner().invoke(app, ["architectures", "--markdown"]).output == table + "\n"
