"""Fixtures of tests of the compiled forms: nano's weights, and the backend over them where there is a compiler."""

from __future__ import annotations

import pytest

from starflow2.inference.native import NativeBackend, native_backend
from starflow2.inference.packed import pack
from starflow2.models.checkpoint import load_components
from starflow2.models.components import Components
from starflow2.models.hub import NANO


@pytest.fixture(scope="module")
def nano() -> Components:
    return load_components(NANO)


@pytest.fixture(scope="module")
def native(nano: Components) -> NativeBackend:
    backend, reason = native_backend(pack(nano.pretzel))
    if backend is None and reason.startswith("no C++ compiler"):
        pytest.skip(reason)
    assert backend is not None, reason
    return backend
