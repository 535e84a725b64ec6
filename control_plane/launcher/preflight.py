"""Can this machine run llmos? Every problem in one go, each with what is wrong and how to mend it.

Runs before anything is installed or started, so that the first thing a person sees is not the tenth process's log.
"""

from __future__ import annotations

import shutil
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from control_plane.errors import PreflightError
from control_plane.launcher import libpython, redis_server, triton_server
from control_plane.launcher.processes import SHARED_MEMORY
from control_plane.registry.model_directory import installed_models
from control_plane.settings import Settings
from control_plane.signatures import Signer, SigningError, TrustedKeys

MIB, GIB = 1 << 20, 1 << 30
SHARED_MEMORY_NEEDED = 64 * MIB
MEMORY_NEEDED = 2 * GIB
DISK_NEEDED_FIRST = 3 * GIB
DISK_NEEDED_LATER = 512 * MIB
PYTHONS = ((3, 11), (3, 12))


@dataclass(frozen=True)
class Problem:
    what: str
    how_to_mend: str

    def __str__(self) -> str:
        return f"{self.what} {self.how_to_mend}"


def check(settings: Settings) -> None:
    """Raises PreflightError with one line per problem."""
    problems = find_problems(settings)
    if problems:
        raise PreflightError("\n".join(str(problem) for problem in problems))


def find_problems(settings: Settings) -> list[Problem]:
    return [
        *_python(settings),
        *_programs(settings),
        *_database(settings),
        *_keys(settings),
        *_ports(settings),
        *_shared_memory(),
        *_disk(settings),
        *_memory(),
    ]


def check_stub(settings: Settings) -> None:
    """After Triton is installed: would its Python process start? Raises PreflightError."""
    missing = triton_server.missing_libraries(settings)
    if any(name.startswith("libpython") for name in missing):
        raise PreflightError(libpython.problem())
    if missing:
        stub = triton_server.TritonInstallation.of(settings).stub
        raise PreflightError(f"{stub} needs {', '.join(missing)}: not found. Install the packages they are in.")


def _python(settings: Settings) -> Iterator[Problem]:
    if sys.version_info[:2] not in PYTHONS:
        found = ".".join(str(part) for part in sys.version_info[:2])
        yield Problem(f"This is Python {found}; llmos needs 3.11 or 3.12.", "Make .venv with one of those.")
    elif settings.triton_bin is None:
        try:
            libpython.provide(settings)
        except PreflightError as error:
            yield Problem(str(error), "")


def _programs(settings: Settings) -> Iterator[Problem]:
    if settings.starts_redis:
        try:
            redis_server.find_binary()
        except PreflightError as error:
            yield Problem(str(error), "")
    if settings.triton_bin is not None and not settings.triton_bin.exists():
        yield Problem(f"{settings.triton_bin} does not exist.", "Mend LLMOS_TRITON_BIN or unset it.")


def _database(settings: Settings) -> Iterator[Problem]:
    if not settings.database_url.startswith("postgresql"):
        return
    # Imported here: needed only with a database server.
    from sqlalchemy import create_engine, make_url
    from sqlalchemy.exc import SQLAlchemyError

    from control_plane import databases

    url = make_url(settings.database_url)
    engine = create_engine(url, **databases.engine_options(url))
    try:
        with engine.connect() as connection:
            encoding = connection.exec_driver_sql("SHOW server_encoding").scalar()
        if encoding != "UTF8":
            how = f"Make it anew: createdb --template=template0 --encoding=UTF8 {url.database}."
            yield Problem(f"The database {url} has the encoding {encoding}; llmos needs UTF8.", how)
    except SQLAlchemyError as error:
        reason = databases.reason_of(error)
        yield Problem(f"The database {url} does not answer: {reason}.", "Start it or mend LLMOS_DATABASE_URL.")
    finally:
        engine.dispose()


