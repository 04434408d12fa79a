"""Every message between router, prefill workers, decode workers and supervisor.

    router -> prefill       Attach, PrefillJob, Abort, Drain, MetricsQuery
    router -> decode        Attach, DecodeJob, Abort, Drain, MetricsQuery
    prefill -> decode       KVBind, KVReady, KVClosed          (the prefill worker connects to the decode worker's endpoint)
    decode -> prefill       KVTicket, KVRefused, KVClose
    worker -> router        TokenBatch, Preempted, JobFailed, WorkerState, MetricsReply
    router -> supervisor    Attach;      supervisor -> router    Roster
    supervisor -> decode    Roster, Drain (a dead rank in it is proof that nothing of that incarnation writes any more)
    leader -> follower      PagesWrite, PagesWatch, PagesPart, PagesCheck  (TP ranks of one DP group; a follower connects to its leader)
    follower -> leader      PagesReady, PagesWritten, PagesArrived, PagesSums
    everybody               Heartbeat

A message travels as an `Envelope` (serving.wire), which names its sender and the sender's incarnation. A job id is unique to one life of a
request, so a message of an earlier life finds no job and is dropped. Time is a remaining budget in seconds, never a wall clock.
"""

from __future__ import annotations

import msgspec

from serving.core.request import FinishReason, SamplingParams, TokenLogprobs

PROTOCOL_VERSION = 3


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of everything that crosses a process; the tag is the class name."""


class PeerAddress(msgspec.Struct, frozen=True):
    """Where a worker listens. An answer from another incarnation is stale."""

    worker_id: str
    endpoint: str
    incarnation: int


class Attach(Message, frozen=True):
    """The sender wants the receiver's state (WorkerState or Roster) until its socket goes quiet."""


class Heartbeat(Message, frozen=True):
    """Sent by the I/O thread, whatever the step loop does. `progress` rises with every step; `step_budget_s` announces the step in flight."""

    progress: int
    step_budget_s: float = 0.0


class PrefillJob(Message, frozen=True):
    """Compute `token_ids`, sample the next token, hand the latents to `decode`.

    `token_ids[num_prompt_tokens:]` were emitted by earlier lives of the request. `decode` is None when no second token is wanted.
    """

    job_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    max_new_tokens: int
    budget_s: float
    decode: PeerAddress | None


class DecodeJob(Message, frozen=True):
    """Reserve room for `token_ids` and what follows; the latents come from a prefill worker, the tokens go to the sender."""

    job_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    max_new_tokens: int
    budget_s: float


class Abort(Message, frozen=True):
    """The client is gone, or the job has ended elsewhere. Always allowed, also for a job that is not known (any more)."""

    job_id: str


class Drain(Message, frozen=True):
    """Take no new job, settle what runs, then exit."""


class KVBind(Message, frozen=True):
    """The first chunk starts: turn credits into pages. `identity` is the hash of everything two pools must agree on."""

    job_id: str
    identity: str


class KVTicket(Message, frozen=True):
    """Pages of the decode pool that the prefill worker may write, each once.

    `page_ids[i]` with `epochs[i]` receives tokens [(first_page + i) * 64, ...); what lies before is in the decode worker's prefix cache.
    `agents` are the transfer backend's own descriptions of the pools of the group's TP ranks (opaque to everybody else): a page is written
    into that of its owner (kvcache.transfer.owners), who copies it to the others.
    """

    job_id: str
    first_page: int
    page_ids: list[int]
    epochs: list[int]
    agents: list[bytes]


class KVRefused(Message, frozen=True):
    """No ticket: identity differs, there is no room, the job is gone, or it never came. `router_told`: its router knows already."""

    job_id: str
    reason: str
    router_told: bool


class KVReady(Message, frozen=True):
    """The manifest: what the writes of this job amount to. Sent when the last one was posted; they complete by notification.

    `num_writes` transfers carry `num_bytes` in all. `checksums` maps an index into the ticket's pages to the checksum of that page's valid rows
    (kvcache.transfer.manifest). `first_token` was sampled by the prefill worker and has been sent to the client. `hidden` is the main model's
    last hidden state, dtype of the model, for the MTP row of the first token; empty without MTP.
    """

    job_id: str
    epochs: list[int]
    num_tokens: int
    num_writes: int
    num_bytes: int
    checksums: dict[int, int]
    first_token: int
    hidden: bytes


class KVClose(Message, frozen=True):
    """Decode gives the job up, and its router knows: stop writing, and say when nothing is in flight any more."""

    job_id: str


class KVClosed(Message, frozen=True):
    """Proof that no write of this job is in flight and none will follow."""

    job_id: str


