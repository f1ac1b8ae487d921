"""Secrets stay out of what we write: messages, logs, plans and configs.

Credentials come from the environment and the provider's own files alone. What holds them in another place is refused
where it would be kept, and blanked where it is only quoted.
"""

import os
import re
from collections.abc import Mapping
from typing import Final

HIDDEN: Final = "…"

# After "user:" up to the last @ of the word: passwords are pasted as they are, with / and @ in them. But host:80/ has a
# port.
_USERINFO = re.compile(r"(?<=://)(?:[^\s/:@'\"]*:(?!\d+[/?#])[^\s'\"]*|[^\s/?#'\"]*)@")
_SIGNED = re.compile(
    r"([?&;](?:[\w.~%-]*(?:signature|credential|token|secret|password|passwd|accesskeyid|api_?key)[\w.~%-]*|sig|key|auth)=)"
    r"[^&;#\s'\"]+",
    re.IGNORECASE,
)
_SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_KEY|PRIVATE", re.IGNORECASE)
_MIN_SECRET = 8
"""A shorter value may be a word of an innocent message."""


def hide_address_secrets(text: str) -> str:
    """The text with user, password, signatures and tokens taken out of the addresses in it."""
    if "://" not in text:
        return text
    return _SIGNED.sub(rf"\1{HIDDEN}", _USERINFO.sub(f"{HIDDEN}@", text))


def holds_address_secret(text: str) -> bool:
    """Whether an address in the text has a password, signature or token in it."""
    return hide_address_secrets(text) != text


def hide_secrets(text: str, environment: Mapping[str, str] | None = None) -> str:
    """As hide_address_secrets, and without the values of environment variables that are named like secrets."""
    named = os.environ if environment is None else environment
    values = {value for name, value in named.items() if _SECRET_NAMES.search(name) and len(value) >= _MIN_SECRET}
    # the longest first: one may be the beginning of another
    for value in sorted(values, key=len, reverse=True):
        # what is named like a secret may be the file or folder that holds it, which a message has to name
        if not value.startswith(("/", "./", "~")):
            text = text.replace(value, HIDDEN)
    return hide_address_secrets(text)
