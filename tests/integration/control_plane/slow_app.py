"""A web application for gunicorn whose Triton is scripted: one word every 100 ms, or silence.

It writes a line to ``LLMOS_HOME/cancelled`` when a request is closed before its end.
"""

from __future__ import annotations

import time
from functools import partial

from control_plane import create_app, upgrade_database
from control_plane.registry.places import Place
from control_plane.settings import Settings
from control_plane.triton_fake import FakeTriton, word_by_word
from tests.served import say_loaded, serve

settings = Settings.from_environment()


class RecordingTriton(FakeTriton):
    def generate_many(self, calls, timeout_s, is_abandoned=None):
        is_finished = False
        try:
            yield from super().generate_many(calls, timeout_s, is_abandoned)
            is_finished = True
        finally:
            if not is_finished:
                with (settings.home / "cancelled").open("a") as stream:
                    stream.write(f"{time.time()}\n")


upgrade_database(settings)
app = create_app(settings, RecordingTriton({"starter": partial(word_by_word, pause_s=0.1), "quick": word_by_word}))
with app.app_context():
    serve("starter")
    serve("quick")
say_loaded(settings, Place("starter", 1), Place("quick", 1))
