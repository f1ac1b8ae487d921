"""Whose a lease is: what its owner writes into it, and what others make of that."""

import os
import socket
import uuid
from dataclasses import dataclass
from typing import Final

from mimir_shared.plain_documents import parse_json
from mimir_shared.process_identity import life_of, process_domain
from mimir_shared.storage.lease_store import LeaseStore, StoredLease

HEARTBEAT_S: Final = 20.0
TTL_HEARTBEATS: Final = 6
"""A lease that was not touched for so many heartbeats may be taken over."""


@dataclass(frozen=True, kw_only=True)
class LeaseOwner:
    """Who has a lease: what is written into it. The fields are empty where its content is not whole yet."""

    host: str = ""
    domain: str = ""
    pid: int = 0
    token: str = ""
    """Of one `Leases`: a process may have several, one after the other."""
    ttl_s: float = HEARTBEAT_S * TTL_HEARTBEATS
    """The owner touches it much more often than this."""
    taken_s: float = 0.0
    """When it was taken, by the storage's clock; 0: not known."""


def this_process(heartbeat_s: float) -> LeaseOwner:
    """An owner that touches its leases every `heartbeat_s`."""
    return LeaseOwner(
        host=socket.gethostname(),
        domain=process_domain(),
        pid=os.getpid(),
        token=uuid.uuid4().hex,
        ttl_s=heartbeat_s * TTL_HEARTBEATS,
    )


@dataclass(frozen=True, kw_only=True)
class SeenLease:
    """A lease as found in the cache, and whose it is."""

    stored: StoredLease
    owner: LeaseOwner

    @property
    def name(self) -> str:
        return self.stored.name

    @property
    def is_dead(self) -> bool:
        """Whether the owner ran on this machine and certainly does not any more."""
        return self.owner.pid > 0 and life_of(self.owner.domain, self.owner.pid) == "dead"

    def is_stale(self, now_s: float) -> bool:
        """Whether its owner is dead, or has not touched it for long.

        A time far ahead is stale too: the storage's clock was set back, and no heartbeat has come since.

        Args:
            now_s: by the clock of the storage.
        """
        return self.is_dead or abs(now_s - self.stored.touched_s) > self.owner.ttl_s


def read_lease(store: LeaseStore, name: str) -> SeenLease | None:
    """None where there is no such lease (any more)."""
    stored = store.read(name)
    if stored is None:
        return None
    try:
        return SeenLease(stored=stored, owner=LeaseOwner(**parse_json(stored.owner)))
    except (ValueError, TypeError):
        return SeenLease(stored=stored, owner=LeaseOwner())
