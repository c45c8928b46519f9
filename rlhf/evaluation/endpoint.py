"""A client of an OpenAI-compatible endpoint: one chat completion per call, retried, cached, without ever showing the key.

Imported only where a recipe has such a judge. The protocol: https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import requests
import requests.auth

from rlhf.config.evaluated import EndpointJudge
from rlhf.errors import UserError, quote
from rlhf.files import read_json_lines

PARAMETERS = {"temperature": 0, "max_tokens": 512}
MAX_REPLY = 10_000_000  # bytes
FIRST_DELAY, MAX_DELAY = 1.0, 60.0  # seconds before the second try, and before any
RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}
NO_MONEY = ("insufficient_quota", "billing_hard_limit_reached")  # a 429 that waiting does not cure
REFUSED = ("content_filter", "content_policy_violation", "ResponsibleAIPolicyViolation")
TOO_LONG = ("context_length_exceeded", "string_above_max_length", "maximum context length")


@dataclass(frozen=True)
class Reply:
    """What the model said; `text` is None where it gave no answer, and `why` says why (`refused`, `too long`)."""

    text: str | None
    why: str = ""


class _Bearer(requests.auth.AuthBase):
    """Sends the key. As `auth` and not as a header, which a .netrc of the user would replace."""

    def __init__(self, key: str | None):
        self.key = key

    def __call__(self, request):
        if self.key:
            request.headers["Authorization"] = f"Bearer {self.key}"
        return request


class _TryAgain(Exception):
    """A failure that another try may not meet; `wait_s` as the server asks for, if it does."""

    def __init__(self, reason: str, wait_s: float | None = None):
        super().__init__(reason)
        self.wait_s = wait_s


class Endpoint:
    """Asks one model at one endpoint; threads may share it.

    Args:
        where: place of the judge in the recipe, for messages.
        folder: what was answered is kept there, so that no call is paid twice; None: nowhere.
    """

    def __init__(self, judge: EndpointJudge, where: str, folder: Path | None = None, rank: int = 0):
        self.judge, self.where = judge, where
        self.key = _key(judge, where)
        self.address = judge.endpoint.rstrip("/")
        self.parameters = {k: v for k, v in (PARAMETERS | judge.parameters).items() if v is not None}
        self.calls = 0
        self._local, self._lock = threading.local(), threading.Lock()
        self._file: IO[bytes] | None = None
        self._known: dict[str, Reply] = {}
        self._path = folder / f"replies-{rank}.jsonl" if folder else None
        for path in sorted(folder.glob("replies-*.jsonl")) if folder else ():
            self._known |= dict(filter(None, map(_entry, read_json_lines(path))))

    def check(self) -> str:
        """Ask whether the server is there and takes the key; loads and costs nothing.

        Returns:
            A sentence about what looks wrong but may be right, or ''.

        Raises:
            UserError: nobody answers there, or the key is refused.
        """
        try:
            answer = self._session().get(f"{self.address}/models", timeout=10, allow_redirects=False)
        except requests.RequestException as error:
            raise UserError(f"{self.where}: {self._name()} can't be reached: {self._clean(_short(error))}") from None
        if answer.status_code in (401, 403):
            raise UserError(f"{self.where}: {self._name()} {self._refusal(answer.status_code)}")
        try:
            listed = [model["id"] for model in answer.json()["data"]] if answer.status_code == 200 else []
        except (ValueError, KeyError, TypeError):
            return ""
        if listed and self.judge.model not in listed:
            return f"{self.address} lists no model {quote(self.judge.model)}, but {', '.join(map(str, listed[:5]))}"
        return ""

    def ask(self, messages: list[dict[str, str]]) -> Reply:
        """The model's reply to a conversation; from the cache if it has been given before.

        Raises:
            UserError: the server refuses the request, or still fails after all tries.
        """
        body = {"model": self.judge.model, "messages": messages, **self.parameters}
        key = hashlib.sha256(json.dumps([self.address, body], sort_keys=True).encode()).hexdigest()
        if key not in self._known:
            reply = self._ask(body)
            with self._lock:
                self._known[key] = reply
                self._keep({"key": key, "text": reply.text, "why": reply.why})
        return self._known[key]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _ask(self, body: dict[str, Any]) -> Reply:
        for attempt in range(self.judge.retries + 1):
            try:
                return self._once(body)
            except _TryAgain as error:
                reason, wait_s = str(error), error.wait_s
            if attempt < self.judge.retries:
                backoff = min(MAX_DELAY, FIRST_DELAY * 2**attempt) * random.uniform(0.5, 1)
                time.sleep(min(wait_s, 2 * MAX_DELAY) if wait_s is not None else backoff)
        raise UserError(
            f"{self.where}: {self._name()} failed {self.judge.retries + 1} times, at last with: {reason}. What has been judged "
            "is kept; the same command resumes"
        )

    def _once(self, body: dict[str, Any]) -> Reply:
        with self._lock:
            self.calls += 1
        deadline = time.monotonic() + self.judge.timeout_s
        try:
            with self._session().post(
                f"{self.address}/chat/completions", json=body, timeout=self.judge.timeout_s, stream=True,
                allow_redirects=False,
            ) as answer:  # fmt: skip
                content = bytearray()
                for chunk in answer.iter_content(16):  # requests waits for that many bytes, however slowly they come
                    content += chunk
                    if time.monotonic() > deadline:  # requests' own timeout restarts with every chunk
                        raise _TryAgain(f"no whole reply within {self.judge.timeout_s:g} s")
                    if len(content) > MAX_REPLY:
                        raise _TryAgain(f"a reply of more than {MAX_REPLY:,} bytes")
        except requests.Timeout:
            raise _TryAgain(f"no reply within {self.judge.timeout_s:g} s") from None
        except requests.RequestException as error:
            raise _TryAgain(self._clean(_short(error))) from None
        text = self._clean(content.decode("utf-8", "replace"))
        if answer.status_code != 200:
            return self._failure(answer.status_code, text, answer.headers.get("Retry-After"))
        return _reply(text)

    def _failure(self, status: int, text: str, retry_after: str | None) -> Reply:
        if status == 400 and any(mark in text for mark in REFUSED):
            return Reply(None, "refused")
        if status in (400, 413) and (status == 413 or any(mark in text for mark in TOO_LONG)):
            return Reply(None, "too long")
        said = f"HTTP {status}: {' '.join(text.split())[:300] or 'no text'}"
        if status in RETRIED and not any(mark in text for mark in NO_MONEY):
            raise _TryAgain(said, _seconds(retry_after))
        if status in (401, 403):
            raise UserError(f"{self.where}: {self._name()} {self._refusal(status)}")
        raise UserError(f"{self.where}: {self._name()} refuses the request: {said}")

    def _refusal(self, status: int) -> str:
        if self.key:
            return f"refuses the key in {self.judge.api_key_env} (HTTP {status})"
        return f"wants a key (HTTP {status}); name the environment variable that has it: `api_key_env: NAME`"

    def _session(self) -> requests.Session:
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
            self._local.session.auth = _Bearer(self.key)
        return self._local.session

    def _keep(self, line: dict[str, Any]) -> None:
        if self._path is None:
            return
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "ab")
            self._file.write(b"\n")  # a kill may have cut the last line
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _name(self) -> str:
        return f"the judge {self.judge.label} at {self.address}"

    def _clean(self, text: str) -> str:
        """A text of the server's or the library's without the key."""
        return text.replace(self.key, "…") if self.key else text


def _key(judge: EndpointJudge, where: str) -> str | None:
    if judge.api_key_env is None:
        return None
    key = os.environ.get(judge.api_key_env, "").strip()
    if not key:
        raise UserError(f"{where}: the judge {judge.label} needs a key in the environment variable {judge.api_key_env}, which is not set")  # fmt: skip
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{where}: what is in {judge.api_key_env} can't be a key: it has a line break or letters that HTTP can't send")  # fmt: skip
    return key


def _reply(text: str) -> Reply:
    """The reply in the body of a 200.

    Raises:
        _TryAgain: it is no chat completion.
    """
    try:
        choice = json.loads(text)["choices"][0]
        message = choice["message"]
        content, refusal = message.get("content"), message.get("refusal")
    except (ValueError, LookupError, TypeError, AttributeError):
        raise _TryAgain(f"no chat completion, but {quote(text[:200])}") from None
    if refusal or choice.get("finish_reason") == "content_filter":
        return Reply(None, "refused")
    if not isinstance(content, str):
        raise _TryAgain(f"no text in the reply, but {quote(content)}")
    return Reply(content)


def _entry(line: dict[str, Any]) -> tuple[str, Reply] | None:
    key, text, why = line.get("key"), line.get("text"), line.get("why")
    if not isinstance(key, str) or not isinstance(why, str) or not (text is None or isinstance(text, str)):
        return None
    return key, Reply(text, why)


def _seconds(retry_after: str | None) -> float | None:
    try:
        return max(0.0, float(retry_after)) if retry_after is not None else None
    except ValueError:  # a date
        return None


def _short(error: Exception) -> str:
    """The innermost reason of a request's failure in one line."""
    reason = getattr(error.args[0], "reason", None) if error.args else None
    text = " ".join(str(reason or error).split())
    return text.rpartition(": ")[2][:200] or type(error).__name__
