"""Whether all ranks are about to train the same: each looks for run and cache by itself, and none says so later."""

import hashlib
from collections.abc import Mapping

from mimir_shared.errors import MachineError
from mimir_train.parallel.processes import Parallel

_SHOWN = 8


def refuse_unlike_ranks(parallel: Parallel, found: Mapping[str, str]) -> None:
    """Raise MachineError, on every rank, where one has found something else than rank 0.

    Args:
        found: what it is → that of this rank, in words. All ranks name the same things in the same order.
    """
    # 48 bits of each: exact in the float64 that ranks exchange
    digests = [hashlib.sha256(text.encode()).digest()[:6] for text in found.values()]
    rows = parallel.gather([float(int.from_bytes(digest, "big")) for digest in digests])
    for index, (what, text) in enumerate(found.items()):
        unlike = [str(rank) for rank, row in enumerate(rows) if row[index] != rows[0][index]]
        if unlike:
            more = f" and {len(unlike) - _SHOWN} more" if len(unlike) > _SHOWN else ""
            raise MachineError(
                f"rank {parallel.rank}: {what} is {text} here, and rank 0 has found another than rank "
                f"{', '.join(unlike[:_SHOWN])}{more}: they would train different things; a file system that machines "
                f"share may show new files late, so wait a minute and run the same command again"
            )
