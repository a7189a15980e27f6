"""``sdar-verl prepare search`` and the server command: same options, same panels; bad files are named."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random

import pytest

pytest.importorskip("bm25s")

import pyarrow as pa
import pyarrow.parquet as pq

from sdar_verl import panels
from sdar_verl.cli import main
from sdar_verl.envs.registry import make_env
from sdar_verl.envs.search.client import HttpRetriever, RetrieverError
from sdar_verl.envs.search.dataset import QuestionFile, _task, read_questions
from sdar_verl.envs.search.passages import Passage, corpus_digest, read_corpus, write_corpus
from sdar_verl.panels import read_panel


def prepare(*arguments: object) -> int:
    return main(["prepare", "search", *map(str, arguments)])


def described(out: Path) -> dict:
    return json.loads((out / "panel.json").read_text())


# ---------------------------------------------------------------- the invented world


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("world") / "data"
    assert prepare("--out", out, "--train", 40, "--validation", 8, "--test", 8) == 0
    return out


def test_panels_are_sorted_hashed_and_answerable_from_the_corpus_beside_them(made, capsys):
    panels = {name: read_panel(made / f"{name}.parquet") for name in ("train", "validation", "test")}
    assert {name: len(tasks) for name, tasks in panels.items()} == {"train": 40, "validation": 8, "test": 8}
    assert Counter(task.task_type for task in panels["test"]) == dict.fromkeys(
        ("one_hop", "two_hop", "three_hop", "comparison"), 2
    )
    env = make_env("search", retriever=str(made / "corpus.jsonl"))
    for task in (task for tasks in panels.values() for task in tasks):
        env.reset(task)
        seen = "\n".join(env.step(f"search: {query}").observation for query in task.data["searches"])
        if task.task_type != "comparison":
            assert task.data["answers"][0] in seen
        step = env.step(f"answer: {task.data['answers'][-1]}")
        assert step.success and step.reward == 1.0


def test_the_same_options_do_nothing_again_and_other_options_are_refused(made, capsys):
    before = {file.name: file.stat().st_mtime_ns for file in made.iterdir()}
    options = ("--train", 40, "--validation", 8, "--test", 8)
    assert prepare("--out", made, *options) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {file.name: file.stat().st_mtime_ns for file in made.iterdir()} == before
    assert prepare("--out", made, *options, "--seed", 1) == 2
    assert "seed: 0 there, 1 asked for" in capsys.readouterr().err


def test_panels_do_not_depend_on_folder_or_process(made, tmp_path):
    options = ["--train", "40", "--validation", "8", "--test", "8"]
    command = [sys.executable, "-m", "sdar_verl.cli", "prepare", "search", "--out", str(tmp_path / "again"), *options]
    env = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(command, check=True, env=env, cwd=tmp_path, stdout=subprocess.DEVNULL)
    assert described(tmp_path / "again")["panels"] == described(made)["panels"]
    assert (tmp_path / "again" / "corpus.jsonl").read_bytes() == (made / "corpus.jsonl").read_bytes()


def test_a_corpus_that_was_removed_or_edited_is_made_again(tmp_path):
    options = ("--out", tmp_path, "--train", 4, "--validation", 4, "--test", 4)
    assert prepare(*options) == 0
    corpus = (tmp_path / "corpus.jsonl").read_bytes()
    (tmp_path / "corpus.jsonl").unlink()
    assert prepare(*options) == 0
    assert (tmp_path / "corpus.jsonl").read_bytes() == corpus
    for edited in (corpus[: corpus[:-1].rindex(b"\n") + 1], corpus[:-9], corpus.replace(b"the", b"no", 1)):
        (tmp_path / "corpus.jsonl").write_bytes(edited)
        assert prepare(*options) == 0
        assert (tmp_path / "corpus.jsonl").read_bytes() == corpus


def test_what_is_to_be_replaced_stays_until_the_new_is_whole(tmp_path, monkeypatch):
    options = ("--out", tmp_path, "--train", 4, "--validation", 4, "--test", 4)
    assert prepare(*options) == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    written, write = [], panels.write_panel

    def cut_short(*given):
        written.append(given)
        if len(written) == 2:
            raise KeyboardInterrupt
        return write(*given)

    with monkeypatch.context() as patch:
        patch.setattr(panels, "write_panel", cut_short)
        assert prepare(*options, "--seed", 1, "--force") == 130
    assert {path: path.read_bytes() for path in before} == before
    assert prepare(*options) == 0
    assert prepare(*options, "--seed", 1, "--force") == 0
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in before}
    assert (tmp_path / "corpus.jsonl").read_bytes() != before[tmp_path / "corpus.jsonl"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--train", 0), ["--train 0"]),
        (("--test", 100000), ["--test 100000", "--scale"]),
        (("--scale", 99), ["scale=99"]),
    ],
)
def test_numbers_that_cannot_be_had_are_named(tmp_path, capsys, options, words):
    assert prepare("--out", tmp_path, *options) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert not (tmp_path / "panel.json").exists()


def test_panels_go_into_a_folder(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    for environment in ("search", "webshop", "alfworld"):
        assert main(["prepare", environment, "--generate", "--out", str(tmp_path / "notes.txt")]) == 2
        assert f"--out {tmp_path}/notes.txt is a file; name a folder" in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_corpus_of_the_users_is_not_overwritten(tmp_path, capsys):
    write_corpus([Passage("1", "Oslo", "A city.")], tmp_path / "corpus.jsonl")
    before = (tmp_path / "corpus.jsonl").read_bytes()
    assert prepare("--out", tmp_path, "--train", 4, "--validation", 4, "--test", 4, "--force") == 2
    assert "corpus.jsonl is another corpus, not made here" in capsys.readouterr().err
    assert (tmp_path / "corpus.jsonl").read_bytes() == before


# ---------------------------------------------------------------- question files


def search_r1_rows(sources: dict[str, int]) -> list[dict]:
    """As Search-R1's parquet has them; the prompt is not read."""
    return [
        {
            "id": f"test_{i}",
            "question": f"  who is number {i} of {source}" + ("?" if i % 2 else ""),
            "golden_answers": [f"Nr {i}", str(i)],
            "data_source": source,
            "prompt": [{"role": "user", "content": "Answer the given question. You must ..."}],
            "reward_model": {"style": "rule", "ground_truth": {"target": [f"Nr {i}", str(i)]}},
        }
        for source, count in sources.items()
        for i in range(count)
    ]


