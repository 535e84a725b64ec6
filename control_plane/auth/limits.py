"""How often somebody may ask, counted in Redis minute by minute.

A minute begins with the first request in it. Redis holds nothing that must last: while it is away nothing is counted,
everything is allowed, and the log says so.
"""

from __future__ import annotations

import ipaddress
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import redis
import structlog
from flask import Flask, Response, current_app
from flask_limiter import Limiter, RateLimitExceeded
from limits import RateLimitItemPerMinute
from limits.errors import ConfigurationError
from redis.backoff import NoBackoff
from redis.retry import Retry

from control_plane.auth.principal import Principal
from control_plane.errors import LoginFailed, RateLimited, SettingsError
from control_plane.responses import render_error
from control_plane.settings import Settings

FAILED_LOGINS_PER_MINUTE = 10
PREFIX = "llmos"
MINUTE_S = 60
# A Redis that does not answer must not make everybody wait. Once more at once, because a pooled connection may be one
# to a Redis that was restarted.
REDIS_OPTIONS: dict[str, Any] = {
    "socket_connect_timeout": 0.5,
    "socket_timeout": 0.5,
    "retry": Retry(NoBackoff(), 1),
}

log = structlog.get_logger(__name__)


class RateLimits:
    """The counters of one web process, shared by its threads.

    ``who`` is asked for whoever sent the current request, and answers None if it costs nobody one. Requests are counted
    by Flask-Limiter before every view. Tokens and failed logins are known only afterwards, so views ask for what is
    left, and spend.
    """

    def __init__(self, app: Flask, settings: Settings, who: Callable[[], Principal | None]) -> None:
        self._default = settings.requests_per_minute
        self._who = who
        self._limiter = Limiter(
            self._actor,
            application_limits=[self._requests_per_minute],
            application_limits_exempt_when=lambda: self._who() is None,
            storage_uri=settings.redis_url,
            storage_options=REDIS_OPTIONS,
            strategy="fixed-window",
            key_prefix=PREFIX,
            swallow_errors=True,
        )
        try:
            self._limiter.init_app(app)
        except (ConfigurationError, ValueError):
            # Neither the value nor the reason is shown: both may have a password.
            raise SettingsError("LLMOS_REDIS_URL is no address of a Redis; expected redis://host:port/0.") from None
        self._limiter.logger.addFilter(_as_one_warning)
        app.register_error_handler(RateLimitExceeded, self._too_many_requests)

    def check_tokens(self, principal: Principal) -> None:
        """Raises RateLimited if the tokens of this minute are spent."""
        limit = principal.tokens_per_minute
        if limit is not None and not self._is_left(limit, principal.actor, "tokens"):
            wait_s = self._wait_s(limit, principal.actor, "tokens")
            raise RateLimited(f"{principal.actor} has used its {limit} tokens of this minute; {_later(wait_s)}", wait_s)

    def spend_tokens(self, principal: Principal, num_tokens: int) -> None:
        if principal.tokens_per_minute is not None and num_tokens > 0:
            self._spend(principal.tokens_per_minute, principal.actor, "tokens", cost=num_tokens)

    @contextmanager
    def failed_logins(self, address: str | None) -> Iterator[None]:
        """Around one attempt; raises RateLimited after too many that failed from this address."""
        subject = _network(address)
        # Counted before it has failed, else many at once would all be let in; given back if it succeeds.
        if not self._spend(FAILED_LOGINS_PER_MINUTE, subject, "logins"):
            wait_s = self._wait_s(FAILED_LOGINS_PER_MINUTE, subject, "logins")
            raise RateLimited(f"too many logins from {address} have failed; {_later(wait_s)}", wait_s)
        has_failed = False
        try:
            yield
        except LoginFailed:
            has_failed = True
            raise
        finally:
            if not has_failed:
                self._spend(FAILED_LOGINS_PER_MINUTE, subject, "logins", cost=-1)

    def _requests_per_minute(self) -> str:
        principal = self._who()
        own = None if principal is None else principal.requests_per_minute
        return f"{own or self._default}/minute"

    def _actor(self) -> str:
        principal = self._who()
        return "" if principal is None else principal.actor

    def _too_many_requests(self, _: RateLimitExceeded) -> Response:
        reached = self._limiter.current_limit
        assert reached is not None
        wait_s = _seconds_until(self._counted(lambda: reached.window.reset_time, None))
        sentence = f"{self._actor()} has sent its {reached.limit.amount} requests of this minute; {_later(wait_s)}"
        return render_error(RateLimited(sentence, wait_s))

    def _is_left(self, limit: int, *subject: str) -> bool:
        return self._counted(lambda: self._limiter.limiter.test(RateLimitItemPerMinute(limit), PREFIX, *subject), True)

    def _spend(self, limit: int, *subject: str, cost: int = 1) -> bool:
        """Whether that was still within the limit."""
        item = RateLimitItemPerMinute(limit)
        return self._counted(lambda: self._limiter.limiter.hit(item, PREFIX, *subject, cost=cost), True)

    def _wait_s(self, limit: int, *subject: str) -> int:
        item = RateLimitItemPerMinute(limit)
        stats = self._counted(lambda: self._limiter.limiter.get_window_stats(item, PREFIX, *subject), None)
        return _seconds_until(None if stats is None else stats.reset_time)

    def _counted(self, ask: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return ask()
        except redis.RedisError as error:
            log.warning("rate_limits_not_counted", reason=str(error))
            return otherwise


def rate_limits() -> RateLimits:
    found: RateLimits = current_app.extensions["rate_limits"]
    return found


def _seconds_until(at: float | None) -> int:
    """At least one; a minute if nobody knows when this one ends."""
    return MINUTE_S if at is None else max(1, round(at - time.time()))


def _later(wait_s: int) -> str:
    return f"try again in {wait_s} s"


def _network(address: str | None) -> str:
    """What one attacker has of addresses: one of IPv4, 2^64 of IPv6."""
    try:
        parsed = ipaddress.ip_address(address or "")
    except ValueError:
        return address or "unknown"
    # What an IPv4 client looks like to a socket of IPv6.
    parsed = getattr(parsed, "ipv4_mapped", None) or parsed
    return str(ipaddress.ip_network((parsed, 64), strict=False)) if parsed.version == 6 else str(parsed)


def _as_one_warning(record: logging.LogRecord) -> bool:
    """Flask-Limiter shows a whole traceback at every request while Redis is away; one line says the same."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, redis.RedisError):
        record.levelno, record.levelname = logging.WARNING, "WARNING"
        record.msg, record.args, record.exc_info = "rate_limits_not_counted: %s", (str(error),), None
    return True
