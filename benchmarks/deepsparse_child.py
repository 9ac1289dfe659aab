"""The half of against_deepsparse.py that runs where deepsparse is installed; it needs nothing of hf_sparse.

Usage: deepsparse_child.py ONNX INPUT.npy VALUES.npy THREADS LIMITS
"""

from __future__ import annotations

import json
import sys

import deepsparse
import numpy
import onnxruntime
from timing import time_in_turns


def main(onnx: str, given: str, values: str, threads: int, limits: dict) -> None:
    """Time both engines in turn, save the values of DeepSparse, and print the times as JSON."""
    x = numpy.load(given)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    engine = deepsparse.Engine(onnx, batch_size=x.shape[0], num_cores=threads)
    numpy.save(values, engine.run([x])[0])
    timings = time_in_turns(
        {"onnxruntime": lambda: session.run(None, {"x": x}), "deepsparse": lambda: engine.run([x])},
        threads=threads,
        **limits,
    )
    versions = {"deepsparse": deepsparse.__version__, "onnxruntime": onnxruntime.__version__}
    rows = {name: timing.row() for name, timing in timings.items()}
    print(json.dumps({"versions": versions, "cpu": str(engine.cpu_avx_type), "timings": rows}))


if __name__ == "__main__":
    _, model, given, values, threads, limits = sys.argv
    main(model, given, values, int(threads), json.loads(limits))
