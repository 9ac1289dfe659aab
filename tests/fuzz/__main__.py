"""Run one kind of fuzz in this process: python -m tests.fuzz KIND FOLDER COUNT SEED [FIRST].

A process of its own, so that a crash, a hang or a huge allocation is a result and not the end of a test run. The
number of the case under way is in FOLDER/case; FIRST starts there, and COUNT 1 runs it alone.
"""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import sys
import traceback
from collections import Counter
from pathlib import Path

import torch
import transformers as tf

from tests.fuzz.cases import KINDS, Wrong
from tests.fuzz.guard import Guard, limit_memory

SECONDS = 10
# A case has files of 60 kB; most of this is what imports and caches take while the sweep goes on.
MEMORY = 160 * 2**20


def sweep(kind: str, folder: Path, count: int, seed: int, first: int = 0) -> dict[str, object]:
    """Run `count` cases from number `first`; every one that is wrong goes on stderr.

    Returns:
        {"answers": {answer: count}, "wrong": count, "watched": files seen to be opened, "grown": bytes}.
    """
    torch.set_num_threads(1)
    # What the libraries hold is no garbage, and a million errors give reason to look for some.
    gc.freeze()
    tf.utils.logging.set_verbosity(tf.utils.logging.CRITICAL)
    tf.utils.logging.disable_progress_bar()
    os.chdir(folder)
    case = KINDS[kind](folder)
    guard = Guard(case.broken, case.out)
    number_file = os.open(folder / "case", os.O_RDWR | os.O_CREAT)
    answers: Counter[str] = Counter()
    wrong = before = 0
    for number in range(first, first + count):
        if number == first + 20:
            # By now everything is imported and cached that a case needs.
            limit_memory(MEMORY)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        os.pwrite(number_file, f"{number:10d}\n".encode(), 0)
        found = ""
        with guard.watching(SECONDS):
            try:
                answers[case.run(random.Random(f"{kind} {seed} {number}"), number)] += 1
            except Wrong as error:
                found = str(error)
            except BaseException:  # noqa: BLE001 (a mistake of the fuzz or an error that no reader may let through)
                found = traceback.format_exc()
        found = found or "; ".join(guard.broken[:3])
        if Path("EXECUTED").exists():
            found = "something was executed"
        if found:
            wrong += 1
            print(f"{kind} seed {seed} case {number}: {found}", file=sys.stderr)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return {"answers": dict(answers), "wrong": wrong, "watched": guard.watched, "grown": grown}


def sweep_into(kind: str, folder: Path, count: int, seed: int) -> None:
    """Run cases and leave what `sweep` gives in FOLDER/result.json."""
    (folder / "result.json").write_text(json.dumps(sweep(kind, folder, count, seed)))


if __name__ == "__main__":
    place = Path(sys.argv[2])
    place.mkdir(parents=True, exist_ok=True)
    print(json.dumps(sweep(sys.argv[1], place, *map(int, sys.argv[3:]))))
