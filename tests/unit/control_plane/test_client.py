"""What the client says of a server that does not answer, and what the command line makes of it."""

from __future__ import annotations

import httpx
import pytest

from control_plane import client
from control_plane.client import ApiError, ControlPlane, Unreachable
from control_plane.commands import keys
from control_plane.commands.api import named_values
from control_plane.errors import BadRequest

pytestmark = pytest.mark.unit


def failing(error: type[httpx.TransportError]) -> ControlPlane:
    def answer(request: httpx.Request) -> httpx.Response:
        raise error("broken", request=request)

    return ControlPlane("http://llmos", "llmos_key", transport=httpx.MockTransport(answer))


@pytest.mark.parametrize("error", [httpx.ConnectError, httpx.ConnectTimeout])
def test_without_a_connection_nothing_was_done(error):
    with pytest.raises(Unreachable, match="no llmos answers at http://llmos"):
        failing(error).models()


@pytest.mark.parametrize("error", [httpx.ReadTimeout, httpx.ReadError, httpx.RemoteProtocolError])
def test_lost_answer_is_not_taken_for_nobody_there(error):
    with pytest.raises(ApiError, match="may have been done") as raised:
        failing(error).models()
    assert not isinstance(raised.value, Unreachable)


@pytest.mark.parametrize(("error", "num_made"), [(httpx.ConnectError, 1), (httpx.ReadTimeout, 0)])
def test_key_is_written_into_the_database_only_if_nobody_could_be_asked(monkeypatch, error, num_made):
    made = []
    monkeypatch.setattr(client, "ControlPlane", lambda url, key: failing(error))
    monkeypatch.setattr(keys, "_create_directly", lambda *given: made.append(given) or "llmos_new")
    monkeypatch.setenv("LLMOS_API_KEY", "llmos_key")
    try:
        keys.create("laptop")
    except ApiError:
        assert error is httpx.ReadTimeout
    assert len(made) == num_made


@pytest.mark.parametrize("key", ["llmos_schlüssel", "llmos key", "llmos_key\n", ""])
def test_key_that_cannot_be_one_is_refused_without_showing_it(key):
    with pytest.raises(BadRequest, match="holds characters that no key has; copy it") as refused:
        ControlPlane("http://llmos", key)
    assert "schl" not in str(refused.value)


@pytest.mark.parametrize(
    ("value", "parsed"),
    [
        ("50", 50),
        ('"50"', "50"),
        ("chat", "chat"),
        ('{"a": [true]}', {"a": [True]}),
        ("NaN", "NaN"),
        ("-Infinity", "-Infinity"),
        ("1e999", "1e999"),
        ("[NaN]", "[NaN]"),
    ],
)
def test_values_are_json_where_they_are_some(value, parsed):
    assert named_values([f"name={value}"]) == {"name": parsed}
