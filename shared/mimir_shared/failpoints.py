"""Named points of the commit protocol at which a test ends the process, or counts that it came by.

In use nothing is armed and `failpoint` is one call that returns. A point of publishing is named by what
is published and the step that is done: "record.linked" lies between the link and the fsync of its folder.
"""

import re
from collections.abc import Callable
from typing import Final

_PUBLISHED: Final = {
    "plan": r"plan/.*",
    "spec": r".*/spec\.json",
    "empty": r".*/empty\.(json|safetensors)",
    "data": r".*/data/.*",
    "record": r".*/manifests/.*",
    "snapshot_index": r"snapshots/.*/index\.arrow",
    "snapshot": r"snapshots/.*/snapshot\.json",
}
_STEPS: Final = ("written", "synced", "linked", "dir_synced")
PUBLISHING: Final = frozenset(f"{kind}.{step}" for kind in _PUBLISHED for step in _STEPS)
DECLARED: Final = frozenset(
    {
        "lease.taken",
        "lease.heartbeat",
        "lease.taken_over",
        "lease.dropped",
        "gc.set_aside",
        "gc.removed",
        "checkpoint.folder_made",
        "checkpoint.tensor_written",
        "checkpoint.file_synced",
        "checkpoint.manifest_written",
        "checkpoint.manifest_synced",
        "checkpoint.old_set_aside",
        "checkpoint.renamed",
        "checkpoint.removed_from_sight",
        "checkpoint.removed",
    }
)
"""Every point with a literal name; the others are those of PUBLISHING."""

_action: Callable[[str], None] | None = None


def failpoint(name: str) -> None:
    """Mark a point of DECLARED."""
    if _action is not None:
        _action(name)


def publishing_failpoint(name: str, step: str) -> None:
    """Mark that a step in publishing the file `name` of a cache is done."""
    if _action is not None:
        kind = next((kind for kind, pattern in _PUBLISHED.items() if re.fullmatch(pattern, name)), "other")
        _action(f"{kind}.{step}")


def arm(action: Callable[[str], None] | None) -> None:
    """Have `action` called at every point with its name, in this process; None: no more. For tests."""
    global _action
    _action = action
