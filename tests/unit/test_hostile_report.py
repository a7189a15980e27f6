"""Records and texts of others in the report: nothing becomes markup or runs; what is damaged is left out and said."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given

from sdar_verl.cli import main
from sdar_verl.report import layout
from sdar_verl.report.document import render, write_report
from sdar_verl.report.layout import RecordError
from sdar_verl.report.page import embed
from sdar_verl.report.read import read_run
from sdar_verl.report.trace import read_trace, trace_schema
from sdar_verl.report.viewer import viewer_data
from tests.support.fuzzing import TEXTS, VALUES, mutations, quick
from tests.support.recorded_run import turn_row, write_run

MARKUP = "</script><script>alert(1)</script><!--\"'><img src=x onerror=alert(2)>\ud800\u2028{{7*7}}"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("sound") / "run", steps=2)


def record_of(run: Path) -> Path:
    return run / "checkpoints" / layout.RECORD


def lines_of(run: Path, name: str) -> list[Any]:
    return [json.loads(line) for line in (record_of(run) / name).read_text().splitlines()]


class Elements(HTMLParser):
    """Tags, attributes and scripts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "script" and data.strip():
            self.scripts.append(data)


# ---------------------------------------------------------------- texts


def hostile_run(folder: Path, text: str) -> Path:
    run = write_run(folder, steps=2, experiment=text, **{"sdar.env.name": text, text: text})
    record = record_of(run)
    with (record / layout.WARNINGS_FILE).open("w") as stream:
        stream.write(json.dumps({"step": text, "name": text, "text": text}) + "\n")
    with (record / layout.METRICS_FILE).open("a") as stream:
        metrics = {f"sdar/skill_episodes/{text}": 3, f"sdar-val/{text}/success": 0.5, f"sdar-val/{text}/turns": 2.0}
        stream.write(json.dumps({"step": 3, "data": metrics}) + "\n")
    return run


def test_a_run_full_of_markup_gives_the_elements_of_any_other(tmp_path: Path, sound: Path) -> None:
    plain = Elements(render(read_run(hostile_run(tmp_path / "plain", "plain"))))
    out, _ = write_report(hostile_run(tmp_path / "hostile", MARKUP))
    hostile = Elements(out.read_text(encoding="utf-8"))
    assert hostile.tags == plain.tags
    assert hostile.attributes == plain.attributes
    assert not [name for name in hostile.attributes if name.startswith("on")]
    assert hostile.tags.count("script") == len(hostile.scripts)


