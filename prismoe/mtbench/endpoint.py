"""An endpoint that speaks OpenAI's chat completions, over the standard library's HTTP."""

from __future__ import annotations

import http.client
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from threading import Event
from typing import Any, NoReturn
from urllib.parse import urlsplit

from prismoe.errors import ResourceError, UsageError
from prismoe.mtbench.requests import reply_text

__all__ = ["Endpoint", "Failed"]

TRIES = 6
LONGEST_PAUSE = 60.0
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_MAX_REPLY = 16 << 20
_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)


class Failed(ResourceError):
    """One request that got no answer in all its tries."""


class _Again(Exception):
    """Worth another try, after `pause` seconds where the server named a time."""

    def __init__(self, found: str, pause: float | None = None) -> None:
        super().__init__(found)
        self.pause = pause


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to whatever host it names."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Endpoint:
    """Chat completions at `url`.

    Args:
        url: with or without `/chat/completions` at its end.
        key_env: the environment variable that holds the API key; it is sent to that host alone, never shown or kept.
            None for an endpoint without.
        pause: seconds before the second try; each later one waits twice as long, or as long as the server says.
        timeout: seconds for one reply.

    Raises:
        UsageError: no http(s) address, one with a password in it, an empty variable, or a key that would travel
            unencrypted.
    """

    def __init__(self, url: str, *, key_env: str | None = None, pause: float = 1.0, timeout: float = 300.0) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise UsageError("not the address of an endpoint", where="judge", needed="such as https://HOST/v1")
        if parts.username is not None or parts.password is not None:
            raise UsageError("a password in the address", where="judge", needed="key_env=VARIABLE")
        self._key = None
        if key_env is not None:
            self._key = os.environ.get(key_env, "").strip()
            if not self._key or not self._key.isascii() or not self._key.isprintable():
                raise UsageError("no key in this environment variable", where=f"key_env {key_env}")
            if parts.scheme == "http" and parts.hostname not in _LOOPBACK:
                raise UsageError("the key would travel unencrypted", where="judge", needed="https")
        path = parts.path.rstrip("/").removesuffix("/chat/completions")
        self.url = f"{parts.scheme}://{parts.netloc}{path}/chat/completions"
        self._pause, self._timeout = pause, timeout
        self._opener = urllib.request.build_opener(_NoRedirect)

    def complete(self, body: Mapping[str, Any], *, stop: Event) -> str:
        """The text of a completion. Busy and failing servers, lost connections and malformed replies get `TRIES` tries.

        Raises:
            Failed: none of them gave a completion, or `stop` was set.
            UsageError: the server refuses the request as such: a wrong key, model or address.
        """
        found = "stopped"
        for attempt in range(TRIES):
            if stop.is_set():
                break
            try:
                return self._once(body)
            except _Again as again:
                found = str(again)
                pause = self._pause * 2**attempt if again.pause is None else again.pause
                if attempt + 1 < TRIES:
                    stop.wait(min(pause, LONGEST_PAUSE))
        raise Failed(found, where=self.url)

    def _once(self, body: Mapping[str, Any]) -> str:
        headers = {"Content-Type": "application/json", "User-Agent": "prismoe"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers, method="POST")
        try:
            with self._opener.open(request, timeout=self._timeout) as reply:
                data = reply.read(_MAX_REPLY)
        except urllib.error.HTTPError as error:
            self._refused(error)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise _Again(f"no reply ({self._shown(str(reason) or type(error).__name__)})") from error
        try:
            text = reply_text(json.loads(data))
        except ValueError:
            text = None
        if text is None:
            raise _Again("malformed reply: no choices[0].message.content in it")
        return text

    def _refused(self, error: urllib.error.HTTPError) -> NoReturn:
        with error:
            told = f"status {error.code}: {self._shown(_message(error))}".removesuffix(": ")
        if error.code in _AGAIN:
            after = error.headers.get("Retry-After") or ""
            raise _Again(told, float(after) if re.fullmatch(r"\d{1,6}(\.\d+)?", after) else None)
        raise UsageError(
            told, where=self.url, hint="judge= names the endpoint, judge_model= the model, key_env= the key"
        )

    def _shown(self, text: str) -> str:
        """One short printable line, in which the key is not."""
        if self._key is not None:
            text = text.replace(self._key, "…")
        return "".join(letter for letter in " ".join(text.split())[:200] if letter.isprintable())


def _message(error: urllib.error.HTTPError) -> str:
    """What the server says of it."""
    try:
        data = error.read(1 << 16)
    except (OSError, http.client.HTTPException):
        return ""
    try:
        found = json.loads(data)["error"]
        return str(found["message"] if isinstance(found, dict) else found)
    except (ValueError, KeyError, TypeError):
        return data.decode(errors="replace")
