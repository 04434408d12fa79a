"""Frames: msgspec in MessagePack, authenticated with a shared secret, capped in size. No pickle anywhere.

A frame is 16 bytes of keyed BLAKE2b over the payload, then the payload. A frame that is too long, not authentic or not a known message is a
`PeerError`; the receiver counts it and goes on.
"""

from __future__ import annotations

import hashlib
import hmac

import msgspec

from serving.core.errors import PeerError
from serving.core.messages import AnyMessage, Envelope

_DIGEST_BYTES = 16
MAX_FRAME_BYTES = 8 * 1024 * 1024
"""The longest messages are jobs: 0.8 MB for a prompt of 160 000 tokens."""


class Codec:
    """Encodes for one sender in one incarnation; decodes from anybody who shares the secret. Not thread-safe."""

    def __init__(self, secret: bytes, sender: str, incarnation: int, *, max_bytes: int = MAX_FRAME_BYTES) -> None:
        self._secret = secret
        self._sender = sender
        self._incarnation = incarnation
        self._max_bytes = max_bytes
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Envelope)

    def encode(self, message: AnyMessage) -> bytes:
        payload = self._encoder.encode(Envelope(self._sender, self._incarnation, message))
        return self._digest(payload) + payload

    def decode(self, frame: bytes) -> Envelope:
        """Raises PeerError; never anything else, whatever the bytes."""
        if not _DIGEST_BYTES < len(frame) <= self._max_bytes:
            raise PeerError(f"frame of {len(frame)} bytes; the limit is {self._max_bytes}")
        payload = frame[_DIGEST_BYTES:]
        if not hmac.compare_digest(frame[:_DIGEST_BYTES], self._digest(payload)):
            raise PeerError("frame is not authentic: do all processes share one secret?")
        try:
            return self._decoder.decode(payload)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise PeerError(f"frame is not a known message: {error}") from error

    def _digest(self, payload: bytes) -> bytes:
        return hashlib.blake2b(payload, digest_size=_DIGEST_BYTES, key=self._secret).digest()
