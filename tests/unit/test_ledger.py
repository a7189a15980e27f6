"""What attempts took, and the wish to stop."""

from __future__ import annotations

import json

import pytest

from sdar_verl.cli import main
from sdar_verl.cloud import ledger, stop
from sdar_verl.cloud.store import Store, StoreError
from sdar_verl.report.document import render
from sdar_verl.report.read import read_run
from tests.support.recorded_run import write_run

RUN = {"started": "2026-11-28T10:00:00+0000", "nodes": 2, "cards": 16, "first": 0, "step": 10, "total": 30}
RUN |= {"tokens": 1e6, "seconds": 3600.0, "slowest": 200.0, "beats": 5, "ended": None, "host": "node-1"}


def test_run_and_guard_write_one_line_together(tmp_path):
    store = Store(tmp_path)
    first = ledger.open_id(store)
    ledger.write(store, first, RUN)
    assert ledger.read(store)[0].cost is None, "an unknown price is not 0"
    ledger.write(store, first, {"price": 110.0, "spot": True, "seconds": 4000.0, "ended": None}, guard=True)
    (line,) = ledger.read(store)
    assert (line.price, line.spot, line.seconds, line.step, line.ended) == (110.0, True, 4000.0, 10, None)
    assert line.cost == pytest.approx(110 * 4000 / 3600) and line.card_hours == pytest.approx(16 * 4000 / 3600)


def test_attempts_are_numbered_and_the_later_of_two_is_known_to_both(tmp_path):
    store = Store(tmp_path)
    ids = []
    for _ in range(3):
        ids.append(ledger.open_id(store))
        ledger.write(store, ids[-1], RUN)
    assert [name[:4] for name in ids] == ["0001", "0002", "0003"]
    assert ledger.newest(store) == ids[2] and ledger.later(ids[2], ids[1]) and not ledger.later(ids[0], ids[1])
    assert ledger.later("10000-000000", "9999-ffffff")
    assert ledger.later("0002-b00000", "0002-a00000") and not ledger.later("0002-a00000", "0002-b00000")


def test_totals_count_what_was_redone_and_what_has_no_price(tmp_path):
    lines = [
        ledger.Attempt("0001-a", cards=8, price=36.0, first=0, step=10, seconds=100.0),
        ledger.Attempt("0002-a", cards=8, price=None, first=8, step=20, seconds=200.0),
    ]
    found = ledger.total(lines)
    assert found.cost == pytest.approx(1.0) and found.unpriced == 1 and found.attempts == 2
    assert found.redone == pytest.approx(2 / 22) and found.card_hours == pytest.approx(8 * 300 / 3600)
    assert ledger.total([lines[1]]).cost is None


def test_lines_of_another_machine_are_copied_not_overwritten(tmp_path):
    mirror, folder = Store(tmp_path / "mirror"), Store(tmp_path / "run")
    ledger.write(mirror, "0001-aaaaaa", RUN)
    ledger.write(mirror, "0002-bbbbbb", RUN)
    ledger.write(folder, "0002-bbbbbb", {**RUN, "step": 12})
    ledger.copy(mirror, folder)
    assert [line.step for line in ledger.read(folder)] == [10, 12]


@pytest.mark.parametrize("line", [{"step": "ten"}, {"seconds": -1}, {"ended": 3}, {"price": True}])
def test_a_damaged_line_is_told(tmp_path, line):
    ledger.write(Store(tmp_path), "0001-aaaaaa", {**RUN, **line})
    ledger.write(Store(tmp_path), "0002-bbbbbb", RUN)
    with pytest.raises(StoreError, match=r"0001-aaaaaa\.json is damaged"):
        ledger.read(Store(tmp_path))
    told: list[str] = []
    assert [attempt.id for attempt in ledger.read(Store(tmp_path), told.append)] == ["0002-bbbbbb"]
    assert len(told) == 1 and "this attempt is not counted" in told[0]


def test_a_wish_is_for_one_attempt_or_for_whoever_comes(tmp_path):
    store = Store(tmp_path)
    stop.ask([store], stop.Wish("SIGTERM", "0001-aaaaaa"))
    assert stop.asked(store, "0001-aaaaaa") == stop.Wish("SIGTERM", "0001-aaaaaa")
    assert stop.asked(store, "0002-bbbbbb") is None and stop.asked(store) is None
    stop.ask([store], stop.Wish("enough"))
    assert stop.asked(store, "0002-bbbbbb") == stop.asked(store) == stop.Wish("enough")
    stop.ask([store], stop.Wish("SIGTERM", "0002-bbbbbb", again=True))
    assert stop.asked(store) == stop.Wish("enough"), "what somebody asked for by hand outlives the attempt"
    stop.forget([store], stop.Wish("SIGTERM", "0002-bbbbbb"))
    assert stop.asked(store) == stop.Wish("enough"), "nor does the end that was asked of an attempt fulfil it"
    stop.forget([store], stop.Wish("enough"))
    assert stop.asked(store) is None


