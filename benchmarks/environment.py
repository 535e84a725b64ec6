"""Makes .venv-bench, the environment of the peers that llmos is measured beside.

``python benchmarks/environment.py`` makes it or brings it up to date and tries peers again that could not be installed;
``ensure`` is for other scripts. It lies beside .venv and never touches it. A peer that has to be compiled and cannot be
is recorded in .venv-bench/absent.json with the reason, so that a table can say why it is missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".venv-bench"
PYTHON = FOLDER / "bin" / "python"
CONSTRAINTS = ROOT / "constraints.txt"
REQUIREMENTS = ROOT / "benchmarks" / "requirements.txt"
OPTIONAL = ROOT / "benchmarks" / "requirements-optional.txt"
STAMP = FOLDER / ".installed"
ABSENT = FOLDER / "absent.json"
COMPILE_TIMEOUT_S = 1800


class InstallFailed(Exception):
    """pip could not install something; the message says what and why."""


def ensure(*, retry: bool = False) -> dict[str, str]:
    """Make or update the environment; returns the optional packages that it lacks, with reasons.

    An optional package that once failed is tried again if the requirements have changed, or with ``retry``. Raises
    InstallFailed if a package that is not optional cannot be installed.
    """
    wanted = _fingerprint()
    current = STAMP.exists() and STAMP.read_text(encoding="utf-8") == wanted
    if not current:
        _say(f"Making {FOLDER}")
        venv.create(FOLDER, with_pip=True)
        _pip(["-r", str(REQUIREMENTS)], timeout_s=None)
    if retry or not current:
        absent = {}
        for requirement in requirements_in(OPTIONAL.read_text(encoding="utf-8")):
            _say(f"Installing {requirement}; if it has to be compiled, this takes minutes")
            try:
                _pip([requirement], timeout_s=COMPILE_TIMEOUT_S)
            except InstallFailed as error:
                absent[requirement.partition("==")[0]] = str(error)
        ABSENT.write_text(json.dumps(absent, indent=2) + "\n", encoding="utf-8")
        STAMP.write_text(wanted, encoding="utf-8")
    found: dict[str, str] = json.loads(ABSENT.read_text(encoding="utf-8"))
    return found


def requirements_in(text: str) -> list[str]:
    """The lines of a requirements file that are neither empty nor a comment."""
    return [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def _fingerprint() -> str:
    contents = b"\0".join(path.read_bytes() for path in (CONSTRAINTS, REQUIREMENTS, OPTIONAL))
    return hashlib.sha256(contents).hexdigest()


def _pip(arguments: list[str], timeout_s: float | None) -> None:
    """Install; raises InstallFailed. A pip that is given up takes its compilers along."""
    # CMake would use every core for a package that nobody waits for alone.
    variables = {"CMAKE_BUILD_PARALLEL_LEVEL": str(max(1, (os.cpu_count() or 1) // 2)), **os.environ}
    command = [str(PYTHON), "-m", "pip", "install", "-q", "-c", str(CONSTRAINTS), *arguments]
    process = subprocess.Popen(
        command, env=variables, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wanted = " ".join(arguments)
    try:
        _, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        raise InstallFailed(f"pip install {wanted} was not done after {COMPILE_TIMEOUT_S // 60} minutes") from error
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode:
        last = [line for line in errors.splitlines() if line.strip()][-1:]
        raise InstallFailed(f"pip install {wanted} failed: {' '.join(last) or f'exit code {process.returncode}'}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    for name, why in ensure(retry=True).items():
        print(f"{name} is absent: {why}")
    print(f"{FOLDER} is ready")
