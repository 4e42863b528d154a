"""An explained batch for people: coloured in the terminal, and as one HTML page that loads nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from components.batching.explain import PADDING, Explained, Token, harmless, samples_in
from components.evaluation.page import facts, page, percent, section, table
from components.evaluation.plots import number

GUTTER = 6  # columns before a line of tokens, for the position of its first one
STYLES = {  # of the terminal: span, learnt → style; ground and ink are both set, so that light terminals work too
    ("text", True): "bold #ffffff on #1b7a4b",
    ("unit", True): "bold #ffffff on #8a3f96",
    ("audio", True): "bold #ffffff on #b3362f",
    ("text", False): "dim",
    ("unit", False): "magenta",
    ("audio", False): "cyan",
    ("padding", False): "dim",
}
LAYOUTS = {"right": "padded on the right", "left": "padded on the left", "packed": "packed in one row"}
CSS = """
.row { background: var(--card); border: 1px solid var(--rule); border-radius: 14px; padding: 6px 18px 16px;
  margin: 14px 0; }
.row h3 { margin: 12px 0 8px; overflow-wrap: anywhere; }
.row h3 small { color: var(--soft); font-weight: 450; font-size: .86rem; margin-left: 10px; }
.chips { display: flex; flex-wrap: wrap; gap: 4px 3px; font: .84rem/1.45 ui-monospace, "SF Mono", Menlo, Consolas,
  monospace; }
.chip { padding: 1px 5px; border-radius: 5px; cursor: default; overflow-wrap: anywhere; color: var(--soft);
  border: 1px solid transparent; white-space: pre-wrap; }
.chip:hover { outline: 2px solid var(--c0); }
.chip.text { border-color: var(--rule); }
.chip.audio { color: var(--c0); background: color-mix(in srgb, var(--c0) 9%, transparent); }
.chip.unit { color: var(--c3); background: color-mix(in srgb, var(--c3) 8%, transparent); }
.chip.learnt { font-weight: 650; color: var(--good); background: var(--goodwash);
  border-color: color-mix(in srgb, var(--good) 45%, transparent); }
.chip.unit.learnt { color: var(--c3); background: color-mix(in srgb, var(--c3) 22%, transparent);
  border-color: color-mix(in srgb, var(--c3) 55%, transparent); }
