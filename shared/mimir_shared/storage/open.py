"""From what a user calls a cache to the storage that holds it."""

from pathlib import Path
from typing import Final

from mimir_shared.errors import InputError
from mimir_shared.redaction import hide_address_secrets, holds_address_secret
from mimir_shared.storage.folder import LocalStorage
from mimir_shared.storage.protocol import Storage

BUCKET_SCHEMES: Final = ("s3", "gs", "az")
_GB: Final = 10**9
DEFAULT_LOCAL_CACHE_GB: Final = 100.0


def open_storage(
    location: str, *, local_cache_dir: str | None = None, local_cache_gb: float = DEFAULT_LOCAL_CACHE_GB
) -> Storage:
    """The storage behind a `--cache` value: a folder, or s3://, gs:// or az:// with bucket and prefix.

    Args:
        local_cache_dir: folder that keeps what was read from a bucket; None: nothing is kept. A cache in a folder
            makes no use of it.
        local_cache_gb: the most that may lie there, in 10^9 bytes.
    Raises: InputError for another scheme, or a URL or folder that cannot be right.
    """
    scheme, separator, _ = location.partition("://")
    if holds_address_secret(location):
        raise InputError(
            f"--cache {hide_address_secrets(location)}: a password or signature in an address would end up in configs "
            f"and logs; give it by the environment, as the provider's own tools take it"
        )
    if scheme in BUCKET_SCHEMES and separator:
        from mimir_shared.storage.bucket import ObjectStorage
        from mimir_shared.storage.local_read_cache import LocalReadCache

        kept = LocalReadCache(Path(local_cache_dir), int(local_cache_gb * _GB)) if local_cache_dir else None
        return ObjectStorage(location, kept)
    if separator and scheme != "file":
        raise InputError(
            f"--cache {scheme}://…: unknown scheme; give a folder, or {', '.join(BUCKET_SCHEMES)}://bucket/prefix"
        )
    return LocalStorage(Path(location.removeprefix("file://")))
