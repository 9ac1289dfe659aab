"""The tests of the right wing run on the dense backend unless they say otherwise: it rounds as dense models do."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _dense_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_SPARSE_BACKEND", "dense")