def write_parquet(path: Path, rows: list[dict]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path]:
    train = write_parquet(tmp_path / "train.parquet", search_r1_rows({"nq": 30, "hotpotqa": 20}))
    test = write_parquet(tmp_path / "test.parquet", search_r1_rows({"bamboogle": 5, "popqa": 9}))
    return train, test


def test_search_r1s_files_become_panels_with_a_type_per_data_set(files, tmp_path, capsys):
    assert prepare("--out", tmp_path / "a", "--source", *files, "--validation", 10) == 0
    said = capsys.readouterr()
    panels = described(tmp_path / "a")["panels"]
    assert panels["train"]["task_types"] == {"hotpotqa": 16, "nq": 24}
    assert panels["validation"]["task_types"] == {"hotpotqa": 4, "nq": 6}
    assert panels["test"]["task_types"] == {"bamboogle": 5, "popqa": 9}
    assert "10 training questions are held out" in said.err
    tasks = read_panel(tmp_path / "a" / "test.parquet")
    assert [task.task_id for task in tasks] == sorted(task.task_id for task in tasks)
    one = next(task for task in tasks if task.description.startswith("who is number 4 of popqa"))
    assert (one.description, one.task_type, one.env) == ("who is number 4 of popqa?", "popqa", "search")
    assert dict(one.data) == {"answers": ["Nr 4", "4"]}
    assert not (tmp_path / "a" / "corpus.jsonl").exists()
    train = {task.task_id for task in read_panel(tmp_path / "a" / "train.parquet")}
    assert not train & {task.task_id for task in read_panel(tmp_path / "a" / "validation.parquet")}


