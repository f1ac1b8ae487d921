"""Requests to a bucket: tried again while it makes sense, for a bounded time, and told in one clear line.

The tries are ours and not obstore's: it gives up on a body that breaks off, and it cannot know that an answer
to a conditional write was lost. What a library says of a failed request may hold URLs with signatures or the
text that was signed; none of it is passed on but the status, the service's own error code, and words of ours.
"""

import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from obstore.exceptions import BaseError

from mimir_shared.errors import MachineError

Answer = TypeVar("Answer")


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """How long a bucket is waited for."""

    connect_s: float = 5.0
    request_s: float = 30.0
    """One request, its body included."""
    action_s: float = 120.0
    """All tries of one action: after this no other is begun."""
    first_pause_s: float = 0.1
    """The longest pause before the second try; it doubles from try to try."""
    longest_pause_s: float = 8.0
    part_bytes: int = 8 << 20
    """The most that one request reads or writes; larger ranges are read in parts, several at a time."""
    connections: int = 32


class IncompleteAnswerError(Exception):
    """The service sent fewer bytes than it announced."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is known of a failed request."""

    cause: str
    advice: str
    is_transient: bool
    status: int | None = None
    most_tries: int | None = None


_TRANSIENT_STATUS: Final = {408, 409, 425, 429}
_TRANSIENT_CODES: Final = {
    "RequestTimeout", "SlowDown",
    # the service has compared what arrived with the hash or the length that were announced
    "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "BadDigest", "IncompleteBody",
}  # fmt: skip
_CREDENTIAL_CODES: Final = {
    "ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidAccessKeyId", "SignatureDoesNotMatch",
    "InvalidToken", "AuthenticationFailed",
}  # fmt: skip
_NO_BUCKET_CODES: Final = {"NoSuchBucket", "ContainerNotFound"}
_CREDENTIAL_SOURCES: Final = re.compile(
    r"https?://(169\.254\.|metadata\.google\.internal|sts\.|oauth2\.|login\.)|/latest/(api/token|meta-data)"
)
_KINDS: Final = {
    "Connect": "no connection to the service",
    "Timeout": "no complete answer in time",
    "Interrupted": "the answer broke off",
    "Request": "the request broke off",
    "Decode": "an answer that cannot be read",
}


def describe_fault(fault: Exception) -> Fault:
    """Sort a failed request into what will pass and what will not, in words that hold no secret."""
    if isinstance(fault, IncompleteAnswerError):
        return Fault(cause="the answer broke off", advice="", is_transient=True)
    text = str(fault)
    status_found = re.search(r"status code: (\d{3})", text)
    status = int(status_found[1]) if status_found else None
    code_found = re.search(r"<Code>(\w{1,60})</Code>", text) or re.search(r'"reason": "(\w{1,60})"', text)
    code = code_found[1] if code_found else ""
    if _CREDENTIAL_SOURCES.search(text):
        # a role's service may be out for a moment; where there is none, nobody wants to wait for it
        return Fault(cause="no credentials were found", advice=_CREDENTIAL_ADVICE, is_transient=True, most_tries=3)
    shown = " ".join(part for part in (str(status or ""), code) if part)
    if code in _NO_BUCKET_CODES or "specified bucket does not exist" in text:
        return Fault(cause=shown, advice="there is no such bucket; check its name and region", is_transient=False)
    if code in _CREDENTIAL_CODES:
        return Fault(cause=shown, advice=f"the credentials are not valid or have expired; {_CREDENTIAL_ADVICE}",
                     is_transient=False, status=status)  # fmt: skip
    if status in (401, 403):
        return Fault(cause=shown, advice="the credentials in use may not do this in that bucket; give others, or the "
                     "permission", is_transient=False, status=status)  # fmt: skip
    if status is not None:
        is_transient = (status >= 500 and status != 501) or status in _TRANSIENT_STATUS or code in _TRANSIENT_CODES
        return Fault(cause=shown, advice="", is_transient=is_transient, status=status)
    if "BareRedirect" in text:
        return Fault(cause="redirected to nowhere", advice="the region is wrong: set AWS_REGION", is_transient=False)
    kind = re.search(r"kind: (\w+)", text)
    if kind and kind[1] in _KINDS:
        return Fault(cause=_KINDS[kind[1]], advice="", is_transient=True)
    return Fault(cause=type(fault).__name__, advice="check the endpoint and the settings in the environment",
                 is_transient=False)  # fmt: skip


_CREDENTIAL_ADVICE: Final = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or what your service uses in their place"
)


class Requester:
    """Tries actions on one bucket until they succeed or it makes no sense any more."""

    def __init__(self, limits: RequestLimits) -> None:
        self.limits = limits
        self._random = random.Random()

    def run(self, action: str, where: str, request: Callable[[], Answer]) -> Answer:
        """Do a request.

        Args:
            action: "reading", for messages.
            where: the URL of the object, for messages.
        Raises: FileNotFoundError where the object does not exist; MachineError where the service does not do it,
            with bucket, key and action; errors of obstore that are an answer (an object that exists already).
        """
        began = time.monotonic()
        tries = 0
        while True:
            tries += 1
            try:
                return request()
            except FileNotFoundError as missing:
                fault = describe_fault(missing)
                if not fault.advice:
                    raise FileNotFoundError(f"{where}: no such object") from None
            except (BaseError, IncompleteAnswerError) as failed:
                fault = describe_fault(failed)
                if fault.status in (412, 416):
                    raise
            elapsed = time.monotonic() - began
            pause = self._pause(tries)
            tired = elapsed + pause > self.limits.action_s or tries == fault.most_tries
            if not fault.is_transient or tired:
                raise MachineError(self._message(action, where, fault, tries, elapsed)) from None
            time.sleep(pause)

    def _pause(self, tries: int) -> float:
        # a random share of it all: clients that failed together must not come back together
        longest = min(self.limits.longest_pause_s, self.limits.first_pause_s * 2.0 ** (tries - 1))
        return self._random.uniform(0.0, longest)

    def _message(self, action: str, where: str, fault: Fault, tries: int, elapsed: float) -> str:
        insisted = f" {tries} times in {elapsed:.0f} s" if tries > 1 else ""
        advice = f"{fault.advice}, then" if fault.advice else "nothing that was committed is lost:"
        return f"{where}: {action} failed{insisted}: {fault.cause}; {advice} run the same command again"
