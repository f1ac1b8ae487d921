"""The features of the empty prompt, for the unconditional branch of training: one file beside the shards."""

import time
from collections.abc import Collection

from mimir_precompute.encoders.base import Encoder
from mimir_shared.errors import CacheError
from mimir_shared.feature_folder import FeatureFolder
from mimir_shared.formats.webdataset import document_bytes
from mimir_shared.layout import empty_name
from mimir_shared.sealed import read_sealed_json, write_sealed_json, write_sealed_tensors


def lacks_empty_prompt(folder: FeatureFolder, done: Collection[int]) -> bool:
    """Whether a feature of which some shards are done has lost that of the empty prompt."""
    name = empty_name(folder.feature, folder.fingerprint)
    return bool(done) and folder.feature != "latents" and not folder.storage.exists(name)


def publish_empty(folder: FeatureFolder, encoder: Encoder, answers: FeatureFolder | None) -> None:
    """Store the feature of the empty prompt, for the unconditional branch, if it has one."""
    name = empty_name(folder.feature, folder.fingerprint)
    if folder.storage.exists_durably(name):
        return
    document = None
    if answers is not None:
        answers_name = empty_name("answers", answers.fingerprint)
        document = read_sealed_json(answers.storage.read(answers_name), f"{answers.storage.root}/{answers_name}")
    encoded = encoder.encode_empty(document)
    if encoded is None:
        return
    if encoded.tensors:
        valid = document_bytes(dict(encoded.valid_rows)).decode()
        data = write_sealed_tensors(encoded.tensors, {"valid_rows": valid})
    else:
        data = write_sealed_json(dict(encoded.document))
    folder.storage.create(name, data)


def require_answers(answers: FeatureFolder, *, wait: bool = False, poll_s: float = 2.0) -> None:
    """See that the cache has begun to have the answers that `llm` is made from.

    Args:
        wait: until another worker has begun them.
    Raises: CacheError where there are none.
    """
    pause_s = 0.05
    while not answers.storage.exists(empty_name("answers", answers.fingerprint)):
        if wait:
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, poll_s)
            continue
        raise CacheError(
            f"{answers.storage.root}/{answers.directory}: `llm` is made from `answers`, which this cache does not have "
            f"with these models and settings; encode both: --features answers,llm"
        )
