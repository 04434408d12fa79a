"""Memory of one GPU that kernels of the other GPUs of its node read and write: CUDA's inter-process handles, opened by address.

    allocate -> handles to all -> map theirs -> all could?  -> in use -> all are done -> unmap theirs -> all have -> free
                                       |  one could not: unmap, free, PeersUnreachable on every rank

Allocated apart from torch, whose allocator may hand out parts of what it has, or map and unmap it later.
"""

from __future__ import annotations

import ctypes
from typing import Any, Protocol

import torch
from torch import Tensor

from serving.core.errors import ConfigError
from serving.parallel.collectives import Collectives

_HANDLE_BYTES = 64
# What is smaller shares a block, and a handle names blocks.
_GRANULE = 2 << 20


class PeersUnreachable(ConfigError):
    """GPUs of the group cannot write each other's memory."""


class DriverError(Exception):
    """A call of CUDA's driver failed. `code`: its own, never 0."""

    def __init__(self, code: int, call: str, reason: str) -> None:
        self.code = code
        super().__init__(f"{call}: {reason} (CUDA error {code})")


class Driver(Protocol):
    """What is used of one device. Each raises DriverError."""

    def allocate(self, num_bytes: int) -> int: ...
    def free(self, address: int) -> None: ...
    def handle(self, address: int) -> bytes: ...
    def map(self, handle: bytes) -> int: ...
    def unmap(self, address: int) -> None: ...
    def tensor(self, address: int, num_bytes: int) -> Tensor: ...
    def synchronise(self) -> None: ...


class PeerMemory:
    """`own`: uint8 [num_bytes], zeros at first. `addresses`: of every rank's, for kernels on this rank's device.

    All ranks of `group` make one at once, of the same size; the group exchanges tensors in host memory. Raises PeersUnreachable on
    all of them, RanksMissing.
    """

    def __init__(self, group: Collectives, num_bytes: int, driver: Driver) -> None:
        self._group = group
        self._driver = driver
        self._mapped: list[int] = []
        self._address = 0
        failure = None
        handle = bytes(_HANDLE_BYTES)
        try:
            self._address = driver.allocate(-(-num_bytes // _GRANULE) * _GRANULE)
            self.own = driver.tensor(self._address, num_bytes)
            self.own.zero_()
            driver.synchronise()
            handle = driver.handle(self._address)
        except DriverError as error:
            failure = error
        self._raise_together(failure)
        handles = _gather(group, torch.frombuffer(bytearray(handle), dtype=torch.uint8))
        self.addresses: list[int] = []
        try:
            for rank, other in enumerate(handles):
                self.addresses.append(self._address if rank == group.rank else self._map(bytes(other.tolist())))
        except DriverError as error:
            failure = error
        self._raise_together(failure)

    def _map(self, handle: bytes) -> int:
        address = self._driver.map(handle)
        self._mapped.append(address)
        return address

    def _raise_together(self, failure: DriverError | None) -> None:
        codes = _gather(self._group, torch.tensor([failure.code if failure else 0])).flatten().tolist()
        failed = [self._group.ranks[index] for index, code in enumerate(codes) if code]
        if not failed:
            return
        self.close()
        reason = failure or f"CUDA error {max(codes)} there"
        raise PeersUnreachable(
            f"rank {', '.join(map(str, failed))} cannot reach the memory of the other GPUs ({reason}); dispatch over NCCL "
            "(decode.dispatch = nccl), or give the unit GPUs of one host that NVLink connects"
        ) from failure

    def close(self) -> None:
        """Together with the others. Raises RanksMissing; then all stays as it is until the processes end, since a rank that is
        still at work might write here."""
        self._driver.synchronise()
        # Nobody writes any more; nobody can.
        self._group.barrier()
        for address in self._mapped:
            self._driver.unmap(address)
        self._mapped = []
        self._group.barrier()
        if self._address:
            self._driver.free(self._address)
            self._address = 0


def _gather(group: Collectives, row: Tensor) -> Tensor:
    """[W, ...] of every rank's."""
    out = row.new_empty(group.world_size, *row.shape)
    group.all_gather(out, row[None]).wait()
    return out


class _Handle(ctypes.Structure):
    """Passed by value."""

    _fields_ = (("bytes", ctypes.c_char * _HANDLE_BYTES),)


class _Memory:
    """Foreign memory as torch takes it."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 2,
        }


class CudaDriver:
    """CUDA's driver on one device, in the context that torch has there. Raises DriverError where there is none."""

    _LAZY_PEER_ACCESS = 1

    def __init__(self, device: torch.device) -> None:
        self._device = device
        try:
            self._cuda = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise DriverError(-1, "libcuda.so.1", str(error)) from error

    def allocate(self, num_bytes: int) -> int:
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(num_bytes))
        return address.value

    def free(self, address: int) -> None:
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def handle(self, address: int) -> bytes:
        handle = _Handle()
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(address))
        return ctypes.string_at(ctypes.byref(handle), _HANDLE_BYTES)

    def map(self, handle: bytes) -> int:
        address = ctypes.c_uint64()
        passed = _Handle.from_buffer_copy(handle)
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(address), passed, ctypes.c_uint(self._LAZY_PEER_ACCESS))
        return address.value

    def unmap(self, address: int) -> None:
        self._call("cuIpcCloseMemHandle", ctypes.c_uint64(address))

    def tensor(self, address: int, num_bytes: int) -> Tensor:
        with torch.cuda.device(self._device):
            return torch.as_tensor(_Memory(address, num_bytes), device=self._device)

    def synchronise(self) -> None:
        torch.cuda.synchronize(self._device)

    def _call(self, name: str, *arguments: Any) -> None:
        # The runtime makes its context the thread's.
        with torch.cuda.device(self._device):
            torch.cuda.current_stream(self._device).synchronize()
            code = getattr(self._cuda, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(code, ctypes.byref(text))
            raise DriverError(code, name, (text.value or b"unknown").decode())
