"""Which of two models is the better one, and how an alias moves between versions and back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from components.digest import digest
from components.evaluation.metrics import Hypothesis, flat, score
from components.registry import alias_history
from components.registry.alias_history import History, Move, Raced, move_alias, read_history
from components.registry.evaluation_record import evaluation_record, read_evaluation
from components.registry.mlflow_client import connected
from components.registry.mlflow_registry import DIGEST_TAG, Entry, catalogue, find, find_entry, register
from components.registry.model_folder import checked, manifest_files
from components.registry.names import refuse_champion
from components.registry.promotion import NotComparable, compare
from components.registry.records import Link
from infra import storage
from tests.registry.promotion_helpers import DATA, add_version, answers, model_folder

# ---- comparing ------------------------------------------------------------------------------------------------------


def test_the_record_counts_as_the_scores_do_and_tells_no_sentence() -> None:
    rows = [
        *answers((0, 5), 10),
        Hypothesis(key="z", task="asr", split="test", language="zh", reference="你好", hypothesis="你", before="x"),
        Hypothesis(key="l", task="label:mood", split="test", reference="joy", hypothesis="fear", choice="joy"),
        Hypothesis(key="m", task="label:mood", split="test", reference="joy", hypothesis="joy", choice="joy"),
    ]
    record, scores = evaluation_record(DATA, rows), flat(score(rows))
    for metric in record.metrics():
        found, name = record.find(metric)
        assert found.rate(name) == pytest.approx(scores[metric]), metric
    assert set(record.metrics()) >= {"asr/test/wer", "asr/test/cer", "label:mood/test/choice"}
    assert record.find("asr/test/wer")[0].clips == 11
    text = record.model_dump_json()
    assert "radio" not in text
    assert "clip-0" not in text
    assert evaluation_record(DATA, rows[::-1]).find("asr/test/wer") == record.find("asr/test/wer")
    with pytest.raises(LookupError, match="no asr/dev/wer was measured; there are: asr/test/wer"):
        record.find("asr/dev/wer")


def test_the_margin_decides_and_the_shortfall_is_a_number() -> None:
    old, new = evaluation_record(DATA, answers(range(16))), evaluation_record(DATA, answers(range(8)))
    verdict = compare(new, old, margin=0.05)  # 8 of 160 words against 16: 5 points better
    assert (verdict.passed, verdict.clips) == (True, 40)
    assert (verdict.value, verdict.other, verdict.gain) == pytest.approx((0.05, 0.1, 0.05))
    short = compare(new, old, margin=0.06)
    assert not short.passed
    assert "falls short by 1.00 points" in short.said()
    assert compare(new, old, margin=0.5, relative=True).passed
    assert not compare(new, old, margin=0.51, relative=True).passed
    assert "worse by 5.00 points" in compare(old, new, margin=0).said()
    assert not compare(new, new, margin=0).passed
    better = compare(new, old, "asr/test/accuracy", margin=0.2)  # higher is better: 32 of 40 clips against 24
    assert (better.passed, better.gain) == (True, pytest.approx(0.2))


def test_the_interval_is_paired_and_says_when_it_may_be_chance() -> None:
    """The same errors in both and two more in one: unpaired intervals would be far wider."""
    new, old = evaluation_record(DATA, answers(range(20))), evaluation_record(DATA, answers(range(36)))
    low, high = compare(new, old).interval or (0, 0)
    assert 0.05 < low < 0.1 < high < 0.15
    one_better = compare(new, evaluation_record(DATA, answers(range(21))))
    assert one_better.passed
    assert "may be chance" in one_better.certainty()
    assert "too few" in compare(*[evaluation_record(DATA, answers(w, 1)) for w in ((), (0,))]).certainty()


def test_the_first_champion_has_to_beat_its_untrained_self() -> None:
    verdict = compare(evaluation_record(DATA, answers((1,))), None, margin=0.9)
    assert (verdict.passed, verdict.other, verdict.against) == (True, 1.0, "the untrained model")
    same = [row.model_copy(update={"before": row.hypothesis}) for row in answers((1,))]
    assert not compare(evaluation_record(DATA, same), None).passed
    with pytest.raises(NotComparable, match="untrained model's wer of asr was not measured"):
        compare(evaluation_record(DATA, answers((), before=None)), None)
    half = [row.model_copy(update={"before": None}) if i % 2 else row for i, row in enumerate(answers((1,)))]
    assert compare(evaluation_record(DATA, half), None)[1:4] == ("asr/test/wer", 0.0, 1.0)  # over the same 20 clips


def test_what_was_measured_on_something_else_is_refused_with_a_remedy() -> None:
    mine = evaluation_record(DATA, answers(()))
    other = Link(dataset="talk", version="ffff", digest="b" * 64)
    with pytest.raises(NotComparable, match=r"talk/0123456789ab \(aaaaaaaaaaaa\).*talk/ffff.*earloom run"):
        compare(mine, evaluation_record(other, answers((1,))))
    with pytest.raises(NotComparable, match=r"answered 40 clips, version 1 39: .*eval_clips="):
        compare(mine, evaluation_record(DATA, answers((1,), 39)), against="version 1")
    renamed = [row.model_copy(update={"key": row.key + "x"}) for row in answers((1,))]
    with pytest.raises(NotComparable, match="other clips"):
        compare(mine, evaluation_record(DATA, renamed))
    dev = [row.model_copy(update={"split": "dev"}) for row in answers((1,))]
    with pytest.raises(NotComparable, match="no asr/test/wer was measured; there are: asr/dev/wer"):
        compare(mine, evaluation_record(DATA, dev))
    normalised = evaluation_record(DATA, answers((1,))).model_copy(update={"normalisation": "none"})
    with pytest.raises(NotComparable, match="normalised in another way"):
        compare(mine, normalised)
    for margin in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="is impossible"):
            compare(mine, mine, margin=margin)


# ---- history --------------------------------------------------------------------------------------------------------


def moves(*words: str) -> tuple[Move, ...]:
    """`1>2` is a promotion, `2<1` a rollback to 1."""
    made = []
    for word in words:
        before, to = word.replace("<", ">").split(">")
        action = "rollback" if "<" in word else "promote"
        made.append(Move(action=action, to=to, before=before or None, by="me", when="2026-01-01T00:00:00+00:00"))  # type: ignore[arg-type]
    return tuple(made)


@pytest.mark.parametrize(
    ("words", "holder", "expected"),
    [
        ((), None, []),
        ((), "3", ["3"]),
        ((">1", "1>2", "2>3"), "3", ["1", "2", "3"]),
        ((">1", "1>2", "2>3", "3<2"), "2", ["1", "2"]),
        ((">1", "1>2", "2>3", "3<2", "2<1"), "1", ["1"]),
        ((">1", "1>2", "2<1", "1>4"), "4", ["1", "4"]),
        ((">1", "1>2", "2>1"), "1", ["1", "2", "1"]),
        ((">1", "1>2"), "5", ["1", "2", "5"]),  # somebody moved it by hand
        ((">1", "7>2"), "2", ["1", "7", "2"]),
    ],
)
def test_the_holders_are_a_stack_that_a_rollback_goes_down(
    words: tuple[str, ...], holder: str | None, expected: list[str]
) -> None:
    assert History(moves(*words), holder, 0).holders() == expected


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "a/../../b", "a\\..\\b", "file://x", "a//b", "./a"])
def test_a_manifest_that_leads_out_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"leads out|no plain name"):
        manifest_files({"files": {name: "0" * 64}}, "folder")


def test_a_run_from_before_there_were_records_is_judged_by_its_answers(tmp_path: Path) -> None:
    rows = answers((1, 2))
    folder = Path(model_folder(tmp_path / "run" / "model", None))
    assert read_evaluation(str(folder)) is None
    storage.write_text(f"{tmp_path}/run/evaluation/hypotheses.jsonl", "".join(r.model_dump_json() + "\n" for r in rows))
    storage.write_json(str(folder / "lineage.json"), {"data": [DATA.model_dump()], "stages": []})
    assert read_evaluation(str(folder)) == evaluation_record(DATA, rows)
    (folder / "evaluation.json").write_text('{"schema_version": 99}')
    with pytest.raises(ValueError, match="of another version of this code"):
        read_evaluation(str(folder))


@pytest.mark.parametrize("place", ["local", "memory"])
def test_the_folder_is_read_wherever_it_lies(place: str, tmp_path: Path) -> None:
    local = Path(model_folder(tmp_path / "m", answers(())))
    url = str(local) if place == "local" else f"memory://{tmp_path.name}/m"
    if place == "memory":
        storage.upload_folder(local, url)
    identity = digest(storage.read_json(f"{url}/manifest.json"))
    entry = Entry("talker", "1", (), url, {DIGEST_TAG: identity})
    assert set(checked(entry).files) == {"config.json", "model.safetensors", "evaluation.json"}
    assert set(checked(entry, "evaluation.json").files) == {"evaluation.json"}
    storage.write_text(f"{url}/model.safetensors", "W")
    assert checked(entry, "evaluation.json").url == url
    with pytest.raises(ValueError, match=r"model\.safetensors differs"):
        checked(entry)
    storage.write_json(f"{url}/manifest.json", {"files": {**checked(entry, "evaluation.json").files}})
    with pytest.raises(ValueError, match="is not what was registered"):
        checked(entry, "evaluation.json")
    with pytest.raises(FileNotFoundError, match="is gone"):
        checked(entry._replace(url=f"{url}/nowhere"))


def test_nobody_registers_a_champion() -> None:
    refuse_champion("candidate")
    with pytest.raises(ValueError, match=r"@champion is earned: .*`earloom promote`"):
        refuse_champion("champion")


# ---- a real registry ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('registry')}/mlflow.db"


def gate(**settings: object):  # type: ignore[no-untyped-def]
    from pipelines.promoting import Gate

    return Gate(**settings)  # type: ignore[arg-type]


@pytest.mark.slow
def test_promotions_and_rollbacks_are_recorded_on_both_versions(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.promoting import FallsShort, history_of, promote, rollback

    monkeypatch.setenv("EARLOOM_USER", "ada@lab")
    for number, wrong in enumerate((range(16), range(8), range(6)), 1):
        add_version("talker", tmp_path / str(number), uri, wrong)
    first = promote("talker/1", "champion", gate(why="the first"), uri)
    assert first.verdict is not None
    assert first.verdict.against == "the untrained model"
    assert find("talker@champion", uri).version == "1"

    planned = promote("talker/2", "champion", gate(margin=0.01), uri, dry_run=True)
    assert planned.move is None
    assert find("talker@champion", uri).version == "1"
    promote("talker/2", "champion", gate(margin=0.01, why="fewer errors"), uri)
    with pytest.raises(FallsShort, match=r"better by 1\.25 points, but 2\.00 points .*falls short by 0\.75 points"):
        promote("talker@candidate", "champion", gate(margin=0.02), uri)
    assert find("talker@champion", uri).version == "2"

    won, lost = find("talker/2", uri).tags, find("talker/1", uri).tags
    said = {tag.removeprefix("earloom.champion."): value for tag, value in won.items() if "champion" in tag}
    assert {k: said[k] for k in ("action", "by", "why", "over", "metric", "value", "against.value", "margin")} == {
        "action": "promote", "by": "ada@lab", "why": "fewer errors", "over": "1", "metric": "asr/test/wer",
        "value": "0.05", "against.value": "0.1", "margin": "0.01",
    }  # fmt: skip
    assert said["when"].endswith("+00:00")
    assert lost["earloom.champion.displaced.version"] == "2"
    assert lost["earloom.champion.displaced.by"] == "ada@lab"

    with pytest.raises(ValueError, match="--force needs --why"):
        promote("talker/3", "champion", gate(margin=0.5, force=True), uri)
    forced = promote("talker/3", "champion", gate(margin=0.5, force=True, why="a demo"), uri)
    assert "falls short" in forced.doubt
    assert find("talker/3", uri).tags["earloom.champion.forced"].startswith("yes: ")
    assert promote("talker/3", "champion", gate(), uri).verdict is None  # it is the champion already

    assert rollback("talker", "champion", "worse on calls", uri)[0].to == "2"
    assert rollback("talker", "champion", "", uri)[0].to == "1"
    assert find("talker@champion", uri).version == "1"
    with pytest.raises(LookupError, match="no version held @champion before 1"):
        rollback("talker", "champion", "", uri)
    history = history_of("talker", "champion", uri)
    assert [(m.action, m.before, m.to) for m in history.moves] == [
        ("promote", None, "1"), ("promote", "1", "2"), ("promote", "2", "3"), ("rollback", "3", "2"),
        ("rollback", "2", "1"),
    ]  # fmt: skip
    assert history.moves[3].why == "worse on calls"
    assert all(len(value) <= 5000 and len(key) <= 250 for key, value in find("talker/3", uri).tags.items())


@pytest.mark.slow
def test_a_changed_folder_is_neither_promoted_nor_compared_with(uri: str, tmp_path: Path) -> None:
    from pipelines.promoting import promote, rollback

    one, two = tmp_path / "one", tmp_path / "two"
    add_version("tampered", one, uri, range(16))
    promote("tampered/1", "champion", gate(), uri)
    add_version("tampered", two, uri, range(4))
    (two / "model.safetensors").write_text("other weights")
    with pytest.raises(ValueError, match=r"tampered/2 is not what was registered \(model.safetensors differs\)"):
        promote("tampered", "champion", gate(force=True, why="I must"), uri)
    (two / "model.safetensors").write_text(str(two))
    (two / "extra.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=r"extra.bin differs"):
        checked(find_entry("tampered/2", uri))
    (two / "extra.bin").unlink()
    (two / "more").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="more is a link that leads out"):
        checked(find_entry("tampered/2", uri))
    (two / "more").unlink()

    record = read_evaluation(str(one))
    assert record is not None
    kept = (one / "evaluation.json").read_text()
    (one / "evaluation.json").write_text(evaluation_record(DATA, answers(range(40))).model_dump_json())
    with pytest.raises(NotComparable, match=r"tampered/1 is not what was registered \(evaluation.json differs\)"):
        promote("tampered/2", "champion", gate(), uri)
    (one / "evaluation.json").write_text(kept)
    promote("tampered/2", "champion", gate(), uri)
    (one / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json differs"):
        rollback("tampered", "champion", "", uri)
    assert find("tampered@champion", uri).version == "2"


@pytest.mark.slow
def test_versions_that_cannot_be_compared_need_force(uri: str, tmp_path: Path) -> None:
    from pipelines.promoting import promote

    add_version("mixed", tmp_path / "one", uri, range(16))
    promote("mixed/1", "champion", gate(), uri)
    other = Link(dataset="talk", version="ffff", digest="b" * 64)
    add_version("mixed", tmp_path / "two", uri, (), data=other)
    with pytest.raises(NotComparable, match="earloom run"):
        promote("mixed/2", "champion", gate(), uri)
    done = promote("mixed/2", "champion", gate(force=True, why="new data"), uri)
    assert "talk/ffff" in done.doubt
    folder = model_folder(tmp_path / "three", None)
    register(folder, "mixed", {}, {}, None, uri)
    with pytest.raises(ValueError, match=r"mixed/3 is not what was registered"):
        promote("mixed/3", "champion", gate(), uri)  # its tag is the digest of its files, not of its manifest
    (tmp_path / "three" / "manifest.json").unlink()
    register(folder, "unmeasured", {}, {}, None, uri)
    with pytest.raises(NotComparable, match="unmeasured/1 has no record of an evaluation"):
        promote("unmeasured", "champion", gate(), uri)


@pytest.mark.slow
def test_of_two_promoters_one_wins_and_the_other_says_so(uri: str, tmp_path: Path) -> None:
    """Eight promoters with eight versions start at once: the alias moves as often as somebody was told so."""
    from pipelines.promoting import promote

    for number in range(1, 9):
        add_version("raced", tmp_path / str(number), uri, range(9 - number))
    barrier = threading.Barrier(8)

    def go(number: int) -> str:
        barrier.wait()
        try:
            promote(f"raced/{number}", "champion", gate(margin=0.0), uri)
        except (Raced, RuntimeError) as error:
            return str(error)
        return "won"

    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(go, range(1, 9)))
    with connected(uri) as client:
        history = read_history(client, "raced", "champion")
    winners = [number for number, text in enumerate(said, 1) if text == "won"]
    assert sorted(move.to for move in history.moves) == sorted(map(str, winners))
    assert 1 <= len(winners) < 8
    assert history.holder == history.moves[-1].to
    assert history.holders() == [move.to for move in history.moves]  # nobody displaced one that he had not seen
    assert all(
        "in the meantime" in text or "same time" in text or "falls short" in text for text in said if text != "won"
    )
    assert len(catalogue(uri)) >= 8


@pytest.mark.slow
def test_whoever_decides_on_an_old_holder_is_stopped(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The alias is moved by hand while a promoter is reading files."""
    for number in (1, 2, 3):
        add_version("slow", tmp_path / str(number), uri, range(9 - number))
    with connected(uri) as client:
        decide = mover("1", None)
        assert move_alias(client, "slow", "champion", decide).state == "done"

        def late(history: History) -> Move:
            client.set_registered_model_alias("slow", "champion", "3")
            return mover("2", "1")(history)

        with pytest.raises(Raced, match="from 1 to 3"):
            move_alias(client, "slow", "champion", late)
        assert read_history(client, "slow", "champion").holders() == ["1", "3"]

        # A claim of a process that died stands in the way for a minute, and no longer.
        key = f"{alias_history.PREFIX}.champion.000002.0123abcd"
        dead = mover("2", "3")(read_history(client, "slow", "champion"))
        client.set_registered_model_tag("slow", key, dead.model_dump_json())
        monkeypatch.setattr(alias_history, "TRIES", 2)
        with pytest.raises(Raced, match="at the same time"):
            move_alias(client, "slow", "champion", mover("2", "3"))
        old = dead.model_copy(update={"when": "2020-01-01T00:00:00+00:00"})
        client.set_registered_model_tag("slow", key, old.model_dump_json())
        assert move_alias(client, "slow", "champion", mover("2", "3")).to == "2"
        assert read_history(client, "slow", "champion").holders() == ["1", "3", "2"]


def mover(to: str, before: str | None) -> Callable[[History], Move]:
    return lambda history: alias_history.make_move("promote", to, before, "me", "because")
