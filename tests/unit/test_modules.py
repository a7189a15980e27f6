"""Modules of third parties are imported where they are needed, and a missing one is named."""

from __future__ import annotations

import operator
import pickle
import sys
from functools import partial

import pytest

from sdar_verl.errors import ConfigError
from sdar_verl.modules import Importing, import_modules


@pytest.fixture
def package(tmp_path, monkeypatch):
    (tmp_path / "their_names.py").write_text("loaded = True\n")
    (tmp_path / "their_fault.py").write_text("raise RuntimeError('no licence')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("their_names", None)


def test_a_function_that_travels_brings_its_modules(package):
    sent = pickle.dumps(Importing(partial(operator.add, 40), ["their_names"]))
    assert "their_names" not in sys.modules
    arrived = pickle.loads(sent)
    assert arrived(2) == 42
    assert sys.modules["their_names"].loaded


def test_a_module_that_is_missing_or_fails_is_named(package):
    import_modules(["their_names"])
    with pytest.raises(ConfigError, match=r"sdar\.modules.*no_such_package.*PYTHONPATH"):
        import_modules(["no_such_package"])
    with pytest.raises(ConfigError, match="their_fault cannot be imported here: RuntimeError: no licence"):
        import_modules(["their_fault"])
