"""What the rest of the control plane asks of the workers."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass

import redis
from celery import Celery
from kombu.exceptions import OperationalError

from control_plane.errors import ControlPlaneError

CANARY_TASK = "canary"


class WorkerUnavailable(ControlPlaneError):
    status = 503
    code = "worker_unavailable"


@dataclass(frozen=True)
class WorkerPing:
    """A worker ran the canary; ``clock_s`` is its clock, in seconds since the epoch."""

    latency_s: float
    clock_s: float
    pid: int


def ping_worker(celery: Celery, timeout_s: float) -> WorkerPing:
    """Send the canary through the queue and wait for its answer; raises WorkerUnavailable.

    A worker process can be alive and yet consume nothing, so only a task that ran counts. The answer comes through a
    Redis list of our own: Celery's result backend gives up for good once Redis was away for 20 s.
    """
    reply_to = f"llmos:canary:{uuid.uuid4().hex}"
    sent_at = time.monotonic()
    try:
        celery.send_task(CANARY_TASK, args=[reply_to], expires=timeout_s)
        url, limit_s = celery.conf.broker_url, timeout_s + 1
        with redis.Redis.from_url(url, socket_timeout=limit_s, socket_connect_timeout=limit_s) as client:
            reply = client.blpop([reply_to], timeout=timeout_s)
    except (OperationalError, redis.RedisError, OSError) as error:
        raise WorkerUnavailable(f"Redis does not answer: {error}") from error
    if reply is None:
        raise WorkerUnavailable(f"no worker ran the canary task within {timeout_s:g} s")
    answer = json.loads(reply[1])
    return WorkerPing(latency_s=time.monotonic() - sent_at, clock_s=answer["clock_s"], pid=answer["pid"])
