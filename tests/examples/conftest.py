"""The examples import each other by bare names, as scripts in one folder do; their data is cached in a temp folder."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))


@pytest.fixture(scope="session", autouse=True)
def _datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(autouse=True)
def _log_levels() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("examples", "hf_sparse")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
