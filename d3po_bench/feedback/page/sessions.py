"""Signed sessions of the labelling page, and its guards: request rates and headers."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from itsdangerous import BadData, URLSafeTimedSerializer

from d3po_bench.errors import UserError

MOST_SECONDS = 14 * 24 * 60 * 60
"""After so long a rater opens the invitation link again."""


Role = Literal["rater", "admin"]


@dataclass(frozen=True)
class Session:
    """Who is signed in, as the signed cookie says."""

    role: Role
    rater: int
    """0 for the admin."""
    mark: str
    """Of the invitation that it began with: a new invitation ends it."""
    nonce: str


class Sessions:
    """Signs and reads sessions with one key."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._serializer = URLSafeTimedSerializer(key, salt="session")
        # A cookie is sent to every port of a host, where another round may be served.
        self.cookie = f"d3po_feedback_{hmac.new(key, b'cookie', 'sha256').hexdigest()[:12]}"
        """Name of this round's cookie."""

    def begin(self, role: Role, rater: int, token_hash: str) -> str:
        """The cookie of a new session."""
        session = Session(role, rater, _mark(token_hash), secrets.token_urlsafe(16))
        return str(self._serializer.dumps(asdict(session)))

    def read(self, cookie: str | None) -> Session | None:
        """The session in a cookie; None if it is forged, too old, or there is none."""
        if not cookie:
            return None
        try:
            return Session(**self._serializer.loads(cookie, max_age=MOST_SECONDS))
        except (BadData, TypeError, ValueError):
            return None

    def csrf(self, session: Session) -> str:
        """What a form of this session must carry: other sites cannot know it."""
        return hmac.new(self._key, f"csrf/{session.nonce}".encode(), "sha256").hexdigest()

    @staticmethod
    def same(session: Session, token_hash: str) -> bool:
        """Whether the session began with this invitation."""
        return hmac.compare_digest(session.mark, _mark(token_hash))


def _mark(token_hash: str) -> str:
    return hashlib.sha256(f"mark/{token_hash}".encode()).hexdigest()[:32]


def session_key(folder: Path) -> bytes:
    """The signing key kept in `folder`, made on first use and readable by its owner alone.

    Not beside the votes in the database: labels are shared, and whoever has the key can sign in.

    Raises:
        UserError: it can be neither read nor written.
    """
    path = folder / ".session-key"
    try:
        with contextlib.suppress(FileExistsError):
            path.touch(mode=0o600, exist_ok=False)
            path.write_bytes(secrets.token_bytes(32))
        key = path.read_bytes()
    except OSError as problem:
        raise UserError(
            f"Cannot read or write {path}: {problem.strerror}. Make the round's folder writable."
        ) from problem
    if len(key) != 32:
        raise UserError(f"{path} holds {len(key)} bytes, not a key of 32. Remove the file.")
    return key


@dataclass(frozen=True)
class Limits:
    """Requests allowed at once, and then a second."""

    votes: tuple[int, float] = (60, 5.0)
    """Votes, skips and undos, for each rater."""
    pages: tuple[int, float] = (300, 50.0)
    """Pages and pictures, for each rater."""
    sign_ins: tuple[int, float] = (20, 0.5)
    """Wrong sign-ins, for each address."""


class Limiter:
    """Token buckets: `burst` at once, then `rate` a second, for each key. Threads may share it."""

    def __init__(
        self, burst: int, rate: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.burst, self.rate, self._clock = burst, rate, clock
        self._buckets: dict[str, tuple[float, float]] = {}
        self._lock = threading.Lock()

    def allow(self, key: str) -> bool:
        """Whether `key` has something left, which is then taken."""
        with self._lock:
            now = self._clock()
            left, then = self._buckets.get(key, (float(self.burst), now))
            left = min(self.burst, left + (now - then) * self.rate)
            if left >= 1:
                self._buckets[key] = (left - 1, now)
                if len(self._buckets) > 10_000:  # keys come from outside: drop full buckets
                    refilled = self.burst / self.rate
                    kept = {k: v for k, v in self._buckets.items() if now - v[1] < refilled}
                    self._buckets = kept
            return left >= 1


HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    # not no-referrer: with it browsers send "Origin: null" with our own forms
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "x-frame-options": "DENY",
    "cache-control": "no-store",
}
"""Of every response; those of style, scripts and pictures say how long they may be kept."""

HTTPS_ALONE = {"strict-transport-security": "max-age=31536000"}
"""Of every response where browsers come by https: they never ask this host by http again."""
