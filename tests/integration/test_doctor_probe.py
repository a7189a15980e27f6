"""The doctor's look into verl's own processes."""

from __future__ import annotations

import pytest

from sdar_verl.doctor.machine import look_around
from sdar_verl.doctor.probe import probe_fresh_process, probe_ray_worker
from tests.support.verl_version import IS_VERL_090

pytestmark = pytest.mark.integration


def test_a_fresh_process_and_a_ray_worker_know_the_plugin() -> None:
    for found in (probe_fresh_process(), probe_ray_worker()):
        assert found.get("plugin") is True, found
        assert "sdar" in found["trainer_modes"] and "sdar" in found["estimators"]
        assert "sdar_agent" in found["agent_loops"]


def test_a_plugin_that_verl_was_told_to_leave_out_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "none")
    monkeypatch.delenv("VERL_PLATFORM", raising=False)  # without the plugin verl knows no platform "cpu"
    found = probe_fresh_process()
    assert found["plugin"] is False and "sdar" not in found["trainer_modes"]


def test_an_import_that_fails_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    (tmp_path / "verl.py").write_text("raise ImportError('half an installation')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "half an installation" in probe_fresh_process()["error"]


def test_verls_pins_are_read_from_its_metadata() -> None:
    machine = look_around(ray=False)
    assert machine.versions["verl"] and machine.pins["transformers"]
    if not IS_VERL_090:  # which names neither
        assert machine.pins["torch"].startswith("==") and machine.pins["vllm"].startswith("==")
