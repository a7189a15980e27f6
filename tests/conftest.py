"""For all tests."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import cache

import omegaconf.base
import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl

from tests.support.composing import quick


def pytest_collection_finish() -> None:
    """What has been imported stays: the garbage collector need not look at its millions of objects again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


@pytest.fixture(scope="session", autouse=True)
def configs_are_composed_quickly() -> Iterator[None]:
    """And OmegaConf parses each interpolation once: thousands of configs have the same hundred."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConfigLoaderImpl, "load_configuration", quick())
        patch.setattr(omegaconf.base, "parse", cache(omegaconf.base.parse))
        yield
