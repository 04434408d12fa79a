"""The tree at the top of the file is the tree."""

from __future__ import annotations

import inspect

import pytest

from serving.core import errors

CLASSES = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_error_is_drawn_below_its_parent(kind: type[errors.BatonError]):
    lines = (errors.__doc__ or "").splitlines()
    row = next(index for index, line in enumerate(lines) if line.split()[:1] == [kind.__name__])
    depth = len(lines[row]) - len(lines[row].lstrip())
    if kind is errors.BatonError:
        return
    above = (line for line in reversed(lines[:row]) if line.strip() and len(line) - len(line.lstrip()) < depth)
    assert next(above).split()[0] == kind.__bases__[0].__name__


def test_what_a_user_can_mend_before_the_start_ends_with_2():
    assert {kind.exit_code for kind in (errors.ConfigError, errors.ModelFolderError, errors.StartupError)} == {2}
    assert errors.BatonError.exit_code == 1
