"""The processes that the tests of this folder run on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed
from distributed.ranks import Crew


@pytest.fixture(scope="session")
def crew() -> Iterator[Crew]:
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this torch was built without gloo")
    crew = Crew()
    yield crew
    crew.stop()
