"""Compile the Triton programs for a Hopper GPU on a machine that has none, and read what the compiler made of them.

    python benchmarks/gpu_compile.py            every plan of every shape: registers, spills, shared memory

A plan whose program does not compile, spills registers by the dozen, or wants more shared memory than a multiprocessor
has, is no candidate.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from hf_sparse.core.stored.packing import LayerFormat  # noqa: E402
from hf_sparse.inference.kernels import BlockIndex  # noqa: E402
from hf_sparse.inference.kernels.gpu import programs  # noqa: E402
from hf_sparse.inference.kernels.gpu.launch import options  # noqa: E402
from hf_sparse.inference.kernels.gpu.layout import Side, backward_side, forward_side  # noqa: E402
from hf_sparse.inference.kernels.gpu.plan import MAX_SHARED, Plan, candidates  # noqa: E402

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
BLOCKS = [(8, 1), (16, 1), (32, 1), (64, 1), (128, 1), (16, 16), (32, 32), (64, 64), (128, 128), (32, 16), (64, 16)]
TOKENS = [1, 16, 64, 512, 4096]


def source(side: Side, plan: Plan, dtype: torch.dtype) -> tuple[ASTSource, dict[str, Any]]:
    """Give what the compiler is handed when a plan is launched: every number a multiple of 16."""
    kind, listed = TYPES[dtype], side.block is not None
    fixed: dict[str, Any] = {
        "HEIGHT": side.height, "WIDTH": side.width, "M": plan.m, "O": plan.o, "K": plan.k, "HAS_BIAS": True,
        "ACTIVATION": "gelu", "PRECISION": "ieee",
        "EARLY": plan.early,
        "BOXED": plan.boxed,
    }  # fmt: skip
    program = {"few": programs.few_program, "gather": programs.gather_program, "copy": programs.copy_program}
    found = program[plan.program]
    if plan.program != "few":
        fixed |= {"GROUP": plan.group, "SWAPPED": plan.swapped, "LISTED": listed}
    if plan.program == "gather":
        fixed |= {
            "STRIDE_ROW": side.stride_row, "STRIDE_INNER": side.stride_inner, "FEATURES_FIRST": plan.features_first,
        }  # fmt: skip
    fixed["stride_xm" if plan.features_first else "stride_xk"] = 1
    fixed = {name: value for name, value in fixed.items() if name in found.arg_names}
    box = (plan.k, plan.o) if listed else (plan.o, plan.k)
    boxes = {"x_desc": (plan.m, plan.k), "values_desc": box, "y_desc": (plan.m, plan.o)}
    kinds = {name: f"tensordesc<{kind}[{high}, {wide}]>" for name, (high, wide) in boxes.items()}
    pointers = dict.fromkeys(("x_ptr", "values_ptr", "bias_ptr", "y_ptr"), f"*{kind}")
    signature = {}
    for name in found.arg_names:
        if name in fixed:
            signature[name] = "constexpr"
        elif name.endswith("_desc"):
            signature[name] = kinds[name]
        elif name.endswith("_ptr"):
            signature[name] = pointers.get(name, "*i32")
        else:
            signature[name] = "i32"
    aligned = [name for name, given in signature.items() if given.startswith("*") or name.startswith("stride")]
    attrs = {(found.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned if name not in fixed}
    return ASTSource(found, signature, fixed, attrs), options(plan)


def compile_plan(side: Side, plan: Plan, dtype: torch.dtype) -> dict[str, Any]:
    """Compile a plan: {"shared", "registers", "spills", "wgmma", "mma", "copies"} or {"error"}."""
    made, options = source(side, plan, dtype)
    try:
        kernel = triton.compile(made, target=TARGET, options=options)
    except Exception as error:  # noqa: BLE001
        return {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:200]}"}
    ptx = kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    used = re.search(r"REG:(\d+) STACK:(\d+)", told)
    return {
        "shared": kernel.metadata.shared,
        "registers": int(used[1]) if used else None,
        "spills": len(re.findall(r"\bSTL\b", sass)),
        "wgmma": len(re.findall(r"\bHGMMA\b", sass)),
        "mma": len(re.findall(r"\bHMMA\b", sass)),
        "wide": len(re.findall(r"LDG\S*\.128|LDGSTS\S*\.128|UBLKCP|UTMALDG", sass)),
        "ptx": len(ptx),
    }


def sides(block: tuple[int, int]) -> dict[str, Side]:
    """Give both directions of a small weight with blocks of this shape."""
    layer = LayerFormat(block_shape=block, kept=2, dense_shape=(2 * block[0], 2 * block[1]))
    index = BlockIndex(layer, torch.tensor([0, 1]), torch.tensor([0, 1]))
    found = {"forward": forward_side(index)}
    if block[1] >= 16:
        found["backward"] = backward_side(index)
    return found


def main() -> None:
    """Compile everything and print a line for each plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--block", nargs="+", default=["x".join(map(str, block)) for block in BLOCKS])
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    todo = {}
    for name in options.dtype:
        for text in options.block:
            height, width = map(int, text.split("x"))
            for direction, side in sides((height, width)).items():
                for tokens in TOKENS:
                    for plan in candidates(side, tokens, getattr(torch, name)):
                        todo[name, text, direction, plan] = side
    bad = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = {key: pool.submit(compile_plan, side, key[3], getattr(torch, key[0])) for key, side in todo.items()}
        for key, job in jobs.items():
            found = job.result()
            wrong = "error" in found or found["shared"] > MAX_SHARED or found["spills"] > 32
            bad += wrong
            print("BAD " if wrong else "ok  ", *key[:3], key[3], found, flush=True)
    sys.exit(f"{bad} of {len(todo)} plans are no candidates." if bad else None)


if __name__ == "__main__":
    main()