def test_questions_of_files_do_not_leave_the_invented_corpus_beside_them(files, tmp_path):
    """The recipe would search it, and find nothing for them."""
    assert prepare("--out", tmp_path / "a", "--train", 4, "--validation", 4, "--test", 4) == 0
    assert prepare("--out", tmp_path / "a", "--source", *files, "--validation", 10, "--force") == 0
    assert not (tmp_path / "a" / "corpus.jsonl").exists()
    write_corpus([Passage("1", "Oslo", "A city.")], tmp_path / "a" / "corpus.jsonl")
    assert prepare("--out", tmp_path / "a", "--source", *files, "--validation", 9, "--force") == 0
    assert (tmp_path / "a" / "corpus.jsonl").exists(), "the user's own"


def test_hashes_do_not_depend_on_the_order_of_rows_and_files_or_their_names(files, tmp_path):
    assert prepare("--out", tmp_path / "a", "--source", *files, "--validation", 10) == 0
    rows = search_r1_rows({"hotpotqa": 20, "nq": 30})
    Random(0).shuffle(rows)
    halves = [write_parquet(tmp_path / f"{i}.parquet", rows[i::2]) for i in range(2)]
    sources = [f"test={files[1]}", *(f"train={half}" for half in reversed(halves))]
    assert prepare("--out", tmp_path / "b", "--source", *sources, "--validation", 10) == 0
    assert described(tmp_path / "a")["panels"] == described(tmp_path / "b")["panels"]


def test_descendants_and_json_lines_say_the_same(files, tmp_path):
    """SkyRL's and SDAR's parquet keep the question elsewhere; FlashRAG's files are JSON lines."""
    rows = search_r1_rows({"nq": 12})
    sdar = [
        {
            "data_source": row["data_source"],
            "prompt": row["prompt"],
            "reward_model": row["reward_model"],
            "extra_info": {"index": i, "question": row["question"]},
            "env_kwargs": {"question": row["question"], "ground_truth": {"target": row["golden_answers"]}},
        }
        for i, row in enumerate(rows)
    ]
    skyrl = [
        {
            "data_source": f"searchR1_{row['data_source']}",
            "reward_spec": row["reward_model"],
            "extra_info": {"question": row["question"]},
        }
        for row in rows
    ]
    plain = [{key: row[key] for key in ("question", "golden_answers", "data_source")} for row in rows]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, plain)))
    made = [
        write_parquet(tmp_path / "train_r1.parquet", rows),
        write_parquet(tmp_path / "train_sdar.parquet", sdar),
        write_parquet(tmp_path / "train_skyrl.parquet", skyrl),
        tmp_path / "train.jsonl",
    ]
    hashes = set()
    for number, file in enumerate(made):
        assert prepare("--out", tmp_path / str(number), "--source", file, "--validation", 3) == 0
        panels = described(tmp_path / str(number))["panels"]
        hashes.add((panels["train"]["hash"], panels["validation"]["hash"]))
    assert len(hashes) == 1


def test_rows_that_cannot_be_used_are_counted_and_said(tmp_path, capsys):
    rows = search_r1_rows({"nq": 10})
    rows += [rows[0], {**rows[1], "golden_answers": [""]}, {**rows[2], "question": " "}, {**rows[3], "data_source": ""}]
    write_parquet(tmp_path / "train.parquet", rows)
    assert prepare("--out", tmp_path / "a", "--source", tmp_path / "train.parquet", "--validation", 2) == 0
    said = capsys.readouterr().out
    for reason in ("no question", "no golden answers", "no data_source", "the same question again"):
        assert f"1 left out: {reason}" in said
    assert described(tmp_path / "a")["panels"]["train"]["tasks"] == 8


