"""Runs the source of a Gluon kernel on the CPU: Triton's own interpreter does not.

    a kernel's `gl`, `tma`, `mbarrier`    the names of this file put in their place
    programs of a grid                    one after the other
    partitions of a program               threads, which wait at the barriers as on the device
    pointers                              a tensor's whole storage; no load, prefetch or store may leave it
    shared memory                         NaN until something is copied there

What is checked beside the results: a barrier that is never reached ends the launch, no element is stored twice, and before
`gdc_wait` nothing is read but the arguments called `early`. Not seen: layouts, races within a thread's own products, speed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import JITFunction

_PATIENCE_S = 10.0
_here = threading.local()


def install(
    patch: pytest.MonkeyPatch,
    kernels: ModuleType,
    *helpers: ModuleType,
    name: str,
    early: Callable[..., Collection[str]],
) -> None:
    """The kernel `name` of module `kernels` runs here from now on, and so does what it calls there and in `helpers`.

    `early`, of the kernel's keyword arguments: names of the arguments that were there before the kernel launched before.
    """
    kernel = getattr(kernels, name).fn
    for module in (kernels, *helpers):
        for attribute, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                patch.setattr(module, attribute, value.fn)
        patch.setattr(module, "gl", _gl)
    for attribute, stand_in in _names.items():
        if hasattr(kernels, attribute):
            patch.setattr(kernels, attribute, stand_in)
    patch.setattr(kernels, name, _Kernel(kernel, early))


def be_program(program: int, num_programs: int) -> None:
    """For what a test calls outside of a launch."""
    _here.program, _here.num_programs, _here.waited = program, num_programs, False


class _Kernel:
    def __init__(self, body: Callable[..., None], early: Callable[..., Collection[str]]) -> None:
        self._body, self._early = body, early

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._launch, grid[0])

    def _launch(self, num_programs: int, *args: Any, maxnreg: int, launch_pdl: bool, **constants: Any) -> None:
        assert launch_pdl, "a kernel that does not wait for the one before is launched behind it"
        names = self._body.__code__.co_varnames
        early = self._early(**constants)
        taken = [_taken(arg, name in early) for name, arg in zip(names, args, strict=False)]
        for program in range(num_programs):
            be_program(program, num_programs)
            self._body(*taken, **constants)


def _taken(arg: Any, early: bool) -> Any:
    if isinstance(arg, Tensor):
        size = arg.untyped_storage().nbytes() // arg.element_size() - arg.storage_offset()
        return Pointer(arg.as_strided((size,), (1,)), 0, early, set())
    return replace(arg, early=early) if isinstance(arg, Descriptor) else arg


@dataclass(frozen=True)
class Pointer:
    """One or many elements of what follows a tensor's first element in its storage."""

    flat: Tensor
    at: int | Tensor
    early: bool
    stored: set[int]

    @property
    def dtype(self) -> SimpleNamespace:
        return SimpleNamespace(element_ty=self.flat.dtype)

    def __add__(self, elements: int | Tensor) -> Pointer:
        return replace(self, at=self.at + elements)

    def places(self, mask: Any = True) -> tuple[Tensor, Tensor]:
        """Where it points, zero where masked; and the mask."""
        at, on = torch.broadcast_tensors(torch.as_tensor(self.at), torch.as_tensor(mask))
        at = at.masked_fill(~on, 0).long()
        low, high = at.aminmax()
        assert 0 <= int(low) <= int(high) < len(self.flat), "outside of the tensor's storage"
        return at, on


@dataclass(frozen=True)
class Descriptor:
    """Boxes of a matrix for the copy engine, zeros beyond its ends."""

    base: Tensor
    block: list[int]
    early: bool = False

    def __post_init__(self) -> None:
        size = self.base.element_size()
        assert self.base.stride(1) == 1, "rows must be contiguous"
        assert self.base.stride(0) * size % 16 == self.base.data_ptr() % 16 == 0, "rows must begin on 16 bytes"
        assert self.block[1] * size <= 128, "wider than a swizzled line"

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def layout(self) -> None:
        return None

    @property
    def block_type(self) -> SimpleNamespace:
        return SimpleNamespace(nbytes=self.block[0] * self.block[1] * self.base.element_size())


class _Shared:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def index(self, at: Any) -> _Shared:
        return _Shared(self.tensor[int(at)])

    def permute(self, order: tuple[int, ...]) -> _Shared:
        return _Shared(self.tensor.permute(order))


class _Barriers:
    """Barriers [num, 1]."""

    def __init__(self, shape: list[int]) -> None:
        self.shape = shape
        self._barriers: list[_Barrier] = [_Barrier() for _ in range(shape[0])]

    def index(self, at: Any) -> _Barrier:
        return self._barriers[int(at)]


