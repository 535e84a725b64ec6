"""Every environment variable llmos reads, in one table: name, type, default, why.

``Settings.from_environment()`` is called once, at the door of each process; everything else is handed a ``Settings``.
A bad value stops the program with a sentence that names the variable, its value and what was expected. The table in
README.md is checked against this file by tests/test_docs.py.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

from control_plane.errors import SettingsError

PROJECT_ROOT = Path(__file__).resolve().parent.parent
SERVICE_LINK = re.compile(r"LLMOS_(\w+_)?(SERVICE_(HOST|PORT)\w*|PORT(_\d+_(TCP|UDP)\w*)?)")
"""What Kubernetes sets by itself beside services called llmos, llmos-db, …"""


def _text(value: str) -> str:
    if not value.strip():
        raise ValueError("a non-empty text")
    return value


def _path(value: str) -> Path:
    """Whatever folder a command is started in, its installation is the same."""
    path = Path(_text(value)).expanduser()
    found = (PROJECT_ROOT / path).resolve()
    if path.resolve().exists() and not found.exists():
        raise ValueError(f"an absolute path, since {path.resolve()} exists, but a relative one would mean {found}")
    return found


def _optional_path(value: str) -> Path | None:
    return _path(value) if value else None


def _optional_text(value: str) -> str | None:
    return value or None


def _database_url(value: str) -> str | None:
    form = r"sqlite://.*|postgresql(\+psycopg)?://([^/]*@)?(\[[^]]*\]|[^:/@]*)(:\d+)?(/.*)?"
    if value and not re.fullmatch(form, value):
        raise ValueError("sqlite:///PATH or postgresql+psycopg://USER:PASSWORD@HOST:PORT/NAME")
    return value or None


def _port(value: str) -> int:
    if not value.isdigit() or not 1 <= int(value) <= 65535:
        raise ValueError("a port from 1 to 65535")
    return int(value)


def _count(value: str) -> int:
    if not value.isdigit() or int(value) < 1:
        raise ValueError("a whole number ≥ 1")
    return int(value)


def _days(value: str) -> int:
    if not value.isdigit() or not 1 <= int(value) <= 36500:
        raise ValueError("a whole number of days from 1 to 36500")
    return int(value)


def _number(value: str) -> int:
    if not value.isdigit():
        raise ValueError("a whole number ≥ 0")
    return int(value)


def _seconds(value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError("a number of seconds > 0")
    return seconds


def _name(value: str) -> str:
    if not value.replace("-", "").replace("_", "").replace(".", "").isalnum() or not value[0].isalnum():
        raise ValueError("letters, digits, '.', '_' and '-', beginning with a letter or digit")
    return value


def _setting(variable: str, parse: Callable[[str], Any], default: str, why: str) -> Any:
    metadata = {"variable": variable, "parse": parse, "default": default, "why": why}
    return field(default_factory=lambda: parse(default), metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """Settings of one installation. Paths are absolute."""

    home: Path = _setting(
        "LLMOS_HOME", _path, str(PROJECT_ROOT / ".llmos"), "data of this installation: database, logs, checkpoints"
    )
    model_repository: Path = _setting(
        "LLMOS_MODEL_REPOSITORY", _path, str(PROJECT_ROOT / "model_repository"), "folder that Triton serves"
    )
    triton_dir: Path = _setting(
        "LLMOS_TRITON_DIR", _path, str(PROJECT_ROOT / ".triton"), "where the local Triton server is installed"
    )
    triton_bin: Path | None = _setting(
        "LLMOS_TRITON_BIN", _optional_path, "", "tritonserver to run instead of the one in LLMOS_TRITON_DIR"
    )
    host: str = _setting("LLMOS_HOST", _text, "127.0.0.1", "address that the web server binds")
    web_port: int = _setting("LLMOS_WEB_PORT", _port, "8080", "web pages, REST and /v1")
    triton_http_port: int = _setting("LLMOS_TRITON_HTTP_PORT", _port, "8000", "Triton HTTP, loopback only")
    triton_grpc_port: int = _setting("LLMOS_TRITON_GRPC_PORT", _port, "8001", "Triton gRPC, loopback only")
    triton_metrics_port: int = _setting("LLMOS_TRITON_METRICS_PORT", _port, "8002", "Triton metrics, loopback only")
    redis_port: int = _setting("LLMOS_REDIS_PORT", _port, "6380", "port of the Redis that llmos starts")
    redis_url_override: str | None = _setting(
        "LLMOS_REDIS_URL", _optional_text, "", "Redis to use instead of starting one"
    )
    database_url_override: str | None = _setting(
        "LLMOS_DATABASE_URL", _database_url, "", "SQLite or PostgreSQL; a SQLite file in LLMOS_HOME if empty"
    )
    artifacts_url_override: str | None = _setting(
        "LLMOS_ARTIFACTS_URL", _optional_text, "", "fsspec URL of the artifact store; a folder in LLMOS_HOME if empty"
    )
    retry_days: int = _setting(
        "LLMOS_RETRY_DAYS", _days, "7", "how long a failed or cancelled job can be run again; then its files go"
    )
    garbage_days: int = _setting(
        "LLMOS_GARBAGE_DAYS", _days, "30", "how long llmos gc spares old exports, and the artifacts of retired versions"
    )
    web_threads: int = _setting("LLMOS_WEB_THREADS", _count, "64", "requests that the web server handles at once")
    api_key: str | None = _setting(
        "LLMOS_API_KEY", _optional_text, "", "API key of the llmos command; the installation's own if empty"
    )
    signing_key: Path | None = _setting(
        "LLMOS_SIGNING_KEY",
        _optional_path,
        "",
        "private key, a PEM file, that signs what is put into the artifact store",
    )
    trusted_keys: Path | None = _setting(
        "LLMOS_TRUSTED_KEYS",
        _optional_path,
        "",
        "folder of public keys; only what one of them signed is installed, if set",
    )
    starter_model: str = _setting("LLMOS_STARTER_MODEL", _name, "starter", "model that the first start makes")
    probe_interval_s: float = _setting(
        "LLMOS_PROBE_INTERVAL_S", _seconds, "2", "pause between the reconciler's one-token probes"
    )
    probe_timeout_s: float = _setting(
        "LLMOS_PROBE_TIMEOUT_S", _seconds, "10", "a model that does not answer a probe for this long is reloaded"
    )
    warm_s: float = _setting(
        "LLMOS_WARM_S", _seconds, "600", "how long a replaced version stays loaded, for a rollback at once"
    )
    request_timeout_s: float = _setting(
        "LLMOS_REQUEST_TIMEOUT_S", _seconds, "600", "longest time one /v1 request may take"
    )
    num_proxies: int = _setting(
        "LLMOS_NUM_PROXIES", _number, "0", "proxies in front of the web server, whose X-Forwarded-For is believed"
    )
    requests_per_minute: int = _setting(
        "LLMOS_REQUESTS_PER_MINUTE", _count, "6000", "requests of a key without a limit of its own, or of a user"
    )
    request_limit_bytes: int = _setting(
        "LLMOS_REQUEST_LIMIT_BYTES", _count, "1048576", "largest request body that the web server reads"
    )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """Read the variables; raises SettingsError for the first bad one and for an unknown LLMOS_ name."""
        environment = os.environ if environment is None else environment
        _refuse_unknown(environment, [setting.metadata["variable"] for setting in fields(cls)])
        values = {}
        for setting in fields(cls):
            variable, parse = setting.metadata["variable"], setting.metadata["parse"]
            raw = environment.get(variable, setting.metadata["default"])
            try:
                values[setting.name] = parse(raw)
            except ValueError as error:
                # A URL may hold a password.
                shown = re.sub(r"://.*@", "://…@", raw)
                raise SettingsError(f"{variable} has value {shown!r}; expected {error}.") from None
        return cls(**values)

    @property
    def database_url(self) -> str:
        return self.database_url_override or f"sqlite:///{self.home / 'llmos.db'}"

    @property
    def redis_url(self) -> str:
        return self.redis_url_override or f"redis://127.0.0.1:{self.redis_port}/0"

    @property
    def starts_redis(self) -> bool:
        """Whether this installation runs a Redis of its own."""
        return self.redis_url_override is None

    @property
    def triton_http_url(self) -> str:
        return f"127.0.0.1:{self.triton_http_port}"

    @property
    def triton_grpc_url(self) -> str:
        return f"127.0.0.1:{self.triton_grpc_port}"

    @property
    def web_url(self) -> str:
        """Where programs on this machine reach the web server."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.web_port}"

    @property
    def logs_dir(self) -> Path:
        return self.home / "logs"

    @property
    def run_dir(self) -> Path:
        """Sockets, pid files and generated configuration of the running processes."""
        return self.home / "run"

    @property
    def warm(self) -> timedelta:
        """How long a version that was replaced stays loaded."""
        return timedelta(seconds=self.warm_s)

    @property
    def artifacts_url(self) -> str:
        return self.artifacts_url_override or str(self.home / "artifacts")

    @property
    def jobs_dir(self) -> Path:
        """One folder per job that runs or can be run again."""
        return self.home / "jobs"

    @property
    def retry_limit(self) -> timedelta:
        return timedelta(days=self.retry_days)

    @property
    def checkpoints_dir(self) -> Path:
        return self.home / "checkpoints"

    @property
    def versions_dir(self) -> Path:
        """Exported version folders, before they are installed into the model repository."""
        return self.home / "versions"

    @property
    def is_loopback(self) -> bool:
        return self.host in ("127.0.0.1", "localhost", "::1")


def _refuse_unknown(environment: Mapping[str, str], known: Sequence[str]) -> None:
    given = [name for name in environment if name.startswith("LLMOS_") and not SERVICE_LINK.fullmatch(name)]
    unknown = min((name for name in given if name not in known), default=None)
    if unknown is not None:
        closest = difflib.get_close_matches(unknown, known, n=1)
        meant = f"did you mean {closest[0]}?" if closest else "README.md lists those there are; unset it."
        raise SettingsError(f"{unknown} is set, but llmos has no such setting; {meant}")
