"""The endpoint that is evaluated: where it is, whether it answers, and how what it says is told to people."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import httpx

from control_plane.evaluation.errors import EndpointFailed, InvalidOption
from control_plane.version_facts import read_version_facts

TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Endpoint:
    """``model`` at the server ``url``. ``version`` is the version folder that it serves: lm-eval counts tokens with its
    tokenizer. The key is never shown.
    """

    url: str
    model: str
    version: Path
    api_key: str = field(repr=False)

    @property
    def max_model_len(self) -> int:
        """Longest prompt + output in tokens; raises InvalidOption."""
        length = read_version_facts(self.version).max_model_len
        if not isinstance(length, int):
            raise InvalidOption(
                f"version has value {str(self.version)!r}, which has no model.json with max_model_len; expected the "
                "version folder that the model serves"
            )
        return length

    def check(self) -> None:
        """Ask for the model before anything else is done; raises EndpointFailed."""
        if not self.url.startswith(("http://", "https://")):
            raise InvalidOption(f"url has value {self.url!r:.200}; expected an address such as http://127.0.0.1:8080")
        headers = {"Authorization": f"Bearer {self.api_key}"}
        try:
            response = httpx.get(
                f"{self.url}/v1/models/{quote(self.model, safe='')}",
                headers=headers,
                timeout=TIMEOUT_S,
                trust_env=False,
            )
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise EndpointFailed(f"no endpoint answers at {self.url} ({error}); start it with llmos up") from None
        if response.is_error:
            raise EndpointFailed(refusal(self.url, response.status_code, response.text))


def refusal(url: str, status: int, text: str) -> str:
    """One sentence for a response that is an error; ``text`` is its body."""
    try:
        said = httpx.Response(status, text=text).json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        said = " ".join(text.split())[:300] or "nothing"
    hint = "; set LLMOS_API_KEY to a key of a developer" if status in (401, 403) else ""
    return f"the endpoint {url} answered {status}: {said}{hint}"
