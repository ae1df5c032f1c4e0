"""Build the decoding library while the package is installed, if there is a compiler; for setuptools only."""

import importlib.util
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError


class BuildLibrary(build_ext):  # type: ignore[misc]
    """Compile the library for all instruction sets; it is loaded by ctypes, not imported by Python."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return the file's name in the package."""
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Compile it.

        Raises: CompileError, which setuptools prints and goes on after: the extension is optional.
        """
        # By its path: the package itself cannot be imported here, torch may not be installed.
        spec = importlib.util.spec_from_file_location("build", Path(__file__).with_name("build.py"))
        assert spec is not None
        assert spec.loader is not None
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            build.build_all(target)
        except (build.BuildError, OSError) as error:
            raise CompileError(str(error)) from None