class _Barrier:
    """Turns when all have arrived and all bytes that they expect are there."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count, self._missing, self._bytes, self._phase = 0, 0, 0, 0

    def init(self, count: int) -> None:
        self._count = self._missing = count

    def add(self, *, arrivals: int = 0, expected: int = 0) -> None:
        with self._changed:
            self._missing -= arrivals
            self._bytes += expected
            assert self._missing >= 0, "more arrivals than a turn has"
            if not self._missing and not self._bytes:
                self._phase ^= 1
                self._missing = self._count
                self._changed.notify_all()

    def wait(self, phase: int) -> None:
        until = time.monotonic() + _PATIENCE_S
        with self._changed:
            while self._phase == int(phase):
                assert not _here.failures, "another partition has failed"
                assert time.monotonic() < until, "waits for ever"
                self._changed.wait(0.02)


def _allocate(dtype: torch.dtype, shape: list[int], _layout: object) -> _Shared | _Barriers:
    if dtype == torch.int64:
        return _Barriers(shape)
    return _Shared(torch.full(shape, float("nan")).to(dtype))


def _partitions(parts: list[tuple[Callable[..., None], tuple[Any, ...]]], _warps: object, _registers: object) -> None:
    program, num_programs = _here.program, _here.num_programs
    failures: list[BaseException] = []

    def one(body: Callable[..., None], args: tuple[Any, ...]) -> None:
        _here.program, _here.num_programs, _here.waited, _here.failures = program, num_programs, False, failures
        try:
            body(*args)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=one, args=part) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _load(pointer: Pointer, mask: Any = True, other: float = 0, cache_modifier: str = "") -> Tensor:
    assert _here.waited or pointer.early, "read before the kernel that may write it has ended"
    at, on = pointer.places(mask)
    return torch.where(on, pointer.flat[at], torch.tensor(other, dtype=pointer.flat.dtype))


def _store(pointer: Pointer, value: Tensor, mask: Any = True) -> None:
    assert _here.waited, "stored while the kernel before may still read"
    at, on = pointer.places(mask)
    places = set(at[on].tolist())
    assert not places & pointer.stored, "stored twice"
    pointer.stored.update(places)
    pointer.flat[at[on]] = value.expand(at.shape)[on]


def _prefetch(_asm: str, _constraints: str, pointers: list[Pointer], **_: object) -> None:
    for pointer in pointers:
        pointer.places()


def _copy(desc: Descriptor, at: list[Any], barrier: _Barrier, to: _Shared, pred: Any = True) -> None:
    if not pred:
        return
    assert _here.waited or desc.early, "copied before the kernel that may write it has ended"
    row, column = int(at[0]), int(at[1])
    assert min(row, column) >= 0
    box = desc.base[row : row + desc.block[0], column : column + desc.block[1]]
    to.tensor.zero_()
    to.tensor[: box.shape[0], : box.shape[1]] = box
    barrier.add(expected=-desc.block_type.nbytes)


def _multiply(a: _Shared, b: _Shared, sums: Tensor, *, use_acc: bool = True, is_async: bool) -> Tensor:
    product = a.tensor.float() @ b.tensor.float()
    return sums + product if use_acc else product


def _waited(_pending: int, deps: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    return deps if len(deps) > 1 else deps[0]


def _gdc_wait() -> None:
    _here.waited = True


def _note(done: Pointer) -> None:
    done.flat[done.at] += 1


def _wait_for_tile(done: Pointer, num_units: Any) -> None:
    """The kernel before has ended here: what it noted is exact. From now on its results may be read."""
    noted = int(done.flat[done.at])
    assert noted >= int(num_units), "waits for ever"
    assert noted == int(num_units), "more was noted than there is"
    _here.waited = True


def _wait_for_rows(full: _Barrier, phase: Any) -> None:
    full.wait(phase)
    _here.waited = True


def _where(condition: Any, one: Any, other: Any) -> Tensor:
    return torch.where(torch.as_tensor(condition), torch.as_tensor(one), torch.as_tensor(other))


_gl = SimpleNamespace(
    int32=torch.int32,
    int64=torch.int64,
    float32=torch.float32,
    constexpr=lambda value: value,
    program_id=lambda _axis: torch.tensor(_here.program),
    num_programs=lambda _axis: _here.num_programs,
    static_range=range,
    arange=lambda start, end, layout: torch.arange(start, end),
    zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
    where=_where,
    minimum=lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
    max=lambda value, axis: value.amax(axis),
    abs=torch.abs,
    exp=torch.exp,
    load=_load,
    store=_store,
    inline_asm_elementwise=_prefetch,
    allocate_shared_memory=_allocate,
    warp_specialize=_partitions,
    BlockedLayout=lambda *_: None,
    SliceLayout=lambda *_: None,
    NVMMADistributedLayout=lambda *_: None,
)
mbarrier = SimpleNamespace(
    MBarrierLayout=lambda: None,
    init=lambda barrier, count: barrier.init(count),
    wait=lambda barrier, phase: barrier.wait(phase),
    expect=lambda barrier, num_bytes: barrier.add(arrivals=1, expected=num_bytes),
    arrive=lambda barrier, count: barrier.add(arrivals=count),
)
_names = {
    "mbarrier": mbarrier,
    "tma": SimpleNamespace(async_copy_global_to_shared=_copy),
    "fence_async_shared": lambda: None,
    "warpgroup_mma": _multiply,
    "warpgroup_mma_wait": _waited,
    "gdc_wait": _gdc_wait,
    "gdc_launch_dependents": lambda: None,
    "_note": _note,
    "_wait_for_tile": _wait_for_tile,
    "_wait_for_rows": _wait_for_rows,
}
