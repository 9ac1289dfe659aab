"""`pip install` with one moving line instead of a page per package; all that pip said is in a log file.

Usage: pip_install.py LOG ARGUMENTS...
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable
from typing import TextIO

LAST_LINES = 20


def main(log: str, arguments: list[str]) -> int:
    """Run pip and return its exit status; when it fails, show its last lines and where the log is."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--progress-bar=raw",
        "--no-input",
        "--disable-pip-version-check",
    ]
    start = time.monotonic()
    with open(log, "w", encoding="utf-8") as record, subprocess.Popen(
        [*command, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True,
    ) as pip:  # fmt: skip
        last = _follow(pip.stdout or [], record, f"installing {' '.join(arguments)}")
    seconds = time.monotonic() - start
    if pip.returncode:
        print(*last, f"pip failed after {seconds:.0f} s; the whole log is in {log}", sep="\n", file=sys.stderr)
    else:
        print(f"installed {' '.join(arguments)} in {seconds:.0f} s")
    return pip.returncode


def _follow(lines: Iterable[str], record: TextIO, title: str) -> deque[str]:
    # A terminal gets one line that changes, a file a new line every few seconds.
    moving = sys.stdout.isatty()
    interval = 0.1 if moving else 5.0
    last: deque[str] = deque(maxlen=LAST_LINES)
    packages, doing, shown = 0, "", 0.0
    for line in map(str.rstrip, lines):
        if progress := re.fullmatch(r"Progress (\d+) of (\d+)", line):
            done, total = (int(part) / 2**20 for part in progress.groups())
            state = f"{doing} {done:.0f}/{total:.0f} MiB"
        else:
            last.append(line)
            record.write(line + "\n")
            # As in "Collecting a>=1" or "  Downloading a-1.0.whl (2 MB)".
            if not (step := re.match(r"\s*(Collecting|Downloading|Using|Building|Installing) (.*)", line)):
                continue
            packages += step[1] == "Collecting"
            doing = state = f"{step[1].lower()} {step[2].split(' (')[0].split('/')[-1]}"[:60]
        if time.monotonic() - shown >= interval:
            shown = time.monotonic()
            text = f"{title}: {packages} packages, {state}"
            print(f"\r\033[K{text[:119]}" if moving else text, end="" if moving else "\n", flush=True)
    if moving:
        print("\r\033[K", end="", flush=True)
    return last


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
