"""Numbers in sentences: how many of something, how large, how long."""

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


def describe_duration(seconds: float) -> str:
    """ "45 s", "12 min", "3 h 05 min", "2 d 4 h": as exact as it is of use."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"
