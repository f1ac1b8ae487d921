"""The formats of shards by name."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

from mimir_shared.formats.shard_format import NewFile, ShardFormat
from mimir_shared.formats.webdataset import WebDatasetWriter
from mimir_shared.formats.zarr import ZarrWriter
from mimir_shared.manifest import CacheFormat
from mimir_shared.storage.protocol import Storage

_WRITERS: Final[dict[CacheFormat, Callable[[int, NewFile], ShardFormat]]] = {
    "webdataset": WebDatasetWriter,
    "zarr": ZarrWriter,
}


@contextmanager
def open_shard_format(storage: Storage, name: CacheFormat, shard: int) -> Iterator[ShardFormat]:
    """Begin to write a shard; what was not published when the block ends is removed."""
    with ExitStack() as files:
        yield _WRITERS[name](shard, lambda: files.enter_context(storage.temporary()))
