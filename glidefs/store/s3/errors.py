"""What an S3 provider's answer means, in our errors: one table for boto3 and for the lean client.

A status is no evidence. Load balancers, proxies and servers that start answer 404, 403, 412 or 400 of their
own, with a page of HTML or nothing. What is said *about* an object, a condition, a permission or a
bucket is believed only from an error document (``<Error><Code>…``), which the provider itself
writes. All else is trouble of the store: temporary.
"""

from __future__ import annotations

import re

from glidefs.errors import (
    AccessDenied,
    Conflict,
    NoSuchBucket,
    NotFound,
    PreconditionFailed,
    StoreError,
    StoreRefused,
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
        "TokenRefreshRequired",
    }
)
_CREDENTIALS = frozenset(
    {
        "AccessDenied",
        "ExpiredToken",
        "ExpiredTokenException",
        "InvalidAccessKeyId",
        "InvalidClientTokenId",
        "InvalidSecurity",
        "InvalidToken",
        "RequestExpired",
        "RequestTimeTooSkewed",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
        "UnrecognizedClientException",
    }
)
_NO_ACCESS = _CREDENTIALS - _PASSING
_WRONG_PLACE = frozenset(
    {
        "PermanentRedirect",
        "AuthorizationHeaderMalformed",
        "IllegalLocationConstraintException",
        "AuthorizationQueryParametersError",
    }
)
_DOCUMENT = re.compile(rb"\s*(?:<\?xml[^>]*\?>\s*)?<Error\b[^>]*>.*</Error>\s*", re.DOTALL)
_CODE = re.compile(rb"<Code>\s*([A-Za-z0-9._]+)\s*</Code>")
_PAGE = re.compile(rb"\s*<(?:\?xml|!doctype|html|error)\b", re.IGNORECASE)


def code_in(body: bytes) -> str:
    """The code of an error document, or an empty string for what is none, or not whole."""
    found = _CODE.search(body) if _DOCUMENT.fullmatch(body) else None
    return found.group(1).decode("ascii") if found else ""


def is_page(body: bytes) -> bool:
    """Whether a body is a document or page; no object of ours begins like one."""
    return _PAGE.match(body) is not None


def may_be_credentials(status: int, code: str) -> bool:
    """Whether the answer may be due to credentials that ended. Without a document any refusal may."""
    return code in _CREDENTIALS if code else status in (400, 401, 403)


def classify(status: int, code: str, *, key: str, op: str, bucket: str, seen_working: bool) -> StoreError:
    """The error for an HTTP status and the code of the provider's error document, empty without one.

    ``seen_working``: the bucket has answered before, so "no such bucket" is a passing fault.
    """
    if not code:
        return _bare(status, key, op, bucket)
    text = f"HTTP {status} {code}"
    if status == 404 and code == "NoSuchKey":
        return NotFound(key=key, op=op)
    if status == 412 and code == "PreconditionFailed":
        return PreconditionFailed(key=key, op=op)
    if code == "NoSuchBucket":
        why = f"bucket {bucket} does not exist; create it or correct the store url"
        return NoSuchBucket(why, key=key, op=op, temporary=seen_working)
    if code in _WRONG_PLACE:
        return StoreRefused(f"{text}: bucket {bucket} is in another region; set region", key=key, op=op)
    if code in _THROTTLE or status == 429:
        return Throttled(text, key=key, op=op)
    if code in _PASSING or status == 408:
        return StoreUnavailable(text, key=key, op=op)
    if status == 409:
        return Conflict(text, key=key, op=op)
    if status in (401, 403) or code in _NO_ACCESS:
        why = f"{text}: check the credentials and the policy of bucket {bucket}"
        return AccessDenied(why, key=key, op=op)
    if status in (405, 501) or code == "NotImplemented":
        return StoreUnsupported(f"{text}: the provider does not know this request", key=key, op=op)
    if status < 400 or status in (404, 412) or status >= 500:
        return StoreUnavailable(text, key=key, op=op)
    return StoreRefused(text, key=key, op=op)


def _bare(status: int, key: str, op: str, bucket: str) -> StoreError:
    """A status without an error document: of whatever answers there, not of the object."""
    text = f"HTTP {status} without an error document"
    if status == 429:
        return Throttled(text, key=key, op=op)
    if status in (401, 403):
        text += f": check the credentials and the policy of bucket {bucket}, and what stands before the store"
    elif status < 500:
        text += "; does a proxy or load balancer answer for the store?"
    return StoreUnavailable(text, key=key, op=op)
