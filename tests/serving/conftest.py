"""One model for all tests of serving, and a server on loopback for those that speak HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from starflow2.pipeline import StarFlow2

if TYPE_CHECKING:
    from serving_cases import Live


@pytest.fixture(scope="session")
def model() -> StarFlow2:
    return StarFlow2.from_pretrained("nano")


@pytest.fixture(scope="module")
def live(model: StarFlow2) -> Iterator[Live]:
    from serving_cases import listening
    from starflow2.serving.app import build_app
    from starflow2.serving.limits import ServeLimits
    from starflow2.serving.service import Service

    service = Service(model, ServeLimits(body_bytes=2**20, pixels=2**20, pictures=6, deadline_s=60.0))
    with listening(build_app(service), service) as found:
        yield found
