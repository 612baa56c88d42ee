"""The one build path: pip -> setuptools -> CMake + Ninja. What is built, and how, stands in CMakeLists.txt."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
OPS_LIBRARY = "libelang_ops.so"


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        build = Path(self.build_temp).resolve()
        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        package.mkdir(parents=True, exist_ok=True)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
        configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build), f"-DPython_EXECUTABLE={sys.executable}"]
        subprocess.run([*configure, *shlex.split(os.environ.get("CMAKE_ARGS", ""))], check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)
        shutil.copy2(build / OPS_LIBRARY, package)
        shutil.copy2(next(build.glob("_C.*")), self.get_ext_fullpath(ext.name))

    def copy_extensions_to_source(self) -> None:
        # An editable install copies the Python extension alone: the ops library has to land beside it.
        super().copy_extensions_to_source()
        for ext in self.extensions:
            built = Path(self.build_lib, *ext.name.split(".")).parent / OPS_LIBRARY
            self.copy_file(str(built), str(ROOT / "elang" / OPS_LIBRARY))

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), str(Path(self.build_lib, "elang", OPS_LIBRARY))]


setup(ext_modules=[Extension("elang._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
