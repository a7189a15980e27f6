"""A real run whose checkpoints go to an S3 server over HTTP: killed in mid-upload, resumed in an empty folder."""

from __future__ import annotations

import shutil
from unittest import mock

import pytest

from sdar_verl.checks.resume import TRACKER
from sdar_verl.cloud import ledger, stop
from sdar_verl.cloud.mirror import Mirror
from sdar_verl.cloud.store import Store
from sdar_verl.report.layout import METRICS_FILE, RECORD, read_lines
from tests.integration.test_reliability import KEEPS, compared
from tests.support.killing import LiveRun
from tests.support.s3 import BUCKET, s3_server
from tests.support.toy_run import SAME, train

pytestmark = [pytest.mark.integration, pytest.mark.slow]

STEPS = 6


@pytest.fixture(scope="module")
def s3():
    with s3_server() as server, mock.patch.dict("os.environ", server.env):
        yield server


@pytest.fixture(scope="module")
def whole(s3, tmp_path_factory):
    """The run that nobody stops; mirrored, so that its attempt can be looked at."""
    folder = tmp_path_factory.mktemp("whole")
    return train(folder, *KEEPS, f"sdar.cloud.mirror=s3://{BUCKET}/whole", steps=STEPS)


def test_a_whole_run_leaves_its_mirror(s3, whole):
    mirror = Mirror(f"s3://{BUCKET}/whole")
    assert mirror.steps() == {4: True, 6: True}, "the newest two"
    names = mirror.store.names()
    assert names.keys() >= {"sdar_run.json", TRACKER, f"{RECORD}/{METRICS_FILE}", f"{RECORD}/run.json"}
    assert mirror.store.read(TRACKER) == b"6"
    (attempt,) = ledger.read(mirror.store)
    assert (attempt.first, attempt.step, attempt.total, attempt.ended) == (0, STEPS, STEPS, "finished")
    assert attempt.cost is None and attempt.tokens > 0 and attempt.seconds > attempt.slowest > 0


def test_killed_in_mid_upload_it_goes_on_in_an_empty_folder(s3, whole, tmp_path):
    """The upload of step 4 stands still; the machine dies and its disk with it. Another one goes on from step 2."""
    place = f"s3://{BUCKET}/killed"
    s3.holds = lambda method, path: "/killed/global_step_4/actor/optim" in path and method in ("PUT", "POST")
    killed = LiveRun(tmp_path / "first", *KEEPS, f"sdar.cloud.mirror={place}", steps=STEPS)
    try:
        killed.wait_for(s3.held.is_set)
        killed.wait_for(lambda: "sdar step 5/" in killed.output)
    finally:
        killed.kill_all()
        s3.holds = lambda method, path: False
        s3.released.set()
    mirror = Mirror(place)
    assert mirror.steps() == {2: True, 4: False}
    panels = {path.name: path for path in (tmp_path / "first").glob("*.parquet")}
    second = tmp_path / "second"
    second.mkdir()
    for name, path in panels.items():
        shutil.copy(path, second / name)
    resumed = train(second, *KEEPS, f"sdar.cloud.mirror={place}", steps=STEPS)
    assert f"{place}/global_step_4 has no manifest.json" in resumed.output
    assert f"global_step_2 came from {place}" in resumed.output
    assert sorted(resumed.metrics) == [3, 4, 5, 6]
    for step in (3, 4, 5, 6):
        expected, found = ({k: v for k, v in run.metrics[step].items() if compared(k)} for run in (whole, resumed))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, nan_ok=True, **SAME), (step, name)
    record = [line["step"] for line in read_lines(second / "checkpoints" / RECORD / METRICS_FILE)]
    assert record == [1, 2, 3, 4, 5, 6], "the record goes on, from the mirror's"
    lines = ledger.read(mirror.store)
    assert [(line.first, line.step, line.ended) for line in lines] == [(0, 5, None), (2, 6, "finished")]
    assert ledger.total(lines).redone == pytest.approx(3 / 9)
    assert ledger.read(Store(second / "checkpoints")) == lines


def test_a_run_is_stopped_through_its_mirror(s3, tmp_path):
    place = f"s3://{BUCKET}/stopped"
    run = LiveRun(tmp_path, *KEEPS, "trainer.save_freq=1000", f"sdar.cloud.mirror={place}", steps=1000)
    try:
        run.wait_for(lambda: "sdar step 1/" in run.output)
        stop.ask([Store(place)], stop.Wish("enough seen"))
        ended = run.end(timeout_s=240)
    finally:
        run.kill_all()
    assert ended.returncode == 0
    mirror = Mirror(place)
    (attempt,) = ledger.read(mirror.store)
    assert attempt.ended == "stopped: enough seen"
    assert mirror.newest() == attempt.step == max(ended.metrics) < 10
    assert stop.asked(mirror.store) is None, "the wish is fulfilled"
