"""Collectives over torch.distributed's backends: gloo between CPU processes, NCCL between GPUs.

The backend objects are made here, each over its own part of the store, so that nothing is global and a group concerns its
members alone. Everything that is not summed travels as bytes, since gloo knows neither float8 nor most narrow types.

Who is missing is what the backends do not say. A rank that waits longer than a moment notes in the store how far it has come;
at the deadline those without a note have not come. Who knows earlier that a rank has ended, because a connection did, is asked meanwhile.
A store that is asked within the deadline and says nothing is held by a rank that hangs: rank 0 of the unit.

On CUDA a wait orders the stream, and the host waits in `attend` alone, within the deadline. Then NCCL is aborted, so that its kernels
end, with whatever they had; a unit, whose host may wait elsewhere, has a thread that does so (`serving.engine.watch`). NCCL's own watchdog
would end the process without a name: it is given so much longer that it has nothing to do.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from datetime import timedelta
from typing import NoReturn, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, Work

from serving.core.errors import ConfigError
from serving.parallel.collectives import Handle, Presence, RanksMissing, check_payloads, check_rows, even, row_bytes

_PATIENCE_S = 0.05
"""A wait that is longer is noted in the store."""
_LOOK_S = 0.25
"""How often a longer wait asks whether all are alive."""
_LAST_CALL_S = 1.0
"""Who has ended may have done so after this call."""
_BACKENDS = ("gloo", "nccl")
_NCCL_LONGER_S = 600.0
_ABORT_S = 2.0
"""An abort returns when no captured step is left that names the group."""
_CALL_S = 0.1
"""A call that takes longer waits for the device."""
_POLL_S = 1e-4
_STORE_RANK = 0
"""Of the unit: it holds the store, where a rank does."""

Answer = TypeVar("Answer")


class _Backend(Protocol):
    """What is used of torch's backend objects, whose stubs leave it out."""

    def _allgather_base(self, output: Tensor, input: Tensor) -> Work: ...
    def _reduce_scatter_base(self, output: Tensor, input: Tensor) -> Work: ...
    def alltoall_base(self, output: Tensor, input: Tensor, recv: list[int], send: list[int]) -> Work: ...
    def broadcast(self, tensor: Tensor, root: int) -> Work: ...
    def barrier(self) -> Work: ...
    def abort(self) -> None: ...
    def _start_coalescing(self) -> None: ...
    def _end_coalescing(self) -> Work: ...