def test_training_questions_in_the_test_panel_are_said(tmp_path, capsys):
    train = write_parquet(tmp_path / "train.parquet", search_r1_rows({"nq": 10}))
    sources = (train, f"validation={train}", f"test={train}")
    assert prepare("--out", tmp_path / "a", "--source", *sources, "--validation", 3, "--test", 4) == 0
    assert "4 questions of the test panel are training questions, too" in capsys.readouterr().err
    panels = described(tmp_path / "a")["panels"]
    assert {name: panel["tasks"] for name, panel in panels.items()} == {"train": 10, "validation": 3, "test": 4}


def test_a_question_with_its_answers_in_another_order_is_the_same_question(tmp_path, capsys):
    rows = search_r1_rows({"nq": 10})
    train = write_parquet(tmp_path / "train.parquet", rows)
    turned = [{**row, "golden_answers": row["golden_answers"][::-1]} for row in rows]
    held = write_parquet(tmp_path / "dev.parquet", turned)
    assert prepare("--out", tmp_path / "a", "--source", train, f"validation={held}") == 0
    assert "10 questions of the validation panel are training questions, too" in capsys.readouterr().err


def test_a_folder_as_flashrag_has_it_names_the_data_set(tmp_path):
    (tmp_path / "popqa").mkdir()
    lines = [json.dumps({"id": f"train_{i}", "question": f"q{i}?", "golden_answers": ["x"]}) for i in range(9)]
    (tmp_path / "popqa" / "train.jsonl").write_text("\n".join(lines))
    read = read_questions([QuestionFile("train", tmp_path / "popqa" / "train.jsonl")])
    assert {task.task_type for task in read.tasks.values()} == {"popqa"} and not read.skipped


