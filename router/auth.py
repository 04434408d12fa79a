"""Who may use the API: bearer tokens, compared in constant time."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from serving.core.errors import AuthenticationError


class ApiKeys:
    """The accepted keys; none at all means that everybody may."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = [key.encode() for key in keys]

    def check(self, authorization: bytes | None) -> None:
        """`authorization` is the header's value. Raises AuthenticationError. Takes as long for any wrong key as for another."""
        if not self._keys:
            return
        scheme, _, token = (authorization or b"").partition(b" ")
        if scheme.lower() != b"bearer" or not token:
            raise AuthenticationError(
                "no API key; send it as the header Authorization: Bearer KEY", code="missing_api_key"
            )
        known = [hmac.compare_digest(key, token.strip()) for key in self._keys]
        if not any(known):
            raise AuthenticationError("this API key is not known here", code="invalid_api_key")