class TorchCollectives:
    """Joins the group `name` of `ranks` as its member number `rank`; returns or raises within the deadline.

    `store` is one object for the whole unit and of this start alone.
    `host`: the address under which gloo is reached here, "": what this machine's name stands for.
    `presence`: of all ranks of the unit, as soon as they have one: it knows sooner, and better, who of them is missing.
    Of NCCL, which takes the current device: `max_ctas`: SMs that a call may keep busy, 0: as many as NCCL likes. `issued` is called with each call.
    """

    def __init__(
        self,
        *,
        backend: str,
        store: Store,
        ranks: Sequence[int],
        rank: int,
        name: str,
        deadline_s: float,
        host: str = "",
        presence: Callable[[], Presence | None] = lambda: None,
        max_ctas: int = 0,
        issued: Callable[[], None] = lambda: None,
    ) -> None:
        if backend not in _BACKENDS:
            raise ConfigError(f"there is no backend {backend!r} for collectives; choose one of {', '.join(_BACKENDS)}")
        self.rank = rank
        self.ranks = tuple(ranks)
        self.world_size = len(self.ranks)
        self._backend = backend
        self._store = store
        self._name = name
        self._deadline_s = deadline_s
        self._host = host
        self._presence = presence
        self._max_ctas = max_ctas
        self._tell_issued = issued
        self._issued = 0
        self._issued_s = time.monotonic()
        self._broken: RanksMissing | None = None
        self._aborted = False
        self._calling = threading.Lock()
        self._store_is_silent = False
        begin_s = time.monotonic()
        try:
            self._note("came")
            self._group = self._join()
        except RuntimeError as error:
            raise self._named(self._issued, begin_s) from error

    def _join(self) -> _Backend:
        deadline, given_up = timedelta(seconds=self._deadline_s), timedelta(seconds=2 * self._deadline_s)
        store = PrefixStore(self._key("group"), self._store)
        store.set_timeout(deadline)
        if self._backend == "nccl":
            return self._join_nccl(store)
        # It ends at the deadline by itself, if the store answers.
        group = self._answer(lambda: self._gloo(store, deadline), self._deadline_s + _LAST_CALL_S)
        # A call that was given up must end too, but after whoever waits for it has named the missing.
        group._set_default_timeout(given_up)
        return cast(_Backend, group)

    def _gloo(self, store: Store, deadline: timedelta) -> dist.ProcessGroupGloo:
        if not self._host:
            return dist.ProcessGroupGloo(store, self.rank, self.world_size, deadline)
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = deadline
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=self._host)]
        return dist.ProcessGroupGloo(store, self.rank, self.world_size, options)

    def _join_nccl(self, store: Store) -> _Backend:
        """Connected: the first call would do it otherwise, and wait for ever for a rank that never joins."""
        begin_s = time.monotonic()
        notes = self._keys("came")
        while not self._answer(lambda: self._store.check(notes)):
            if time.monotonic() - begin_s > self._deadline_s:
                raise RuntimeError("not all have joined")
            time.sleep(_PATIENCE_S)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=self._deadline_s + _NCCL_LONGER_S)
        # What is in flight goes before what is computed meanwhile.
        options.is_high_priority_stream = True
        if self._max_ctas:
            options.config.max_ctas = self._max_ctas
        group = cast(_Backend, dist.ProcessGroupNCCL(store, self.rank, self.world_size, options))
        here = torch.zeros(1, 1, dtype=torch.uint8, device="cuda")
        group._allgather_base(here.new_empty(self.world_size, 1), here).wait()
        return group

    def all_gather(self, out: Tensor, tensor: Tensor, counts: Sequence[int] | None = None) -> Handle:
        sizes = list(counts) if counts else even(len(out), self.world_size)
        check_rows(out, tensor, sizes, self.rank)
        if counts is None and tensor.is_cuda:
            return self._issue(lambda: [self._group._allgather_base(row_bytes(out), row_bytes(tensor))])
        # Gloo's own goes around a ring, which takes four processes four times as long.
        copies = row_bytes(tensor).repeat(self.world_size, 1)
        mine = [sizes[self.rank]] * self.world_size
        return self._issue(lambda: [self._group.alltoall_base(row_bytes(out), copies, sizes, mine)])

    def reduce_scatter(self, out: Tensor, tensor: Tensor, counts: Sequence[int] | None = None) -> Handle:
        sizes = list(counts) if counts else even(len(tensor), self.world_size)
        check_rows(tensor, out, sizes, self.rank)
        if counts is None and tensor.is_cuda:
            return self._issue(lambda: [self._group._reduce_scatter_base(out, tensor)])
        parts = torch.empty((self.world_size, *out.shape), dtype=out.dtype, device=out.device)
        flat = parts.view(self.world_size * len(out), *out.shape[1:])
        mine = [len(out)] * self.world_size

        def add() -> None:
            out.copy_(parts[0])
            for part in parts[1:]:
                out.add_(part)

        return self._issue(lambda: [self._group.alltoall_base(row_bytes(flat), row_bytes(tensor), mine, sizes)], add)

    def all_to_all(
        self,
        outs: Sequence[Tensor],
        tensors: Sequence[Tensor],
        recv_counts: Sequence[int],
        send_counts: Sequence[int],
    ) -> Handle:
        check_payloads(outs, tensors, recv_counts, send_counts, self.world_size)
        received, sent = sum(recv_counts), sum(send_counts)
        pairs = [(row_bytes(o[:received]), row_bytes(t[:sent])) for o, t in zip(outs, tensors, strict=True)]
        recv, send = list(recv_counts), list(send_counts)
        if len(pairs) == 1:
            return self._issue(lambda: [self._group.alltoall_base(*pairs[0], recv, send)])
        if tensors[0].is_cuda:
            return self._issue(lambda: [self._together(pairs, recv, send)])
        # Between processes a call costs more than the copies that make one of several.
        rows = torch.cat([tensor for _, tensor in pairs], dim=1)
        into = rows.new_empty(received, rows.shape[1])

        def part() -> None:
            for (out, _), columns in zip(pairs, into.split([out.shape[1] for out, _ in pairs], dim=1), strict=True):
                out.copy_(columns)

        return self._issue(lambda: [self._group.alltoall_base(into, rows, recv, send)], part)

    def _together(self, pairs: list[tuple[Tensor, Tensor]], recv: list[int], send: list[int]) -> Work:
        """One kernel for all payloads."""
        self._group._start_coalescing()
        for out, tensor in pairs:
            self._group.alltoall_base(out, tensor, recv, send)
        return self._group._end_coalescing()

    def broadcast(self, tensor: Tensor, src: int) -> Handle:
        return self._issue(lambda: [self._group.broadcast(row_bytes(tensor), src)])

    def barrier(self) -> None:
        if self._backend == "gloo":
            self._issue(lambda: [self._group.barrier()]).wait()
            return
        here = torch.zeros(1, 1, dtype=torch.uint8, device="cuda")
        self.all_gather(here.new_empty(self.world_size, 1), here).wait()
        self.attend()

    def attend(self) -> None:
        """On CUDA: returns when all that the current stream has been given is done. Raises RanksMissing."""
        done = torch.cuda.Event()
        done.record()
        begin_s = time.monotonic()
        noted = False
        try:
            while not done.query():
                waited_s = time.monotonic() - begin_s
                if waited_s > _PATIENCE_S:
                    if not noted:
                        self._note("came")
                        noted = True
                    if waited_s > self._deadline_s or self._read("broken") is not None:
                        raise RuntimeError("the device waits for others")
                    time.sleep(_PATIENCE_S / 5)
                time.sleep(_POLL_S)
        except RuntimeError as error:
            self._fail(self._issued, begin_s, error)

    def subgroup(self, ranks: Sequence[int], name: str, deadline_s: float | None = None) -> TorchCollectives:
        return TorchCollectives(
            backend=self._backend,
            store=self._store,
            ranks=ranks,
            rank=tuple(ranks).index(self.ranks[self.rank]),
            name=name,
            deadline_s=deadline_s or self._deadline_s,
            host=self._host,
            presence=self._presence,
            max_ctas=self._max_ctas,
            issued=self._tell_issued,
        )

    def close(self) -> None:
        """The backend's threads and sockets end with its last reference."""
        if self._backend == "nccl":
            if self._broken is None:
                with contextlib.suppress(RanksMissing):
                    self.attend()
            self.abort()
        del self._group

    def abort(self) -> None:
        """NCCL's kernels that wait for other ranks end, with garbage. From any thread; later calls raise RuntimeError."""
        self._aborted = True
        # Whoever calls a group while it is being aborted waits as long as that: for ever, if a captured step that names it is his to let go.
        # A call that has begun is let through, unless it waits for the device itself.
        if self._calling.acquire(timeout=_CALL_S):
            self._calling.release()
        # The thread keeps what it aborts alive for as long as it takes.
        aborting = threading.Thread(target=self._group.abort, name=f"abort-{self._name}", daemon=True)
        aborting.start()
        aborting.join(_ABORT_S)

    def _issue(self, call: Callable[[], list[Work]], then: Callable[[], None] | None = None) -> Handle:
        if self._broken:
            raise self._broken
        begin_s = time.monotonic()
        idle_s, self._issued_s = begin_s - self._issued_s, begin_s
        self._issued += 1
        self._tell_issued()
        try:
            # Gloo lets a late rank have what the others sent before they gave it up.
            if idle_s > self._deadline_s / 2:
                self._alive()
                if self._read("broken") is not None:
                    raise RuntimeError("the group was given up")
            with self._calling:
                self._raise_if_aborted()
                return _Handle(self, call(), self._issued, then)
        except RuntimeError as error:
            self._fail(self._issued, begin_s, error)

    def _complete(self, works: Sequence[Work], number: int) -> None:
        if self._broken:
            raise self._broken
        begin_s = time.monotonic()
        try:
            self._raise_if_aborted()
            for work in works:
                self._wait(work, begin_s)
        except RanksMissing as gone:
            self._broken = gone
            raise
        except RuntimeError as error:
            self._fail(number, begin_s, error)

    def _raise_if_aborted(self) -> None:
        if self._aborted:
            raise RuntimeError(f"the group {self._name} was aborted")

    def _wait(self, work: Work, begin_s: float) -> None:
        if self._backend == "nccl":
            work.wait()
            return
        most_s, gone = min(_PATIENCE_S, self._deadline_s / 4), None
        while True:
            try:
                work.wait(timedelta(seconds=most_s))
                return
            except RuntimeError:
                self._note("came")
                left_s = begin_s + self._deadline_s - time.monotonic()
                if left_s <= 0.0 or self._read("broken") is not None:
                    raise
            if work.is_completed():
                # It has come meanwhile, or failed, and raises again.
                work.wait()
                return
            if gone is not None:
                raise gone
            most_s = max(min(_LOOK_S, left_s), 0.001)
            try:
                self._alive()
            except RanksMissing as missing:
                most_s, gone = min(_LAST_CALL_S, left_s), missing

    def _fail(self, number: int, begin_s: float, error: RuntimeError) -> NoReturn:
        if self._aborted:
            # Whoever aborted it knows for whom.
            raise error
        self._broken = self._named(number, begin_s)
        if self._backend == "nccl":
            self.abort()
        raise self._broken from error

    def _named(self, number: int, begin_s: float) -> RanksMissing:
        """A connection that broke says nothing of whose process is gone: the others have until the deadline to be heard, if nobody
        knows who is gone."""
        try:
            self._note("came")
            self._note("failed")
            missing = self._missing(number, begin_s + self._deadline_s)
            ranks = [self.ranks[index] for index in missing]
            if (presence := self._presence()) is not None:
                presence.give_up(ranks)
            broken = ",".join(map(str, missing))
            self._answer(lambda: self._store.set(self._key("broken"), broken))
        except RanksMissing as gone:
            return gone
        except RuntimeError:
            # The store is gone, and with it the rank that holds it: perhaps for another's sake, whom the others have heard of.
            try:
                self._alive()
            except RanksMissing as gone:
                return gone
            ranks = [_STORE_RANK]
        return RanksMissing(ranks, group=self._name, reason=f"deadline {self._deadline_s:g} s")

    def _missing(self, number: int, expiry_s: float) -> list[int]:
        while True:
            if (broken := self._read("broken")) is not None:
                return [int(index) for index in broken.split(",") if index]
            if time.monotonic() >= expiry_s:
                # If all came, one of them ended in the middle: it alone has not seen the call fail.
                return self._behind("came", number) or self._behind("failed", number)
            self._alive()
            time.sleep(0.02)

    def _alive(self) -> None:
        """Raises RanksMissing when it is known of a rank of the unit that it has ended."""
        if (presence := self._presence()) is not None:
            presence.check()

    def _note(self, what: str) -> None:
        key, number = self._key(f"{what}/{self.rank}"), str(self._issued)
        self._answer(lambda: self._store.set(key, number))

    def _behind(self, what: str, number: int) -> list[int]:
        """Whose note of it says less, or is not there."""
        keys = self._keys(what)

        def noted() -> list[bytes]:
            if self._store.check(keys):
                return self._store.multi_get(keys)
            return [self._store.get(key) if self._store.check([key]) else b"-1" for key in keys]

        return [index for index, said in enumerate(self._answer(noted)) if int(said) < number]

    def _read(self, what: str) -> str | None:
        key = self._key(what)
        return self._answer(lambda: self._store.get(key).decode() if self._store.check([key]) else None)

    def _answer(self, ask: Callable[[], Answer], most_s: float | None = None) -> Answer:
        """What `ask` has of the store, which itself waits for ever. Raises RuntimeError after `most_s`; None: after the deadline, and from then on
        at once."""
        if self._store_is_silent:
            raise RuntimeError("the store does not answer")
        begin_s = time.monotonic()
        answer: Future[Answer] = Future()

        def fetch() -> None:
            try:
                answer.set_result(ask())
            except Exception as error:
                answer.set_exception(error)

        threading.Thread(target=fetch, name=f"store-{self._name}", daemon=True).start()
        while True:
            try:
                return answer.result(_LOOK_S)
            except TimeoutError:
                if answer.done():
                    # It has come meanwhile, if it was not the answer itself that said so.
                    return answer.result()
            self._alive()
            if time.monotonic() - begin_s > (most_s or self._deadline_s):
                # What takes longer by itself waits for other ranks, not for the store.
                self._store_is_silent = most_s is None
                raise RuntimeError("the store does not answer")

    def _keys(self, what: str) -> list[str]:
        """Of all ranks."""
        return [self._key(f"{what}/{index}") for index in range(self.world_size)]

    def _key(self, what: str) -> str:
        # Groups of different members may bear one name: every TP group is "tp".
        return f"{self._name}/{self.ranks[0]}-{self.ranks[-1]}-{self.world_size}/{what}"


class _Handle:
    def __init__(
        self, group: TorchCollectives, works: list[Work], number: int, then: Callable[[], None] | None
    ) -> None:
        self._group = group
        self._works = works
        self._number = number
        self._then = then

    def wait(self) -> None:
        self._group._complete(self._works, self._number)
        self._works = []
        if self._then is not None:
            self._then()
            self._then = None