.chip.audio.learnt { color: var(--bad); background: var(--badwash); }
.chip.padding { padding: 1px 2px; }
.legend .chip { margin-right: 7px; font: .8rem ui-monospace, Menlo, Consolas, monospace; }
"""


def how_learnt(explained: Explained) -> str:
    """How the labels enter the loss, in words."""
    whole = explained.labels_in_global_batch
    share = f"1/{whole}: the loss is the mean over the {whole} labels of the global batch" if whole else "nothing"
    if explained.loss == "ctc":
        return (
            "CTC: the labels belong to a clip as a whole, not to positions. What the connector makes of the clip's "
            "audio positions is aligned with the coloured tokens, in their order; the backbone is not run, nothing "
            f"else of the row is read, and the end token is the blank. Each label weighs {share}."
        )
    return (
        "A coloured token at position p is what the model must predict there, from the positions before it: the "
        "logit that is scored against it is the one at p − 1. The first token of a sample is never predicted. "
        f"Each label weighs {share}."
    )


# ---- the terminal -----------------------------------------------------------------------------------------------


def show(explained: Explained, console: Console) -> None:
    """Print rows of tokens, the parameter groups and the encoder lengths; without colours labels stand in ⟦ ⟧."""
    marked = console.color_system is None or console.no_color
    console.print()
    console.print(_headline(explained))
    console.print(Text(how_learnt(explained), style="dim"))
    console.print()
    for sample, words in _legend(explained):
        chip = _chip(sample, marked)
        console.print(Text.assemble("  ", chip, " " * max(1, 8 - cell_len(chip.plain)), words))
    console.print(Text("  number  position of a line's first token", style="dim"))
    for r, row in enumerate(explained.rows, start=1):
        for segment, tokens in samples_in(row):
            console.print()
            console.print(Text.assemble((_key(explained, segment), "bold"), (f"  {_about(tokens, r)}", "dim")))
            for line in _lines(tokens, console.width - GUTTER - 1, marked):
                console.print(line, overflow="fold")
    for title, head, cells, numeric in _tables(explained):
        console.print()
        console.print(_terminal_table(title, head, cells, numeric))


def _headline(explained: Explained) -> Text:
    line = Text.assemble("stage ", (explained.stage, "bold"), "  ")
    for name, value in _totals(explained):
        unbroken = value.replace("\u202f", "")  # rich breaks lines there too
        line.append(f" {name} ", style="dim").append(unbroken, style="bold").append(" ")
    return line


def _chip(token: Token, marked: bool) -> Text:
    learnt = token.label is not None
    text = f"⟦{_both(token)}⟧" if marked and learnt else _both(token)
    return Text(text, style=STYLES[token.span, learnt])


def _lines(tokens: Sequence[Token], width: int, marked: bool) -> Iterator[Text]:
    """Tokens with a space between, broken at `width`; each line starts with the position of its first token."""
    line, used = Text(), width
    for token in tokens:
        chip = _chip(token, marked)
        size = cell_len(chip.plain) + 1
        if used + size > width:
            if line:
                yield line
            position = "" if token.span == "padding" else str(token.position)
            line, used = Text.assemble((f"{position:>{GUTTER - 1}} ", "dim")), 0
        line.append_text(chip).append(" ")
        used += size
    yield line


def _terminal_table(title: str, head: Sequence[str], cells: Iterable[Sequence[str]], numeric: Sequence[int]) -> Table:
    shown = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left", title_style="bold")
    for i, name in enumerate(head):
        shown.add_column(name, justify="right" if i in numeric else "left", overflow="fold")
    for row in cells:
        shown.add_row(*(Text(cell) for cell in row), style="dim" if "frozen" in row else "")
    return shown


# ---- the page ---------------------------------------------------------------------------------------------------


def explain_page(explained: Explained) -> str:
    """A whole HTML document: tokens as chips with everything about them as hover titles, and the same as tables."""
    rows = "".join(_row(explained, r, row) for r, row in enumerate(explained.rows, start=1))
    tables = [(title, table(head, cells, numeric)) for title, head, cells, numeric in _tables(explained)]
    body = (
        f"<style>{CSS}</style>"
        f'<header><p class="eyebrow">earloom explain</p><h1>What stage {escape(explained.stage)} learns</h1>'
        f"{facts(_totals(explained))}</header>"
        f"<p>{escape(how_learnt(explained))}</p>{_page_legend(explained)}{rows}"
        + "".join(section(f"table{i}", title, inside) for i, (title, inside) in enumerate(tables))
        + section("tokens", "Every token", _token_tables(explained))
    )
    return page(f"{explained.stage}: what is learnt", body)


def _row(explained: Explained, r: int, row: Sequence[Token]) -> str:
    parts = []
    for segment, tokens in samples_in(row):
        key = _key(explained, segment)
        chips = "".join(_page_chip(token, _title(token, key, explained.loss)) for token in tokens)
        heading = f"<h3>{escape(key)}<small>{escape(_about(tokens, r))}</small></h3>"
        parts.append(f'{heading}<div class="chips">{chips}</div>')
    return f'<div class="row">{"".join(parts)}</div>'


def _page_chip(token: Token, title: str = "") -> str:
    learnt = " learnt" if token.label is not None else ""
    hover = f' title="{escape(title)}"' if title else ""
    return f'<span class="chip {token.span}{learnt}"{hover}>{escape(_both(token))}</span>'


def _title(token: Token, key: str, loss: str) -> str:
    if token.span == "padding":
        return "padding"
    where = f"position {token.position} of segment {token.segment}, {key}"
    first = f"{token.text}   id {token.id}, {token.span}\n{where}\n"
    if token.label is None:
        return f"{first}masked: nothing is learnt here, weight 0"
    by = "aligned by CTC with the clip's audio" if loss == "ctc" else f"predicted at position {token.position - 1}"
    return f"{first}label: {token.label}, {by}\nweight {number(token.weight)}"


def _page_legend(explained: Explained) -> str:
    items = "".join(f"<li>{_page_chip(sample)}{escape(words)}</li>" for sample, words in _legend(explained))
    return f'<ul class="legend">{items}<li>hover over a token for all that is known of it</li></ul>'


def _token_tables(explained: Explained) -> str:
    head = ("position", "segment", "id", "text", "span", "label", "predicted at", "weight")
    parts = []
    for r, row in enumerate(explained.rows, start=1):
        for segment, tokens in samples_in(row):
            cells = [_cells(token, explained.loss) for token in tokens if token.span != "padding"]
            summary = f"{escape(_key(explained, segment))}: {escape(_about(tokens, r))}"
            opened = " open" if len(explained.keys) == 1 else ""
            inside = table(head, cells, numeric=(0, 1, 2, 6, 7))
            parts.append(f"<details{opened}><summary>{summary}</summary>{inside}</details>")
    return "".join(parts)


def _cells(token: Token, loss: str) -> list[str]:
    learnt = token.label is not None
    at = "–" if not learnt or loss == "ctc" else str(token.position - 1)
    label = token.label if token.label is not None else "masked"
    weight = number(token.weight)
    return [str(token.position), str(token.segment), str(token.id), token.text, token.span, label, at, weight]


# ---- what both say ------------------------------------------------------------------------------------------------


def _both(token: Token) -> str:
    """The text of a token, and its label too where that is another one (as it never should be)."""
    return token.text if token.label in (None, token.text) else f"{token.text}→{token.label}"


def _key(explained: Explained, segment: int) -> str:
    return harmless(explained.keys[segment - 1]) if segment else "(padding)"


def _about(tokens: Sequence[Token], row: int) -> str:
    held = [token for token in tokens if token.span != "padding"]
    learnt = [token for token in held if token.label is not None]
    share = f", weight {percent(sum(token.weight for token in learnt))}" if learnt else ""
    segment = f", segment {held[0].segment}" if held else ""
    return f"row {row}{segment}: {len(held)} tokens, {len(learnt)} labels{share}"


def _totals(explained: Explained) -> list[tuple[str, str]]:
    labels = f"{explained.labels:,}"
    if explained.labels != explained.labels_in_global_batch:
        labels += f" of {explained.labels_in_global_batch:,}"
    return [
        ("loss", "CTC" if explained.loss == "ctc" else "next token"),
        ("samples", str(len(explained.keys))),
        ("layout", LAYOUTS[explained.layout]),
        ("tokens", f"{explained.tokens:,}"),
        ("padding", percent(explained.padding)),
        ("labels", labels),
    ]


def _legend(explained: Explained) -> list[tuple[Token, str]]:
    """A sample token and what its look means, for the looks that the batch has."""
    looks = {(token.span, token.label is not None) for row in explained.rows for token in row}
    unused = "not used" if explained.loss == "ctc" else "read only (masked)"
    words = {
        ("text", True): "text, learnt",
        ("unit", True): "speech unit, learnt",
        ("audio", True): "audio with a label: a mistake",
        ("text", False): f"text, {unused}",
        ("unit", False): f"speech unit, {unused}",
        ("audio", False): "audio from the connector: clip · position",
        ("padding", False): "padding",
    }
    signs = {"text": "token", "unit": "<7>", "audio": "♪1·7", "padding": PADDING}
    return [
        (Token(signs[span], 0, span, 0, 0, signs[span] if learnt else None, 0.0), said)  # type: ignore[arg-type]
        for (span, learnt), said in words.items()
        if (span, learnt) in looks
    ]


def _tables(explained: Explained) -> Iterator[tuple[str, Sequence[str], list[list[str]], Sequence[int]]]:
    """Title, head, cells and numeric columns of the tables below the tokens."""
    if explained.alignments:
        cells = [
            [
                *(
                    _key(explained, each.segment),
                    str(each.segment),
                    " ".join(each.labels),
                    str(len(each.labels)),
                    str(each.needed),
                ),
                str(each.positions) if each.needed <= each.positions else f"{each.positions}: too few, no loss",
            ]
            for each in explained.alignments
        ]
        head = ("sample", "segment", "labels", "count", "positions needed", "there are")
        yield "What CTC aligns", head, cells, (1, 3, 4, 5)
    if explained.groups:
        cells = [
            [g.name, f"{g.tensors:,}", f"{g.parameters:,}", "learns" if g.trainable else "frozen", _rate(g.rate)]
            for g in explained.groups
        ]
        total, learning = (sum(g.parameters for g in explained.groups if g.trainable or every) for every in (1, 0))
        tensors = sum(g.tensors for g in explained.groups)
        share = f"{learning:,} learn ({percent(learning / total)})"
        cells.append(["all", f"{tensors:,}", f"{total:,}", share, ""])
        yield "Parameter groups", ("group", "tensors", "parameters", "state", "peak learning rate"), cells, (1, 2, 4)
    if explained.lengths:
        roles = list(explained.lengths[0].frames)
        cells = [
            [
                _key(explained, clip.segment),
                str(clip.segment),
                *(str(clip.frames[role]) for role in roles),
                str(clip.tokens),
            ]
            for clip in explained.lengths
        ]
        taken = "audio tokens" if roles else "unit tokens"
        columns = ("sample", "segment", *(f"{role} frames" for role in roles), taken)
        yield "Encoder lengths", columns, cells, range(1, len(columns))


def _rate(rate: float | None) -> str:
    return "–" if rate is None else number(rate)
