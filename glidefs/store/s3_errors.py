"""What an S3 provider's answer means, in our errors: one table for boto3 and for the lean client."""

from __future__ import annotations

import re

from glidefs.errors import (
    AccessDenied,
    Conflict,
    NoSuchBucket,
    NotFound,
    PreconditionFailed,
    StoreError,
    StoreUnavailable,
    StoreUnsupported,
    Throttled,
)

_THROTTLE = frozenset(
    {
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "ThrottledException",
        "RequestThrottled",
        "RequestLimitExceeded",
        "TooManyRequests",
        "TooManyRequestsException",
        "BandwidthLimitExceeded",
    }
)
# Answered with a 4xx, and yet a matter of time: the body was slow, or credentials are being renewed.
_PASSING = frozenset(
    {
        "RequestTimeout",
        "IncompleteBody",
        "InternalError",
        "ServiceUnavailable",
        "ExpiredToken",
        "ExpiredTokenException",
        "RequestExpired",
        "RequestTimeTooSkewed",
    }
)
_WRONG_PLACE = frozenset(
    {
        "PermanentRedirect",
        "AuthorizationHeaderMalformed",
        "IllegalLocationConstraintException",
        "AuthorizationQueryParametersError",
    }
)
_CODE = re.compile(rb"<Code>\s*([A-Za-z0-9._]+)\s*</Code>")


def code_in(body: bytes) -> str:
    """The error code in the XML of an error answer, or an empty string."""
    found = _CODE.search(body)
    return found.group(1).decode("ascii") if found else ""


def classify(status: int, code: str, *, key: str, op: str, bucket: str, seen_working: bool) -> StoreError:
    """The error for an HTTP status and a provider's error code.

    ``seen_working``: the bucket has answered before, so "no such bucket" is a passing fault.
    """
    text = f"HTTP {status} {code}".rstrip()
    if status == 412 or code == "PreconditionFailed":
        return PreconditionFailed(key=key, op=op)
    if code == "NoSuchBucket":
        why = f"bucket {bucket} does not exist; create it or correct the store url"
        return NoSuchBucket(why, key=key, op=op, temporary=seen_working)
    if code in _WRONG_PLACE:
        return StoreError(f"{text}: bucket {bucket} is in another region; set region", key=key, op=op)
    if code in _THROTTLE or status == 429:
        return Throttled(text, key=key, op=op)
    if code in _PASSING or status == 408:
        return StoreUnavailable(text, key=key, op=op)
    if status == 404:
        return NotFound(key=key, op=op)
    if status == 409:
        return Conflict(text, key=key, op=op)
    if status in (401, 403):
        why = f"{text}: check the credentials and the policy of bucket {bucket}"
        return AccessDenied(why, key=key, op=op)
    if status in (405, 501) or code == "NotImplemented":
        return StoreUnsupported(f"{text}: the provider does not know this request", key=key, op=op)
    if status >= 500 or status == 307:
        return StoreUnavailable(text, key=key, op=op)
    if status == 400:
        # R9: providers answer 400 for a moment about buckets that work.
        return StoreError(text, key=key, op=op, temporary=seen_working and not code)
    return StoreError(text, key=key, op=op)
