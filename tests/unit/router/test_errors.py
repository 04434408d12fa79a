"""One envelope for every error, and a table that misses none."""

from __future__ import annotations

import json

import pytest

from router.auth import ApiKeys
from router.openai.errors import STATUS, envelope, error_response
from serving.core import errors as e


def tree(root: type[e.BatonError]) -> list[type[e.BatonError]]:
    return [root, *(below for child in root.__subclasses__() for below in tree(child))]


def instance(error_type: type[e.BatonError]) -> e.BatonError:
    if issubclass(error_type, e.Overloaded):
        return error_type("full", retry_after_s=2.2)
    return error_type("what to do")


def test_every_error_of_the_tree_has_a_response() -> None:
    ours = {error_type for error_type in tree(e.BatonError) if error_type.__module__ == e.__name__}
    assert set(STATUS) == ours


@pytest.mark.parametrize("error_type", list(STATUS), ids=lambda t: t.__name__)
def test_the_envelope_has_openais_four_fields(error_type: type[e.BatonError]) -> None:
    body = json.loads(envelope(instance(error_type)))
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"] in ("what to do", "full")
    assert "\n" not in body["error"]["message"]


@pytest.mark.parametrize(
    ("error_type", "status"),
    [
        (e.RequestError, 400),
        (e.AuthenticationError, 401),
        (e.ModelNotFound, 404),
        (e.RequestTooLarge, 413),
        (e.Overloaded, 429),
        (e.BatonError, 500),
        (e.Unavailable, 503),
    ],
)
def test_statuses_are_those_the_tree_promises(error_type: type[e.BatonError], status: int) -> None:
    assert error_response(instance(error_type)).status_code == status


def test_overload_says_when_to_come_back_in_whole_seconds() -> None:
    assert error_response(instance(e.Overloaded)).headers["retry-after"] == "3"
    assert error_response(e.Unavailable("busy", retry_after_s=0.2)).headers["retry-after"] == "1"
    assert "retry-after" not in error_response(e.Unavailable("nobody is there")).headers


def test_a_bug_is_a_500_that_keeps_its_secrets() -> None:
    assert error_response(KeyError("secret")).status_code == 500
    assert b"secret" not in envelope(KeyError("secret"))


def test_keys_open_and_everything_else_is_refused() -> None:
    keys = ApiKeys(("alpha", "beta"))
    keys.check(b"Bearer beta")
    keys.check(b"bearer alpha")
    for wrong in (None, b"", b"Bearer", b"Bearer ", b"Bearer gamma", b"Basic alpha", b"alpha", b"Bearer alpha beta"):
        with pytest.raises(e.AuthenticationError):
            keys.check(wrong)
    ApiKeys(()).check(None)
