"""Tests of the right wing compare bit for bit where they can: they run on the dense backend unless they say otherwise."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _dense_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_SPARSE_BACKEND", "dense")
