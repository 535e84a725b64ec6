"""Finds the shared library of the running Python, which Triton's Python backend embeds.

It must be the very release that made the virtual environment: with another one the extension modules of the standard
library (``_ssl``, …) do not load. Debian and Ubuntu keep it in a package of its own, which is unpacked without root if
it is not installed.

    LLMOS_TRITON_DIR/lib/3.11.7/libpython3.11.so.1.0      a link, or the unpacked file; the only file on LD_LIBRARY_PATH
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from control_plane.errors import PreflightError
from control_plane.settings import Settings

_PRINT_VERSION = (
    "import ctypes, sys; version = ctypes.CDLL(sys.argv[1]).Py_GetVersion; version.restype = ctypes.c_char_p; "
    "print(version().decode().split()[0])"
)


def library_name() -> str:
    return f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"


def library_folder(settings: Settings) -> Path:
    return settings.triton_dir / "lib" / platform.python_version()


def provide(settings: Settings) -> Path:
    """Make sure that ``library_folder`` holds the library and return the folder; raises PreflightError."""
    folder = library_folder(settings)
    target = folder / library_name()
    if target.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    for candidate in _candidates():
        if candidate.exists() and _version_of(candidate) == platform.python_version():
            target.symlink_to(candidate)
            return folder
    if not _unpack_debian_package(target):
        raise PreflightError(problem())
    return folder


def problem() -> str:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return (
        f"{library_name()} of Python {platform.python_version()} was not found, and Triton needs it. "
        f"On Debian and Ubuntu: sudo apt install libpython{version}; with pyenv, build Python with --enable-shared."
    )


def _candidates() -> Iterator[Path]:
    configured = (sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("LIBPL"))
    for folder in filter(None, (*configured, f"{sys.base_prefix}/lib", "/usr/lib")):
        yield Path(folder) / library_name()
        yield Path(folder) / (sysconfig.get_config_var("MULTIARCH") or "") / library_name()


def _version_of(library: Path) -> str:
    # In a child: a process that has loaded two Pythons is not to be trusted with anything else.
    result = subprocess.run([sys.executable, "-c", _PRINT_VERSION, library], capture_output=True, text=True)
    return result.stdout.strip()


def _unpack_debian_package(target: Path) -> bool:
    package = f"libpython{sys.version_info.major}.{sys.version_info.minor}"
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        if subprocess.run(["apt-get", "download", package], cwd=folder, capture_output=True).returncode != 0:
            return False
        for archive in Path(folder).glob("*.deb"):
            subprocess.run(["dpkg", "-x", archive, "unpacked"], cwd=folder, capture_output=True)
        for library in Path(folder).rglob(library_name()):
            if _version_of(library) == platform.python_version():
                shutil.copy(library, target)
                return True
    return False
