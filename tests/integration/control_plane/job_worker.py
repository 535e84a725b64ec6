"""The real worker with kinds of jobs for tests: ``celery --app=tests.integration.control_plane.job_worker worker``."""

from __future__ import annotations

from control_plane.job_kinds import KINDS
from tests.integration.control_plane.job_kinds import TEST_KINDS

KINDS.update(TEST_KINDS)

# It builds the application, which takes the kinds that are there by then.
from control_plane.worker import celery  # noqa: E402

__all__ = ["celery"]
