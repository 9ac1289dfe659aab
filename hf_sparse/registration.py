"""Registers the loader with transformers: at once where it is imported already, else as soon as it is.

`import hf_sparse` thus costs milliseconds, and who only wants `hf-sparse --help` does not wait for torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# The module that holds the table of quantization methods; from_pretrained cannot run without it.
_TABLE = "transformers.quantizers.auto"


def register_when_imported() -> None:
    """Register the loader now, or after the import of transformers' table of quantization methods."""
    if _TABLE in sys.modules:
        _register()
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


def _register() -> None:
    # Importing it registers. Where that import is under way already, and is what brought the table in, it does so at
    # its end.
    importlib.import_module("hf_sparse.inference.loading")


class _Watcher(MetaPathFinder):
    """Finds nothing itself: lets the others find the table, and registers once it has been executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
