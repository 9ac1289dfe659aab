"""What no input may do: open or change anything outside its folder, start or execute anything, take memory or time."""

from __future__ import annotations

import importlib
import os
import resource
import signal
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hf_sparse

# Where Python itself reads from: libraries that are imported late, and what they look up of the machine.
_CODE = tuple(
    {os.path.realpath(path) + os.sep for path in (
        sys.prefix, sys.base_prefix, sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"),
        Path(hf_sparse.__file__).parents[1],
    )}
)  # fmt: skip
_MACHINE = ("/proc/", "/sys/", "/dev/null", "/dev/urandom")
_FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.startfile", "subprocess.Popen",
    "socket.connect", "socket.getaddrinfo", "socket.bind", "pickle.find_class", "ctypes.dlopen",
    "webbrowser.open", "os.symlink", "os.link", "os.chmod", "os.chown", "os.putenv",
)  # fmt: skip
_PATHS = {"open": 0, "os.listdir": 0, "os.scandir": 0, "os.remove": 0, "os.rmdir": 0, "os.mkdir": 0, "os.rename": 0,
          "os.truncate": 0, "shutil.rmtree": 0, "shutil.copyfile": 0, "shutil.move": 0}  # fmt: skip
_CHANGES = ("os.remove", "os.rmdir", "os.mkdir", "os.rename", "os.truncate", "shutil.rmtree", "shutil.move")
# Modules of the safetensors library are not written in Python, and what they open is no event of it.
_OPENERS = ("hf_sparse.core.stored.reading", "transformers.modeling_utils")


class Guard:
    """Watches this process. `broken` lists what was done that must not be, while `watching`."""

    def __init__(self, *folders: Path) -> None:
        self.folders = tuple(os.path.realpath(folder) + os.sep for folder in folders)
        self.broken: list[str] = []
        self.watched = 0
        self._armed = False
        sys.addaudithook(self._event)
        for name in _OPENERS:
            module: Any = importlib.import_module(name)
            module.safe_open = self._opener(module.safe_open)

    @contextmanager
    def watching(self, seconds: int) -> Iterator[None]:
        """Watch one case, and let the system end this process after so many seconds."""
        self.broken.clear()
        self._armed = True
        signal.alarm(seconds)
        try:
            yield
        finally:
            signal.alarm(0)
            self._armed = False

    def _event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._armed:
            return
        if event in _FORBIDDEN:
            self.broken.append(f"{event}{arguments!r}"[:300])
        elif event in _PATHS and isinstance(arguments[_PATHS[event]], str | bytes):
            self._path(os.fsdecode(arguments[_PATHS[event]]), event, self._writes(event, arguments))
        elif event == "exec" and self._is_inside(getattr(arguments[0], "co_filename", "")):
            self.broken.append(f"executed {arguments[0]!r}")
        elif event == "import" and isinstance(arguments[1], str) and self._is_inside(arguments[1]):
            self.broken.append(f"imported {arguments[1]}")

    @staticmethod
    def _writes(event: str, arguments: tuple[Any, ...]) -> bool:
        if event != "open":
            return event in _CHANGES
        flags = arguments[2] if isinstance(arguments[2], int) else 0
        return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))

    def _path(self, path: str, event: str, writes: bool) -> None:
        self.watched += 1
        if "\0" in path:
            # No system opens that.
            return
        if self._is_inside(path) or (not writes and os.path.realpath(path).startswith((*_CODE, *_MACHINE))):
            return
        self.broken.append(f"{event} {path} {'to write' if writes else ''}")

    def _is_inside(self, path: str) -> bool:
        return (os.path.realpath(path) + os.sep).startswith(self.folders)

    def _opener(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def open_watched(path: Any, *arguments: Any, **options: Any) -> Any:
            if self._armed:
                self._path(os.fspath(path), "safe_open", writes=False)
            return real(path, *arguments, **options)

        return open_watched


def limit_memory(more: int) -> None:
    """Let this process map `more` bytes beyond what it has now; what asks for more gets an error."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + more, now + more))
