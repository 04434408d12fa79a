"""Who computes how many tokens of which expert, while it is being evened out: the local search of `redundancy.assign`.

    start:     pieces of the large experts, then the others whole, each to the least loaded host with a free slot
    even_out:  paths   from GPUs over the mean to GPUs under it, by breadth-first search, amounts halved from a quarter of the mean down;
                       a GPU on the way whose slots are all in use passes its smallest shares on
               relief  of the fullest GPU, one hand-over at a time: the best of those that need at most one eviction

A slot is in use while it has tokens. A share that is handed over whole frees its slot. Plain lists and dictionaries of integers: at 32
GPUs they are faster than arrays, whose calls cost more than what they compute.
"""

from __future__ import annotations

from collections.abc import Sequence

_EVEN = 50
"""The fullest GPU is over the mean by at most one part in so many (2 %): even enough."""
_FIRST, _LAST = 4, 32
"""Paths carry a quarter of the mean and more, then half of that, down to this part of the mean."""
_MOST_HAND_OVERS = 120
"""Ends a search that gets nowhere; about 35 are usual."""

Hop = tuple[int, int, int]
"""(from GPU, expert, to GPU)"""


class Shares:
    """held[gpu] maps experts to tokens, each more than 0, at most `active` of them; load[gpu] is their sum. `hosts[expert]`: GPUs, rising."""

    def __init__(self, hosts: Sequence[Sequence[int]], *, num_gpus: int, active: int, mean: int) -> None:
        self.hosts = hosts
        self.num_gpus = num_gpus
        self.active = active
        self.mean = mean
        self.held: list[dict[int, int]] = [{} for _ in range(num_gpus)]
        self.load = [0] * num_gpus
        self._hand_overs = 0

    def start(self, tokens: Sequence[int], *, piece: int, local: Sequence[Sequence[int]], gpus_per_node: int) -> None:
        """All tokens [experts] to hosts. `local` [experts][nodes]: those of a node's own ranks, which draw a share there where loads are alike."""
        held, active, mean = self.held, self.active, self.mean
        used = [expert for expert, count in enumerate(tokens) if count]
        used.sort(key=tokens.__getitem__, reverse=True)
        spare = self.num_gpus * active - len(used)
        # Full slots count like load: where hot experts are, cold ones must still find room.
        score = [0] * self.num_gpus

        def put(expert: int, gpu: int, count: int) -> None:
            held[gpu][expert] = count
            self.load[gpu] += count
            score[gpu] = 90 * self.load[gpu] + mean * len(held[gpu]) ** 2

        for expert in used:
            assert self.hosts[expert], f"expert {expert} has tokens and no host"
            if len(self.hosts[expert]) == 1:
                put(expert, self.hosts[expert][0], tokens[expert])
        for expert in used:
            hosts = self.hosts[expert]
            if len(hosts) == 1:
                continue
            own = local[expert]
            free = [gpu for gpu in hosts if len(held[gpu]) < active]
            free.sort(key=lambda gpu: score[gpu] - 45 * own[gpu // gpus_per_node])
            free = free or [self._cover(hosts)]
            number = max(1, min(-(-tokens[expert] // piece), len(free), 1 + spare))
            spare -= number - 1
            for index, gpu in enumerate(free[:number]):
                put(expert, gpu, tokens[expert] // number + (index < tokens[expert] % number))
        assert max(map(len, held)) <= active, "no choice of active slots holds all experts that have tokens"

    def even_out(self) -> None:
        """Hands tokens over until the fullest GPU is even enough, or nothing helps."""
        amount, last = self.mean // _FIRST, self.mean // _LAST
        while amount > last:
            self._along_paths(amount)
            amount //= 2
        goal = self.mean + self.mean // _EVEN
        while self._hand_overs < _MOST_HAND_OVERS:
            fullest = max(range(self.num_gpus), key=self.load.__getitem__)
            if self.load[fullest] <= goal:
                break
            self._hand_overs += 1
            # Where no hand-over leaves everybody even, one that halves the excess opens the way to others.
            if not self._relieve(fullest, goal) and not self._relieve(fullest, (goal + self.load[fullest]) // 2):
                break

    def _move(self, expert: int, source: int, target: int, count: int) -> None:
        rest = self.held[source][expert] - count
        if rest:
            self.held[source][expert] = rest
        else:
            del self.held[source][expert]
        self.held[target][expert] = self.held[target].get(expert, 0) + count
        self.load[source] -= count
        self.load[target] += count

    def _takes(self, gpu: int, expert: int) -> bool:
        return expert in self.held[gpu] or len(self.held[gpu]) < self.active

    def _pass_on(self, came: dict[int, tuple[int, int] | None], gpu: int) -> int:
        """Hands whole shares over along the way back from `gpu`; returns where the way began, which has a free slot now."""
        while (hop := came[gpu]) is not None:
            source, expert = hop
            self._move(expert, source, gpu, self.held[source][expert])
            gpu = source
        return gpu

    def _cover(self, hosts: Sequence[int]) -> int:
        """Frees a slot on one of `hosts`, all full; an augmenting path, so there is one if the experts can be held at all."""
        came: dict[int, tuple[int, int] | None] = dict.fromkeys(hosts)
        queue = list(hosts)
        for gpu in queue:
            for expert in self.held[gpu]:
                for other in self.hosts[expert]:
                    if other != gpu and expert in self.held[other]:
                        self._move(expert, gpu, other, self.held[gpu][expert])
                        return self._pass_on(came, gpu)
                    if other not in came:
                        came[other] = (gpu, expert)
                        if len(self.held[other]) < self.active:
                            return self._pass_on(came, other)
                        queue.append(other)
        raise AssertionError("no choice of active slots holds all experts that have tokens")

    def _evict(self, gpu: int, *, keep: int, most: int) -> bool:
        """Frees a slot of `gpu`: whole shares of at most `most` tokens handed on until one finds room, never one of expert `keep`."""
        came: dict[int, tuple[int, int] | None] = {gpu: None}
        queue = [gpu]
        for full in queue:
            for count, expert in sorted((count, expert) for expert, count in self.held[full].items()):
                if count > most:
                    break
                if expert == keep:
                    continue
                for other in self.hosts[expert]:
                    if other in came:
                        continue
                    came[other] = (full, expert)
                    if self._takes(other, expert):
                        self._pass_on(came, other)
                        return True
                    queue.append(other)
        return False

    def _along_paths(self, amount: int) -> None:
        """Hand-overs of `amount` tokens and more, each along a path whose GPUs keep their loads but for its ends and for evictions of no more."""
        evicts = [True] * self.num_gpus
        while self._hand_overs < _MOST_HAND_OVERS and (path := self._path(amount, evicts)):
            self._hand_overs += 1
            begin, end = path[-1][0], path[0][2]
            excess, gap = self.load[begin] - self.mean, self.mean - self.load[end]
            count = min(excess, gap, *(self.held[source][expert] for source, expert, _ in path))
            # From the end on: what an eviction breaks off is then only the path's beginning.
            for source, expert, target in path:
                if not self._takes(target, expert) and not self._evict(target, keep=expert, most=count):
                    evicts[target] = False
                    break
                there = self.held[source].get(expert, 0)
                if not there:
                    break
                self._move(expert, source, target, min(count, there))

    def _path(self, amount: int, evicts: Sequence[bool]) -> list[Hop]:
        """Hops, last first, from a GPU that is `amount` over the mean to one that is as much under it; none: []."""
        held, load, all_hosts, active = self.held, self.load, self.hosts, self.active
        queue = sorted(
            (gpu for gpu in range(self.num_gpus) if load[gpu] >= self.mean + amount), key=lambda gpu: -load[gpu]
        )
        came: dict[int, tuple[int, int] | None] = dict.fromkeys(queue)
        for source in queue:
            for expert, count in held[source].items():
                if count < amount:
                    continue
                for gpu in all_hosts[expert]:
                    if gpu in came or not (evicts[gpu] or expert in held[gpu] or len(held[gpu]) < active):
                        continue
                    came[gpu] = (source, expert)
                    if load[gpu] > self.mean - amount:
                        queue.append(gpu)
                        continue
                    path: list[Hop] = []
                    while (hop := came[gpu]) is not None:
                        path.append((*hop, gpu))
                        gpu = hop[0]
                    return path
        return []

    def _relieve(self, gpu: int, limit: int) -> bool:
        """The hand-over that takes most from `gpu` and leaves no other with more than `limit`; False: there is none.

        A host without a free slot may pass one of its shares on, whole, also to `gpu` itself.
        """
        held, load, all_hosts, active = self.held, self.load, self.hosts, self.active
        excess = load[gpu] - self.mean
        free_slot = len(held[gpu]) < active
        best = 0
        plan: tuple[int, int, int, tuple[int, int] | None] | None = None
        # Largest shares first, so that what could not be better is left out early.
        for there, expert in sorted(((count, expert) for expert, count in held[gpu].items()), reverse=True):
            most = there if there < excess else excess
            if most <= best:
                break
            for host in all_hosts[expert]:
                if host == gpu:
                    continue
                shares, room = held[host], limit - load[host]
                if expert in shares or len(shares) < active:
                    count = most if most < room else room
                    if count > best:
                        best, plan = count, (expert, host, count, None)
                    continue
                for evicted, size in shares.items():
                    count = most if most < room + size else room + size
                    if count <= best:
                        continue
                    for other in all_hosts[evicted]:
                        if other == gpu:
                            count = min(there, excess + size, room + size)
                            if count - size > best and (free_slot or count == there or evicted in held[gpu]):
                                best, plan = count - size, (expert, host, count, (evicted, gpu))
                        elif (
                            other != host
                            and load[other] + size <= limit
                            and (evicted in held[other] or len(held[other]) < active)
                        ):
                            count = most if most < room + size else room + size
                            if count > best:
                                best, plan = count, (expert, host, count, (evicted, other))
        if plan is None:
            return False
        expert, host, count, eviction = plan
        if eviction is not None:
            evicted, other = eviction
            self._move(evicted, host, other, held[host][evicted])
        self._move(expert, gpu, host, count)
        return True
