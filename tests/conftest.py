"""For all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl

from tests.support.composing import quick


@pytest.fixture(scope="session", autouse=True)
def configs_are_composed_quickly() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConfigLoaderImpl, "load_configuration", quick())
        yield