def ports(settings: Settings) -> dict[str, tuple[str, int]]:
    """The variable that sets it → (address, port), for every port that llmos will listen on."""
    listed = {
        "LLMOS_WEB_PORT": (settings.host, settings.web_port),
        "LLMOS_TRITON_HTTP_PORT": ("127.0.0.1", settings.triton_http_port),
        "LLMOS_TRITON_GRPC_PORT": ("127.0.0.1", settings.triton_grpc_port),
        "LLMOS_TRITON_METRICS_PORT": ("127.0.0.1", settings.triton_metrics_port),
    }
    if settings.starts_redis:
        listed["LLMOS_REDIS_PORT"] = ("127.0.0.1", settings.redis_port)
    return listed


def _keys(settings: Settings) -> Iterator[Problem]:
    """Of signatures; found now rather than at the end of a long export."""
    try:
        if settings.signing_key is not None:
            Signer(settings.signing_key)
        if settings.trusted_keys is not None:
            TrustedKeys(settings.trusted_keys).keys()
    except SigningError as error:
        yield Problem(f"{error}.", "")


def _ports(settings: Settings) -> Iterator[Problem]:
    listed = ports(settings)
    count = Counter(port for _, port in listed.values())
    for variable, (address, port) in listed.items():
        if count[port] > 1:
            yield Problem(f"{variable} has value {port}, and so has another port of llmos.", "Give each its own.")
        else:
            error = _bind_error(address, port)
            if error is not None:
                yield Problem(f"Port {port} on {address} {error}.", f"Stop that or set {variable} to a free port.")


def _bind_error(address: str, port: int) -> str | None:
    """Why nobody can listen there, or None."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            # As the servers do: a port whose last connections are just closing is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(target)
            probe.listen(1)
    except OSError as error:
        owner = owner_of(port)
        return f"is taken by {owner}" if owner else f"cannot be used: {error.strerror or error}"
    return None


def owner_of(port: int) -> str | None:
    """``process <pid> (<command line>)`` of whoever listens on ``port``; processes of other users may stay unknown."""
    for connection in psutil.net_connections("tcp"):
        if connection.status != psutil.CONN_LISTEN or not connection.laddr or connection.laddr.port != port:
            continue
        if connection.pid is None:
            return "a process of another user"
        try:
            command = " ".join(psutil.Process(connection.pid).cmdline())
        except psutil.Error:
            command = "?"
        return f"process {connection.pid} ({command[:120]})"
    return None


def _shared_memory() -> Iterator[Problem]:
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0
    if free < SHARED_MEMORY_NEEDED:
        yield Problem(
            f"{SHARED_MEMORY} has {free // MIB} MiB free; Triton needs {SHARED_MEMORY_NEEDED // MIB}.",
            "In Docker: --shm-size=1g; else: sudo mount -o remount,size=1G /dev/shm.",
        )


def _disk(settings: Settings) -> Iterator[Problem]:
    is_first_start = not installed_models(settings.model_repository) or not triton_server.is_installed(settings)
    needed = DISK_NEEDED_FIRST if is_first_start else DISK_NEEDED_LATER
    folder = next(parent for parent in (settings.home, *settings.home.parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        yield Problem(
            f"{folder} has {free / GIB:.1f} GiB of disk space free; {needed / GIB:.1f} are needed.",
            "Free some, or set LLMOS_HOME to a folder on another disk.",
        )
    yield from _writable(settings.home, "LLMOS_HOME")
    yield from _writable(settings.model_repository, "LLMOS_MODEL_REPOSITORY")


def _writable(folder: Path, variable: str) -> Iterator[Problem]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        yield Problem(f"{folder} cannot be written: {error.strerror}.", f"Set {variable} to a folder of yours.")


def _memory() -> Iterator[Problem]:
    available = psutil.virtual_memory().available
    if available < MEMORY_NEEDED:
        yield Problem(
            f"{available / GIB:.1f} GiB of memory are available; {MEMORY_NEEDED / GIB:.0f} are needed.",
            "Close other programs or use a larger machine.",
        )