def test_stop_wants_a_run(tmp_path, capsys):
    assert main(["stop", str(tmp_path)]) == 2
    assert "holds no sdar_run.json" in capsys.readouterr().err
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "sdar_run.json").write_text("{}")
    assert main(["stop", str(tmp_path), "--reason", "enough"]) == 0
    assert stop.asked(Store(tmp_path / "checkpoints")) == stop.Wish("enough")


def test_a_run_whose_machine_goes_away_is_asked_by_its_attempt(tmp_path, capsys):
    (tmp_path / "sdar_run.json").write_text("{}")
    assert main(["stop", str(tmp_path), "--again"]) == 2
    assert "has no attempt that could end" in capsys.readouterr().err
    ledger.write(Store(tmp_path), "0003-aaaaaa", RUN)
    assert main(["stop", str(tmp_path), "--again", "--reason", "notice"]) == 0
    assert stop.asked(Store(tmp_path)) is None, "the next attempt is not asked"
    assert stop.asked(Store(tmp_path), "0003-aaaaaa") == stop.Wish("notice", "0003-aaaaaa", again=True)


@pytest.mark.parametrize("content", ["", "stop", "[]"])
def test_a_file_of_that_name_is_a_wish(tmp_path, content):
    (tmp_path / "stop.json").write_text(content)
    assert stop.asked(Store(tmp_path), "0001-aaaaaa") == stop.Wish("there is a stop.json")


def test_of_an_attempt_in_two_places_the_later_word_counts():
    early, late = ledger.Attempt("0001-aaaaaa", seconds=1.0), ledger.Attempt("0001-aaaaaa", seconds=2.0)
    other = ledger.Attempt("0002-bbbbbb")
    assert ledger.merge([early], [other, late]) == ledger.merge([late, other], [early]) == [late, other]


def test_a_guard_that_was_killed_does_not_hide_what_came_after(tmp_path):
    store = Store(tmp_path)
    ledger.write(store, "0001-aaaaaa", {**RUN, "seconds": 36000.0})
    ledger.write(store, "0001-aaaaaa", {"price": 50.0, "seconds": 60.0}, guard=True)
    assert ledger.read(store)[0].cost == pytest.approx(500)


def run_with_ledger(folder, price, **settings):
    write_run(folder, **settings)
    store = Store(folder / "checkpoints")
    ledger.write(store, "0001-aaaaaa", {**RUN, "cards": 8, "seconds": 1800.0, "step": 6})
    ledger.write(store, "0002-bbbbbb", {**RUN, "cards": 8, "seconds": 1800.0, "first": 4, "step": 9})
    for name in ("0001-aaaaaa", "0002-bbbbbb") if price else ():
        ledger.write(store, name, {"price": price, "seconds": 1800.0}, guard=True)
    return folder


def test_report_and_compare_show_what_runs_cost(tmp_path, capsys):
    run_with_ledger(tmp_path / "sdar", 55.0)
    run_with_ledger(tmp_path / "grpo", None, experiment="grpo", seed=1, rate=0.02)
    page = render(read_run(tmp_path / "sdar"))
    assert "55.00 USD" in page and "2 attempts, 18% of the steps trained again" in page
    assert '<div class="value">unknown</div>' in render(read_run(tmp_path / "grpo"))
    out = tmp_path / "out"
    assert (
        main(["compare", *(str(tmp_path / name) for name in ("sdar", "grpo")), "--any-settings", "--out", str(out)])
        == 0
    )
    sdar, grpo = json.loads((out / "comparison.json").read_text())["methods"]
    assert sdar["cost"]["gpu_hours"] == pytest.approx(8) and sdar["cost"]["usd"] == pytest.approx(55)
    curve = dict(read_run(tmp_path / "sdar").column("sdar-val/student/success"))
    assert sdar["cost"]["usd_per_point"] == pytest.approx(55 / (100 * (curve[9] - curve[0])))
    assert grpo["cost"] == {"gpu_hours": pytest.approx(8), "usd": None, "usd_per_point": None}
    table = (out / "comparison.md").read_text()
    assert "| USD a run | sdar | 1 | 55.00 |" in table and "|  | grpo | 1 | unknown |" in table


def test_runs_without_a_ledger_have_no_cost(tmp_path, capsys):
    write_run(tmp_path / "sdar")
    assert main(["compare", str(tmp_path / "sdar")]) == 0
    assert "USD" not in capsys.readouterr().out
    assert "GPU-hours" not in render(read_run(tmp_path / "sdar"))
