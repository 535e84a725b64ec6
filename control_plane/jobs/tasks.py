"""Celery tasks: what a message makes a worker do. They name no job, and are safe to run twice."""

from __future__ import annotations

import json
import os
import time

import redis
from celery import current_app, shared_task

from control_plane.jobs.runner import run_next as run_next_job

REPLY_TTL_S = 60


@shared_task(name="canary")
def canary(reply_to: str) -> None:
    """Prove that a worker really consumes its queue: put its clock (seconds since the epoch) and pid into a Redis list.

    Redis deletes the list after a minute if nobody waits for it.
    """
    answer = json.dumps({"clock_s": time.time(), "pid": os.getpid()})
    with redis.Redis.from_url(current_app.conf.broker_url) as client, client.pipeline() as pipeline:
        pipeline.rpush(reply_to, answer).expire(reply_to, REPLY_TTL_S).execute()


@shared_task(name="run_next")
def run_next(queue: str) -> None:
    """Run the most urgent job of ``queue``, if there is one. The message is only a knock on the door."""
    run_next_job(current_app.flask_app, queue)