def test_a_note_does_not_reach_the_terminal_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = {"step": 1, "data": {"val-core/\x1b[31mred\u202eevil\ud800/acc/mean@1": 0.5}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert main(["report", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "[31mred" in said and not {"\x1b", "\u202e", "\ud800"} & {*said}


def test_the_page_may_run_its_own_scripts_only_and_load_nothing(sound: Path) -> None:
    text = render(read_run(sound))
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)
    assert policy and text.index(policy[0]) < text.index("<style>")
    assert policy[1].startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in policy[1].partition("style-src")[0] and "http" not in policy[1]
    scripts = Elements(text).scripts
    hashes = {base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in scripts}
    assert len(scripts) == 7 and hashes == set(re.findall(r"'sha256-([^']+)'", policy[1]))


@quick(100)
@given(value=VALUES | TEXTS)
def test_embedded_data_holds_no_markup_and_is_the_data(value: Any) -> None:
    if "NaN" in json.dumps(value) or "Infinity" in json.dumps(value):
        return
    text = embed(value)
    assert "<" not in text and "\u2028" not in text
    assert text.isascii()  # halves of surrogate pairs among them
    assert json.loads(text) == value


def test_scripts_set_texts_as_texts_never_as_html() -> None:
    from sdar_verl.report.page import _ASSETS

    for name in ("ui.js", "charts.js", "tokens.js", "viewer.js"):
        code = (_ASSETS / name).read_text()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|\.href", code)


# ---------------------------------------------------------------- damaged records


def rendered_or_refused(run: Path) -> str:
    try:
        text = render(read_run(run))
    except RecordError as error:
        assert len(str(error)) < 2000
        return ""
    text.encode()
    return text


@pytest.fixture
def copy(tmp_path_factory: pytest.TempPathFactory, sound: Path) -> Path:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(record_of(sound), record_of(folder))
    shutil.rmtree(record_of(folder) / layout.TRACES)  # slow to read, and tested below
    return folder


@pytest.mark.parametrize("name", [layout.METRICS_FILE, layout.DISTRIBUTIONS_FILE, layout.WARNINGS_FILE])
def test_lines_with_wrong_parts_are_left_out(sound: Path, copy: Path, name: str) -> None:
    warned = [{"step": 1, "name": "gate", "text": "always open"}]
    lines = warned if name == layout.WARNINGS_FILE else lines_of(sound, name)

    @quick(40)
    @given(changed=mutations(lines))
    def check(changed: Any) -> None:
        written = changed if isinstance(changed, list) else [changed]
        (record_of(copy) / name).write_text("\n".join(map(json.dumps, written)))
        rendered_or_refused(copy)

    check()


def test_a_description_with_wrong_parts_is_read_or_refused(sound: Path, copy: Path) -> None:
    run = json.loads((record_of(sound) / layout.RUN_FILE).read_text())

    @quick(40)
    @given(changed=mutations(run))
    def check(changed: Any) -> None:
        (record_of(copy) / layout.RUN_FILE).write_text(json.dumps(changed))
        rendered_or_refused(copy)

    check()


@pytest.mark.parametrize(
    ("line", "note"),
    [
        ({"step": 1, "data": {"sdar/success": [1]}}, "1 values are no numbers"),
        ([1], "is no JSON object"),
        ("deep", "is not JSON"),
        ({"step": 2.5, "data": {"sdar/success": 1.0}}, "1 lines have no step"),
        ({"step": True, "data": {"sdar/success": 1.0}}, "1 lines have no step"),
        ({"step": 20, "data": {"sdar/success": 1.0}}, "There are no metrics of "),
        ({"step": 10**12, "data": {"sdar/success": 1.0}}, " to 999999999999."),
        ({"step": 0, "data": {"sdar/success": 1.0}}, "Steps 0 were killed before their end"),
    ],
)
def test_what_is_left_out_is_said(copy: Path, line: Any, note: str) -> None:
    text = "[" * 100_000 if line == "deep" else json.dumps(line)
    path = record_of(copy) / layout.METRICS_FILE
    path.write_text(text + "\n" + path.read_text())
    assert any(note in one.replace("and no JSON", "is no JSON") for one in read_run(copy).notes)


def test_files_of_others_beside_those_of_steps_are_passed_over(tmp_path: Path) -> None:
    for name in ("step_00000002.parquet", "step_00000002 (1).parquet", "step_final.parquet", "step_.parquet"):
        (tmp_path / name).write_text("")
    assert layout.step_files(tmp_path) == {2: tmp_path / "step_00000002.parquet"}


def test_a_damaged_part_of_a_distribution_is_said(copy: Path) -> None:
    path = record_of(copy) / layout.DISTRIBUTIONS_FILE
    first, *others = [json.loads(line) for line in path.read_text().splitlines()]
    first["gap_histogram"] = first["gap_histogram"][1:]
    path.write_text("\n".join(map(json.dumps, [first, *others])))
    data = read_run(copy)
    assert "distributions.jsonl: gap_histogram of some steps are damaged and left out." in data.notes
    assert "gap_histogram" not in data.distributions[0] and "gap_histogram" in data.distributions[1]


# ---------------------------------------------------------------- traces


def rows() -> list[dict[str, Any]]:
    import numpy as np

    return [turn_row(np.random.default_rng(0), 1, 0, 0, turn) for turn in range(2)]


def test_a_table_that_is_no_trace_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(rows(), schema=trace_schema())
    path = tmp_path / "step_00000001.parquet"
    for changed, message in (
        (table.drop_columns(["gap"]), "other columns than a trace: gap"),
        (table.set_column(2, "episode", pa.array([None, "x"])), "without its step"),
        (table.set_column(2, "episode", pa.array(["a_1", "no number"])), "without its step"),
        (table.set_column(0, "step", pa.array(["one", "two"])), "columns of another kind"),
    ):
        pq.write_table(changed.replace_schema_metadata(trace_schema().metadata), path)
        with pytest.raises(RecordError, match=message):
            read_trace(path)
    path.write_bytes(b"PAR1" * 20)
    with pytest.raises(RecordError, match="not a readable trace"):
        read_trace(path)


def test_empty_and_endless_values_of_a_trace_reach_the_viewer_as_null(tmp_path: Path) -> None:
    nan = float("nan")
    numbers = {"gap": [nan, None, 1.0], "gate": None, "reward": nan, "episode_reward": nan}
    texts = {"task": None, "task_type": None, "tokens": None, "token_ids": None, "skills": None}
    broken = [{**row, **numbers, **texts} for row in rows()]
    path = tmp_path / "step_00000001.parquet"
    pq.write_table(pa.Table.from_pylist(broken, schema=trace_schema()), path)
    viewer = viewer_data([read_trace(path)])
    embed(viewer)
    body = json.loads(gzip.decompress(base64.b64decode(viewer["bodies"][0])), parse_constant=pytest.fail)
    assert body["turns"][0]["gap"] == [None, None, 1.0] and body["turns"][0]["tokens"] == []
    assert viewer["index"][0]["reward"] is None and viewer["index"][0]["gap"] == 1.0