class WriteOrder(msgspec.Struct, frozen=True, kw_only=True):
    """One transfer: pages of TP rank `rank` of ours into those of the worker `worker_id`, into the pool that `agent` describes.

    `number` says which of the job's, `num_tokens` of their rows are valid. `notice` is what the target is notified of. `order_id` is unique
    where another rank than the leader carries it out.
    """

    job_id: str
    number: int
    rank: int
    worker_id: str
    agent: bytes
    source_page_ids: list[int]
    target_page_ids: list[int]
    num_tokens: int
    notice: bytes
    order_id: int = 0


class PagesReady(Message, frozen=True):
    """The sender is TP rank `rank` of the receiver's DP group and moves pages for it. `agent` describes its pool; empty where nobody writes."""

    rank: int
    agent: bytes


class PagesWrite(Message, frozen=True):
    """Write these pages of yours, once you have computed the unit's round `after_round`."""

    order: WriteOrder
    after_round: int


class PagesWritten(Message, frozen=True):
    """Nothing of the order is in flight any more; `error` None: all of it has arrived."""

    order_id: int
    error: str | None = None


class PagesArrived(Message, frozen=True):
    """Another unit has written into the sender's pool, and announces it so (kvcache.transfer.manifest)."""

    notice: bytes


class PagesWatch(Message, frozen=True):
    """So many jobs may be written to in your pool from now on, the last writes of `num_due` of them have been posted."""

    num_jobs: int
    num_due: int


class PagesPart(Message, frozen=True):
    """The worker is gone: forget its agents."""

    worker_id: str


class PagesCheck(Message, frozen=True):
    """Sum up these pages of the job in your pool: index into the ticket -> (page id, valid rows)."""

    job_id: str
    rows: dict[int, tuple[int, int]]


class PagesSums(Message, frozen=True):
    """The checksums asked for, by index (kvcache.transfer.manifest)."""

    job_id: str
    checksums: dict[int, int]


class JobTokens(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """New tokens of one job. The positions follow on from what the job has sent before.

    `num_cached_tokens`, with the first token of a job only: how many tokens of its text the prefill pool's prefix cache had.
    """

    job_id: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish: FinishReason | None = None
    num_cached_tokens: int = 0


class TokenBatch(Message, frozen=True):
    """All tokens of one engine step that go to one router. `stages` holds seconds by job and stage where a stage ended in this step
    (prefill_queue, prefill; transfer_exposed, decode_join, first_step)."""

    jobs: list[JobTokens]
    stages: dict[str, dict[str, float]] = {}


class Preempted(Message, frozen=True):
    """Decode ran out of pages; the job is over and the router resumes the request through a prefill worker."""

    job_id: str


class JobFailed(Message, frozen=True):
    """The job is over. `retryable`: another life may succeed (a peer died); otherwise the request cannot be served, or, `overloaded`, not now."""

    job_id: str
    reason: str
    retryable: bool
    overloaded: bool = False


class WorkerState(Message, frozen=True):
    """What placement needs to know, sent to every attached router a few times a second while it changes.

    `credit_pages`: pages of a decode pool not yet promised to a job. `page_states`: the eight counts of kvcache.pages. `waiting_work`: the
    waiting tokens with their attention, and `pair_cost` what that is made of, as `serving.core.prefill_work` has it.
    """

    role: str
    ready: bool
    draining: bool
    num_running: int
    num_waiting: int
    waiting_work: int
    num_pages: int
    credit_pages: int
    page_states: dict[str, int]
    step_s: float
    pair_cost: float = 0.0


class MetricsQuery(Message, frozen=True):
    """Ask for the worker's metrics, so that a scrape of the router is exact at the moment of the scrape."""

    query_id: int


class MetricsReply(Message, frozen=True):
    """Prometheus text exposition of one worker, every sample labelled with the worker."""

    query_id: int
    exposition: str


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One worker as the supervisor sees it. role: prefill, decode or both. state: starting, ready, draining, dead.

    Ranks of a unit start, are ready and die together. Only one that `leads` takes jobs: it has the scheduler of its DP group.
    `unit`: the unit's name; all its ranks have one incarnation.
    """

    address: PeerAddress
    role: str
    state: str
    detail: str = ""
    leads: bool = True
    unit: str = ""


class Roster(Message, frozen=True):
    """All workers, whenever one of them changes."""

    workers: list[WorkerInfo]


AnyMessage = (
    Attach
    | Heartbeat
    | PrefillJob
    | DecodeJob
    | Abort
    | Drain
    | KVBind
    | KVTicket
    | KVRefused
    | KVReady
    | KVClose
    | KVClosed
    | PagesReady
    | PagesWrite
    | PagesWritten
    | PagesArrived
    | PagesWatch
    | PagesPart
    | PagesCheck
    | PagesSums
    | TokenBatch
    | Preempted
    | JobFailed
    | WorkerState
    | MetricsQuery
    | MetricsReply
    | Roster
)


class Envelope(msgspec.Struct, frozen=True):
    """What lies in a frame: who speaks, in which life, and what is said."""

    sender: str
    incarnation: int
    message: AnyMessage