BAD = {
    "missing": (["train=no.parquet"], ["no.parquet does not exist"]),
    "no panel": (["questions.jsonl"], ["which panel", "train=FILE"]),
    "no training file": (["test=questions.jsonl"], ["no file of training questions"]),
    "not parquet": (["train=broken.parquet"], ["broken.parquet is no readable parquet file"]),
    "cut off": (["train=cut.jsonl"], ["cut.jsonl, line 2 is not JSON", "cut off"]),
    "other columns": (["train=other.parquet"], ["has the columns text, label", "golden_answers"]),
    "nothing usable": (["train=empty.jsonl"], ["holds no question that can be used", "2 rows: no golden answers"]),
    "too few to hold out": (["train=questions.jsonl"], ["--validation 512", "3 training questions"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_question_files_are_named_with_the_remedy(tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    good = [json.dumps({"question": f"q{i}?", "golden_answers": ["x"], "data_source": "nq"}) for i in range(3)]
    Path("questions.jsonl").write_text("\n".join(good))
    Path("broken.parquet").write_bytes(b"PAR1 and then nothing")
    Path("cut.jsonl").write_text(good[0] + "\n" + good[1][:-9])
    Path("empty.jsonl").write_text('{"question": "q"}\n{"question": "r", "golden_answers": []}\n')
    write_parquet(Path("other.parquet"), [{"text": "x", "label": 1}])
    sources, words = BAD[case]
    assert prepare("--out", "out", "--source", *sources) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert not Path("out/panel.json").exists()


def test_options_without_effect_are_refused(files, tmp_path, capsys):
    assert prepare("--out", tmp_path / "a", "--source", *files, "--scale", 2) == 2
    assert "--scale 2 only has an effect without --source" in capsys.readouterr().err
    assert prepare("--out", tmp_path / "a", "--source", *files, "--generate") == 2
    assert "--generate has no effect with --source" in capsys.readouterr().err
    assert prepare("--out", tmp_path / "a", "--source", files[0], "--test", 2, "--validation", 3) == 2
    assert "--test 2 has no effect" in capsys.readouterr().err


# ---------------------------------------------------------------- serve-retriever


def test_the_command_serves_a_corpus(tmp_path):
    write_corpus([Passage("1", "Oslo", "A city."), Passage("2", "Rome", "Another.")], tmp_path / "corpus.jsonl")
    command = [sys.executable, "-m", "sdar_verl.cli", "serve-retriever", "--corpus", str(tmp_path / "corpus.jsonl")]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with subprocess.Popen([*command, "--port", port], stdout=subprocess.PIPE, text=True, env=env) as server:
        try:
            assert server.stdout is not None
            assert "2 passages ready" in server.stdout.readline()
            client = HttpRetriever([f"http://127.0.0.1:{port}"], retries=0)
            for _ in range(200):
                try:
                    client.check(3)
                    break
                except RetrieverError:
                    time.sleep(0.05)
            assert [hit.passage.title for hit in client.search("oslo", 3)] == ["Oslo"]
        finally:
            server.terminate()


def test_a_corpus_that_cannot_be_served_is_an_error(tmp_path, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    assert main(["serve-retriever", "--corpus", str(tmp_path / "none.jsonl"), "--port", port]) == 2
    assert "none.jsonl cannot be read" in capsys.readouterr().err
    for option, value in (("topk", 0), ("port", 0), ("port", 65536), ("port", -1), ("k1", "nan"), ("k1", "inf")):
        assert main(["serve-retriever", "--corpus", "x", f"--{option}", str(value)]) == 2
        assert f"--{option} {value}" in capsys.readouterr().err
    assert main(["serve-retriever", "--corpus", "x", "--host", "nowhere.invalid"]) == 2
    assert "--host nowhere.invalid: no address of this machine" in capsys.readouterr().err


def test_a_port_that_is_taken_is_named_before_the_corpus_is_read(tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["serve-retriever", "--corpus", str(tmp_path / "none.jsonl"), "--port", port]) == 2
    assert f"--port {port}" in capsys.readouterr().err


# ---------------------------------------------------------------- golden answers in the forms of published files


@pytest.mark.parametrize(
    ("found", "answers"),
    [
        ('["Paris", "City of Light"]', ["Paris", "City of Light"]),
        (["['Til Tuesday]", "[0, 1]", "('x')"], ["['Til Tuesday]", "[0, 1]", "('x')"]),
        ('["[2] people"]', ["[2] people"]),
        (b'["Paris"]', ["Paris"]),
        ("['Paris', 'City of Light']", ["Paris", "City of Light"]),
        ('  ["Paris"]\n', ["Paris"]),
        ('[["Paris"], ["Lutetia"]]', ["Paris", "Lutetia"]),
        ({"target": '["Paris"]'}, ["Paris"]),
        ('{"target": ["Paris", "Paris"]}', ["Paris"]),
        ("{'target': ['Paris']}", ["Paris"]),
        ("[1998, 1999.5]", ["1998", "1999.5"]),
        ([1998.0], ["1998"]),
        ("{'Paris', 'City of Light'}", ["City of Light", "Paris"]),
        ("('Paris', 'City of Light')", ["Paris", "City of Light"]),
        ("array(['Paris', 'City of Light'], dtype=object)", ["Paris", "City of Light"]),
        ('"[\\"Paris\\"]"', ["Paris"]),
        ('[b"Paris"]', ["Paris"]),
        ('\ufeff["Paris"]', ["Paris"]),
        ('("Weird Al") Yankovic', ['("Weird Al") Yankovic']),
        (b"Paris", ["Paris"]),
        (["Paris", None, float("nan"), ""], ["Paris"]),
        ("Paris", ["Paris"]),
        ("[sic]", ["[sic]"]),
        ('"Heroes"', ['"Heroes"']),
        ("{sic}", ["{sic}"]),
    ],
)
def test_answers_in_the_text_of_a_list_are_read(found, answers):
    task, reason = _task({"question": "q", "golden_answers": found, "data_source": "nq"})
    assert (reason, list(task.data["answers"])) == ("", answers)
    nested = {"question": "q", "reward_model": json.dumps({"ground_truth": found}, default=str), "data_source": "nq"}
    if not isinstance(found, bytes) and found == found and "NaN" not in nested["reward_model"]:
        assert list(_task(nested)[0].data["answers"]) == answers


@pytest.mark.parametrize(
    "found",
    [
        "['Paris' 'City of Light']",
        '["Paris", "City',
        "['Paris', os.remove('x')]",
        '{"text": ["Paris"]}',
        "[]",
        "[null]",
        ["The"],
        ["!", "a "],
    ],
)
def test_answers_that_cannot_be_told_are_left_out_and_counted(tmp_path, found, capsys):
    good = [{"question": f"q{i}", "golden_answers": ["x"], "data_source": "nq"} for i in range(9)]
    rows = [*good, {"question": "bad", "golden_answers": found, "data_source": "nq"}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    read = read_questions([QuestionFile("train", tmp_path / "train.jsonl")])
    assert len(read.tasks) == 9 and sum(read.skipped.values()) == 1
    assert next(iter(read.skipped)).startswith(("golden answers", "no golden answers"))


def test_an_answer_of_which_the_scorer_leaves_nothing_is_no_golden_answer(tmp_path):
    """It would be met by an empty answer."""
    rows = [{"question": "q", "golden_answers": ["The", "The Who", "?"], "data_source": "nq"}]
    (tmp_path / "train.jsonl").write_text(json.dumps(rows[0]))
    (task,) = read_questions([QuestionFile("train", tmp_path / "train.jsonl")]).tasks.values()
    assert task.data["answers"] == ["The Who"]


@pytest.mark.parametrize(("asked", "shown"), [("who", "who?"), ("who?", "who?"), ("谁？", "谁？"), ("من؟", "من؟")])
def test_a_question_ends_with_one_mark(tmp_path, asked, shown):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"question": asked, "golden_answers": ["me"], "data_source": "nq"}))
    (task,) = read_questions([QuestionFile("train", path)]).tasks.values()
    assert task.description == shown


def test_columns_that_are_maps_are_read(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {
        "data_source": pa.array(["nq"]),
        "extra_info": pa.array([[("question", "who?")]], pa.map_(pa.string(), pa.string())),
        "reward_model": pa.array([[("ground_truth", '["Paris"]')]], pa.map_(pa.string(), pa.string())),
    }
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    (task,) = read_questions([QuestionFile("train", tmp_path / "train.parquet")]).tasks.values()
    assert (task.description, task.data["answers"]) == ("who?", ["Paris"])


def test_a_corpus_is_read_whole_when_the_panels_are_made(files, tmp_path, capsys):
    corpus = tmp_path / "mine.jsonl"
    lines = [json.dumps({"id": str(i), "contents": "" if i == 7 else f"text {i}"}) for i in range(5000)]
    corpus.write_text("\n".join([*lines[:2500], "{broken", *lines[2500:]]))
    options = ("--source", *map(str, files), "--validation", 2, "--corpus", corpus, "--out", tmp_path / "out")
    assert prepare(*options) == 2
    assert "line 2501 is not JSON" in capsys.readouterr().err
    corpus.write_text("\n".join(lines))
    assert prepare(*options) == 0
    assert "4999 passages" in (told := capsys.readouterr().err) and "1 without a text are left out" in told
    assert described(tmp_path / "out")["settings"]["corpus"] == corpus_digest(read_corpus(corpus))
    assert prepare("--corpus", corpus, "--out", tmp_path / "other") == 2
    assert "only has an effect with --source" in capsys.readouterr().err
