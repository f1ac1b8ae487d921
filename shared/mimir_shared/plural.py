"""How many of a thing, as a person says it: f"{count} {noun_for(count, 'video')}"."""


def noun_for(count: int, singular: str) -> str:
    """The noun with an s, but for one: "1 video", "0 videos", "2 videos"."""
    return singular if count == 1 else f"{singular}s"
