"""Words for people."""


def counted(count: int, noun: str) -> str:
    """'1 image', '2 images'."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
