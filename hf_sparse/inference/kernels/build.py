"""Build the native CPU kernels: one C++ source, compiled once per instruction set, linked into one library.

Uses no package but the standard library, because `setup.py` runs it before anything is installed. By hand:
`python hf_sparse/inference/kernels/build.py` builds the library in place.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "native"
LIBRARY = "_native.so"

# What each instruction set needs of the compiler, and how many floats its registers hold. No -march=native: the
# library must run on any machine of the architecture, and picks the set when it is loaded.
INSTRUCTION_SETS: dict[str, tuple[int, list[str]]] = {"portable": (4, [])}
if platform.machine().lower() in ("x86_64", "amd64"):
    AVX512 = ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"]
    INSTRUCTION_SETS["avx2"] = (8, ["-mavx2", "-mfma"])
    INSTRUCTION_SETS["avx512"] = (16, AVX512)
    PAIRS = [*AVX512, "-mavx512bf16", "-DHFS_PAIRS"]
    INSTRUCTION_SETS["avx512bf16"] = (16, PAIRS)
    INSTRUCTION_SETS["amx"] = (16, [*PAIRS, "-mamx-tile", "-mamx-bf16", "-DHFS_TILES"])

COMMON_FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-Wall", "-Wextra"),
    # Contraction gives fused multiply-add; the others let comparisons and conversions vectorise. NaN and infinity
    # keep their meaning: -ffast-math would not.
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    # Vectors wider than the machine's registers never cross a function boundary of the interface.
    "-Wno-psabi",
]
# The kernels are vectors already: looking for more in them only takes time.
KERNEL_FLAGS = ["-fno-tree-vectorize", "-fno-tree-slp-vectorize"]


class BuildError(RuntimeError):
    """The native kernels could not be built. The message holds the command and what the compiler said."""


def find_compiler() -> str | None:
    """Give the path of a GCC or Clang C++ compiler: `$CXX` if set, else the first of g++, clang++, c++ on the path."""
    for name in filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++")):
        if path := shutil.which(name):
            return path
    return None


def build(output: Path) -> list[str]:
    """Compile and link the kernels.

    Args:
        output: path of the library to write; replaced whole or not at all.

    Returns:
        The instruction sets in the library. One that the compiler does not know is left out, "portable" never.

    Raises:
        BuildError: if there is no compiler, or the portable kernels do not compile or link.
    """
    library = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        built = _compile(library, INSTRUCTION_SETS, COMMON_FLAGS, ["-shared"], [SOURCES / "dispatch.cpp"])
        os.replace(library, output)
    finally:
        library.unlink(missing_ok=True)
    return built


def build_test(output: Path) -> list[str]:
    """Compile the native tests with AddressSanitizer and UBSan, every instruction set emulated on the one at hand.

    Args:
        output: path of the program to write.

    Returns:
        The instruction sets in the program.

    Raises:
        BuildError: if there is no compiler, or something does not compile or link.
    """
    # Vectors of 16 floats are legal C++ on any machine: what is emulated is their width, not their meaning.
    emulated = {
        isa: (lanes, [flag for flag in flags if not flag.startswith("-m")])
        for isa, (lanes, flags) in INSTRUCTION_SETS.items()
    }
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]
    flags = [*(flag for flag in COMMON_FLAGS if not flag.startswith(("-fno-exceptions", "-fno-rtti"))), *sanitize]
    sources = [SOURCES / "dispatch.cpp", SOURCES / "tests" / "kernels_test.cpp"]
    return _compile(output, emulated, [*flags, "-DHFS_EMULATED"], ["-pthread"], sources)


def _compile(
    output: Path, sets: dict[str, tuple[int, list[str]]], flags: list[str], link_flags: list[str], sources: list[Path]
) -> list[str]:
    compiler = find_compiler()
    if compiler is None:
        raise BuildError("no C++ compiler: none of $CXX, g++, clang++, c++ was found.")
    with tempfile.TemporaryDirectory() as folder:
        objects = {isa: Path(folder, f"{isa}.o") for isa in sets}

        def compile_kernel(isa: str) -> BuildError | None:
            lanes, isa_flags = sets[isa]
            defines = [f"-DHFS_ISA={isa}", f"-DHFS_LANES={lanes}"]
            command: list[str | Path] = [
                compiler,
                *flags,
                *KERNEL_FLAGS,
                *isa_flags,
                *defines,
                "-c",
                SOURCES / "kernel.cpp",
            ]
            try:
                _run([*command, "-o", objects[isa]])
            except BuildError as error:
                return error
            return None

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            errors = dict(zip(sets, pool.map(compile_kernel, sets), strict=True))
        if (error := errors["portable"]) is not None:
            raise error
        built = [isa for isa, error in errors.items() if error is None]
        for isa in sorted(set(sets) - set(built)):
            logger.warning("%s cannot compile the %s kernels; they are left out: %s", compiler, isa, errors[isa])
        defines = [f"-DHFS_WITH_{isa.upper()}" for isa in built]
        _run([compiler, *flags, *defines, *link_flags, *sources, *(objects[isa] for isa in built), "-o", output])
    return built


def _run(command: list[str | Path]) -> None:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(words)}\n{done.stderr.strip()}")


def main(words: list[str]) -> int:
    """Build the library in place, or with "test" build the native tests and run them; give the exit code."""
    try:
        if words == ["test"]:
            with tempfile.TemporaryDirectory() as folder:
                program = Path(folder, "kernels_test")
                logger.info("testing the kernels for %s", ", ".join(build_test(program)))
                return subprocess.run([program], check=False).returncode
        logger.info("built %s for %s", LIBRARY, ", ".join(build(Path(__file__).parent / LIBRARY)))
    except BuildError as failure:
        logger.error("%s", failure)
        return 1
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(main(sys.argv[1:]))
