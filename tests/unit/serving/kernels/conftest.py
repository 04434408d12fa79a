"""Triton kernels run in its interpreter here, where there is no device: that is decided when a kernel's module is imported."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def _numbers_count(interpreter: ModuleType) -> None:
    """The interpreter holds a number as an array of one element, which NumPy 2.4 no longer takes for an index."""
    patch = interpreter._patch_lang_tensor

    def patch_and_count(tensor: type, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda number: number.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_count


def _launches_patch_the_language_once(interpreter: ModuleType) -> None:
    """A launch puts the interpreter's functions into the language, and each call of a function in it does that again: a third of the time."""
    patch, new_scope = interpreter._patch_lang, interpreter._LangPatchScope
    patched: set[str] = set()

    class Launch(new_scope):  # type: ignore[misc, valid-type]
        def restore(self) -> None:
            super().restore()
            patched.clear()

    @functools.cache
    def languages(function: Callable[..., Any]) -> set[str]:
        found = [value for value in function.__globals__.values() if isinstance(value, ModuleType)]
        return {module.__name__ for module in found if module in (interpreter.tl, interpreter.tl.core)}

    def patch_once(function: Callable[..., Any]) -> Any:
        if patched and languages(function) <= patched:
            return new_scope()
        scope = patch(function)
        if not patched:
            launch = Launch()
            launch._changes = scope._changes
            scope = launch
        patched.update(languages(function))
        return scope

    interpreter._patch_lang = patch_once


def _types_are_looked_up_once(interpreter: ModuleType) -> None:
    """The interpreter makes its table of NumPy's types anew at each call."""
    look_up, found = interpreter._get_np_dtype, {}

    def look_up_once(of: Any) -> Any:
        name = of.scalar.name
        if name not in found:
            found[name] = look_up(of)
        return found[name]

    interpreter._get_np_dtype = look_up_once


def _set_up() -> None:
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    _numbers_count(interpreter)
    _launches_patch_the_language_once(interpreter)
    _types_are_looked_up_once(interpreter)


_set_up()
