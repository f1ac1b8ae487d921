"""Opening a bucket through obstore: what its URL says, and what the environment says besides."""

import os
import re
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from obstore.exceptions import BaseError
from obstore.store import AzureStore, GCSStore, S3Store

from mimir_shared.errors import InputError
from mimir_shared.storage.bucket_requests import RequestLimits


class RuntimeOwner:
    """The process that started obstore's threads: a fork does not take them along, and its requests would hang."""

    def __init__(self) -> None:
        self._pid: int | None = None

    def check(self, where: str) -> None:
        pid = os.getpid()
        if self._pid is None:
            self._pid = pid
        elif self._pid != pid:
            raise InputError(
                f"{where}: this process was forked from one that had read from a bucket, whose connections it cannot "
                f"use; start worker processes by spawn, or fork before the cache is opened"
            )


runtime_owner: Final = RuntimeOwner()


def parse_location(location: str) -> tuple[str, str, str]:
    """(scheme, bucket, prefix) of a URL. Raises InputError, which never repeats what could be a secret."""
    scheme, _, rest = location.partition("://")
    bucket, _, prefix = rest.partition("/")
    if "@" in bucket or "?" in rest or ":" in bucket or "#" in rest:
        raise InputError(
            f"--cache {scheme}://…: a bucket's URL has the form {scheme}://bucket/prefix, without user, password, port "
            f"or query; credentials and endpoint come from the environment (AWS_ACCESS_KEY_ID, AWS_PROFILE, "
            f"AWS_ENDPOINT_URL, …)"
        )
    prefix = prefix.strip("/")
    parts = prefix.split("/") if prefix else []
    if not re.fullmatch(r"[A-Za-z0-9._-]+", bucket) or any(part in ("", ".", "..") for part in parts):
        raise InputError(f"--cache {location}: expected {scheme}://bucket/prefix")
    return scheme, bucket, prefix


def open_store(scheme: str, bucket: str, prefix: str, limits: RequestLimits, retries: bool) -> Any:
    """A store of obstore's below the prefix; with `retries`, it tries the parts of an upload again.

    Raises: InputError where the environment does not make a connection.
    """
    settings: dict[str, Any] = {
        "prefix": prefix or None,
        "client_options": {
            "connect_timeout": timedelta(seconds=limits.connect_s),
            "timeout": timedelta(seconds=limits.request_s),
            "user_agent": "mimir-t2v",
        },
        # Parts of an upload are tried again one by one; all else by the Requester, which sees more.
        "retry_config": {
            "max_retries": 10 if retries else 0,
            "backoff": {
                "init_backoff": timedelta(seconds=limits.first_pause_s),
                "max_backoff": timedelta(seconds=limits.longest_pause_s),
                "base": 2,
            },
            "retry_timeout": timedelta(seconds=limits.action_s),
        },
    }
    try:
        if scheme == "gs":
            return GCSStore(bucket, **settings)
        if scheme == "az":
            return AzureStore(bucket, **settings)
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
        if endpoint.startswith("http://"):
            settings["client_options"]["allow_http"] = True  # whoever writes http:// means it
        return S3Store(bucket, credential_provider=_profile_credentials(), **settings)
    except (BaseError, ValueError) as fault:
        raise InputError(
            f"{scheme}://{bucket}: the settings in the environment do not make a connection ({type(fault).__name__}); "
            f"see the service's own names: AWS_…, GOOGLE_…, AZURE_STORAGE_…"
        ) from None


def _profile_credentials() -> Any:  # a class of obstore's that needs boto3
    """What ~/.aws says, for keys in the environment and roles of machines are found without."""
    profile = os.environ.get("AWS_PROFILE")
    file = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials").expanduser()
    if os.environ.get("AWS_ACCESS_KEY_ID") or os.environ.get("AWS_SKIP_SIGNATURE") or not (profile or file.is_file()):
        return None
    try:
        from botocore.exceptions import BotoCoreError
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        raise InputError(
            f"{'AWS_PROFILE' if profile else file}: profiles are read by boto3, which is not installed: pip install "
            f"boto3, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from None
    try:
        return Boto3CredentialProvider()
    except (BotoCoreError, ValueError) as fault:
        raise InputError(
            f"{f'AWS_PROFILE {profile}' if profile else file}: no credentials ({type(fault).__name__}); mend the file, "
            f"or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from None
