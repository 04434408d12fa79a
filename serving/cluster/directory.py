"""The mailboxes at both ends of the directory: the supervisor's and the launcher's.

A change is sent the moment it happens. Heartbeats only say that nothing has, and an idle server should sleep: they are rarer than between
those who carry requests, and silence is judged later.
"""

from __future__ import annotations

import time

from serving.mailbox import Mailbox
from serving.metrics import Metrics

# Below the two seconds after which a worker that was told something counts us as silent.
_HEARTBEAT_S = 1.5
_TIMEOUT_S = 10.0


def directory_mailbox(name: str, *, host: str, secret: bytes) -> Mailbox[None]:
    """Bound and not started; the incarnation rises with every start. Raises StartupError if no port of `host` can be bound."""
    return Mailbox(
        worker_id=name,
        incarnation=time.time_ns(),
        host=host,
        secret=secret,
        heartbeat_s=_HEARTBEAT_S,
        metrics=Metrics("worker", worker=name),
        peer_timeout_s=_TIMEOUT_S,
    )
