"""Numbers in sentences: how many of something, and how large."""

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def noun_for(count: int, singular: str) -> str:
    """The noun with an s, but for one."""
    return singular if count == 1 else f"{singular}s"


def counted(number: int, noun: str) -> str:
    """(1, "shard") → "1 shard", (3, "shard") → "3 shards"."""
    return f"{number} {noun_for(number, noun)}"


def format_size(nbytes: float) -> str:
    """952320 → "952 kB": decimal units, three figures."""
    size, unit = float(nbytes), 0
    while round(size) >= 1000 and unit < len(_UNITS) - 1:
        size, unit = size / 1000, unit + 1
    digits = 0 if unit == 0 or size >= 100 else (1 if size >= 10 else 2)
    return f"{size:.{digits}f} {_UNITS[unit]}"
