"""The names of sampled videos, as VBench has them."""

import hashlib

MAX_NAME_BYTES = 255
"""Of one file name, in every common file system."""

RESERVED_NAME_BYTES = 16
"""Left for what is put behind a name while a file is being written."""

DIGEST_DIGITS = 12


def video_name(prompt: str, index: int) -> str:
    """The file of one video: `<prompt>-<index>.mp4`, which is how VBench finds the videos of a prompt.

    Where a file name cannot hold the prompt (a slash, a control character, a dot in front, or more than 255 bytes),
    those characters become `_`, the rest is cut, and 12 hex digits of the prompt's sha256 stand before the index.
    """
    ending = f"-{index}.mp4"
    room = MAX_NAME_BYTES - RESERVED_NAME_BYTES - len(ending)
    safe = "".join("_" if character in "/\\" or not character.isprintable() else character for character in prompt)
    if safe.startswith("."):
        safe = "_" + safe[1:]
    if safe == prompt and len(safe.encode()) <= room:
        return safe + ending
    digest = hashlib.sha256(prompt.encode()).hexdigest()[:DIGEST_DIGITS]
    # cut in bytes; a character that is cut in two is dropped
    cut = safe.encode()[: room - DIGEST_DIGITS - 1].decode(errors="ignore")
    return f"{cut}-{digest}{ending}"
