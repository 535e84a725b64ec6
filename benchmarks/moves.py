"""``python -m benchmarks.moves MODEL``: how long traffic takes to move between two loaded versions, under streams.

Needs a running installation (``llmos up``) and a model with two proven versions, the lower one production. Clients
stream through ``/v1`` without a pause while production is moved up and back; a move lasts from the request that asks
for it until the last answer begins that the version before gives. Written to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime

import httpx

from benchmarks.installation import settings_and_key, spread, write
from control_plane.client import ControlPlane

BODY = {"prompt": "The import", "max_tokens": 24, "temperature": 0, "ignore_eos": True, "stream": True}
SETTLE_S = 1.0
VERSION_HEADER = "X-Model-Version"


class Streams:
    """Clients that stream one answer after the other; what fails or is cut is an error.

    ``answers`` are pairs of when a request began, in seconds of the monotonic clock, and the version that answered it.
    """

    def __init__(self, url: str, key: str, model: str, num_clients: int) -> None:
        self._url, self._key, self._model = url, key, model
        self._stopped = threading.Event()
        self.answers: list[tuple[float, int]] = []
        self.errors: list[str] = []
        self._threads = [threading.Thread(target=self._stream) for _ in range(num_clients)]

    def __enter__(self) -> Streams:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def last_start(self, version: int) -> float:
        """When, on the monotonic clock, the last request began that this version answered; 0 if none did."""
        return max((began_at for began_at, found in self.answers if found == version), default=0.0)

    def _stream(self) -> None:
        headers = {"Authorization": f"Bearer {self._key}"}
        with httpx.Client(base_url=self._url, headers=headers, timeout=60, trust_env=False) as client:
            while not self._stopped.is_set():
                began_at = time.monotonic()
                try:
                    with client.stream("POST", "/v1/completions", json={**BODY, "model": self._model}) as response:
                        lines = [line for line in response.iter_lines() if line]
                except httpx.HTTPError as error:
                    self.errors.append(repr(error))
                    continue
                if response.status_code != httpx.codes.OK or lines[-1] != "data: [DONE]" or '"error"' in lines[-2]:
                    self.errors.append(f"{response.status_code}: {lines[-1]}")
                else:
                    self.answers.append((began_at, int(response.headers[VERSION_HEADER])))


def measure(llmos: ControlPlane, streams: Streams, model: str, versions: tuple[int, int], count: int) -> list[float]:
    """Seconds of every move, up and back in turn."""
    moves = []
    for number in range(count):
        before, after = versions if number % 2 == 0 else versions[::-1]
        while llmos.version(model, after)["serving"]["state"] != "Loaded":
            time.sleep(0.1)
        asked_at = time.monotonic()
        llmos.deploy(model, "promote" if after > before else "rollback", after)
        answered_at = time.monotonic()
        time.sleep(SETTLE_S)
        moves.append(max(answered_at, streams.last_start(before)) - asked_at)
        print(f"move {number + 1} of {count}, {before} → {after}: {moves[-1] * 1000:.0f} ms", flush=True)
    return moves


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--versions", type=int, nargs=2, default=[1, 2])
    parser.add_argument("--moves", type=int, default=20)
    parser.add_argument("--clients", type=int, default=16)
    given = parser.parse_args(arguments)
    settings, key = settings_and_key()
    versions = (given.versions[0], given.versions[1])
    with ControlPlane(settings.web_url, key) as llmos:
        # As a canary without requests the second version is loaded before anything is measured.
        llmos.wait_deployment(given.model, llmos.deploy(given.model, "canary", versions[1], weight=0)["id"])
        with Streams(settings.web_url, key, given.model, given.clients) as streams:
            moves = measure(llmos, streams, given.model, versions, given.moves)
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "moves_s": [round(move, 4) for move in moves],
        **spread(moves),
        "clients": given.clients,
        "answers": len(streams.answers),
        "errors": len(streams.errors),
    }
    write("moves", result)
    print(*streams.errors[:5], sep="\n")


if __name__ == "__main__":
    main()
