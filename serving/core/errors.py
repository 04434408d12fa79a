"""Every error that a user, a file, a configuration or a peer can cause.

    BatonError                      exit code 1; HTTP 500
      ConfigError                   2; a table, key or value of the configuration
      ModelFolderError              2; config.json, tokenizer or weights on disk
      StartupError                  2; port in use, Ray or a worker did not come up
      RequestError                  HTTP 400; what a client sent
        AuthenticationError         401
        ModelNotFound               404
        RequestTooLarge             413
      Overloaded                    HTTP 429; nothing wrong, no room now
      Unavailable                   HTTP 503; no ready worker, workers too busy, or the server drains
      PeerError                     a message or a transfer that cannot be trusted
        StaleError                  an old epoch or incarnation
        ManifestError               bytes that arrived are not the bytes that were announced
      PagesExhausted                pages could never suffice, however long one waits

An error carries the fix in its text. `assert` is for our own bugs and is not part of this tree.
"""

from __future__ import annotations


class BatonError(Exception):
    """Root of the tree. `exit_code` is what `baton` ends with when the error reaches the command line."""

    exit_code = 1


class ConfigError(BatonError):
    """A configuration file, key or value is wrong."""

    exit_code = 2


class ModelFolderError(BatonError):
    """A model folder cannot be served as it is."""

    exit_code = 2


class StartupError(BatonError):
    """The server cannot come up."""

    exit_code = 2


class RequestError(BatonError):
    """A client's request is wrong. `param` names the field, `code` is OpenAI's machine-readable reason."""

    status = 400
    kind = "invalid_request_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class AuthenticationError(RequestError):
    """No key, or one that is not known."""

    status = 401
    kind = "authentication_error"


class ModelNotFound(RequestError):
    """The request names a model that is not served here."""

    status = 404


class RequestTooLarge(RequestError):
    """The body is over the limit."""

    status = 413


class Overloaded(BatonError):
    """No room now; `retry_after_s` is an honest guess."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(BatonError):
    """Nothing is ready to serve, or what was ready is too busy; `retry_after_s` is a guess, None: nobody knows."""

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class PeerError(BatonError):
    """A peer sent something that cannot be trusted."""


class StaleError(PeerError):
    """A message or completion of an old epoch or incarnation; counted and dropped."""


class ManifestError(PeerError):
    """A hand-off does not hold what its manifest says."""


class PagesExhausted(BatonError):
    """A request needs more pages than a pool has."""
