"""Builds the native CPU kernels along with the package. All else about it is in setup.cfg."""

import importlib.util
import os
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

KERNELS = Path("hf_sparse/inference/kernels")

# Loaded by path: importing the package would need torch, which an isolated build does not have.
spec = importlib.util.spec_from_file_location("build_kernels", KERNELS / "build.py")
build_kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build_kernels)


class BuildKernels(build_ext):
    """Compiles with build.py; the library is loaded with ctypes, so its name carries no Python version."""

    def get_ext_filename(self, fullname: str) -> str:
        """Name the library."""
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Build it, or let setuptools warn and go on without: the extension is optional."""
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            build_kernels.build(output.resolve())
        except build_kernels.BuildError as error:
            raise CompileError(
                f"the native CPU kernels are left out, models will run in plain torch: {error}"
            ) from error


setup(
    ext_modules=[
        Extension(
            "hf_sparse.inference.kernels._native",
            sources=sorted(map(str, (KERNELS / "native").glob("*.cpp"))),
            depends=sorted(map(str, (KERNELS / "native").glob("*.h"))),
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
