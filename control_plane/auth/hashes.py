"""Hashes of secrets: argon2 for passwords, which people choose, and sha256 for random tokens, which nobody guesses."""

from __future__ import annotations

import hashlib
import threading
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager

import argon2

from control_plane.errors import BadRequest, Overloaded

MIN_PASSWORD_LENGTH = 12
MAX_PASSWORD_LENGTH = 256
# RFC 9106's second recommendation: 64 MiB and some tenths of a second for every guess.
TIME_COST, MEMORY_KIB, PARALLELISM = 3, 64 * 1024, 4
# Each hash takes MEMORY_KIB, so many at once could be used to exhaust the machine.
MAX_HASHES_AT_ONCE = 2
WAIT_S = 3.0
NOBODY = "$argon2id$v=19$m=65536,t=3,p=4$+/X5QIvUNY5c7iAW36TK/Q$VUdoTDt4K1R/n+tKPkBNwaAIbFAff1iBziR0AAlJggY"
"""Hash of a random password that was thrown away: what is compared where there is no user."""


class Passwords:
    """Makes and compares hashes of passwords, a few at a time. One per web process, shared by its threads."""

    def __init__(self) -> None:
        self._hasher = argon2.PasswordHasher(TIME_COST, MEMORY_KIB, PARALLELISM)
        self._slots = threading.BoundedSemaphore(MAX_HASHES_AT_ONCE)

    def hash(self, password: str) -> str:
        """Raises BadRequest for a password that is too short or too long, without repeating it."""
        length = len(_normal(password[: MAX_PASSWORD_LENGTH + 1]))
        if length < MIN_PASSWORD_LENGTH or len(password) > MAX_PASSWORD_LENGTH:
            raise BadRequest(
                f"password has {length} characters; expected {MIN_PASSWORD_LENGTH} to {MAX_PASSWORD_LENGTH}"
            )
        with self._slot():
            return self._hasher.hash(_normal(password))

    def verify(self, password_hash: str | None, password: str) -> bool:
        """Whether the password is the one; takes as long for no hash at all as for a wrong password."""
        # One that no user can have is compared all the same, but not read at its full length.
        candidate = _normal(password[: MAX_PASSWORD_LENGTH + 1])
        with self._slot():
            try:
                self._hasher.verify(password_hash or NOBODY, candidate)
            except argon2.exceptions.VerifyMismatchError:
                return False
        return password_hash is not None and len(password) <= MAX_PASSWORD_LENGTH

    def is_outdated(self, password_hash: str) -> bool:
        """Whether it was made with other costs than today's."""
        return self._hasher.check_needs_rehash(password_hash)

    @contextmanager
    def _slot(self) -> Iterator[None]:
        if not self._slots.acquire(timeout=WAIT_S):
            raise Overloaded("too many passwords are being checked at once; try again")
        try:
            yield
        finally:
            self._slots.release()


def sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", errors="surrogatepass")).hexdigest()


def _normal(password: str) -> str:
    # Keyboards differ in how they compose an accent.
    return unicodedata.normalize("NFKC", password)
