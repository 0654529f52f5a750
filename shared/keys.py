"""Keys and fingerprints: names made from content, so that equal input has an equal name on any machine."""

import hashlib
import json
from typing import Any

KEY_LENGTH = 32  # hex digits = 128 bits: no collision in any dataset a person can own


def fingerprint(**parts: Any) -> str:
    """Hash of named JSON values; a part's name and order-free value both count. Floats are written exactly (repr)."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


def caption_key(caption: str) -> str:
    """Name of a caption: the hash of its exact text, taken before cleaning, so that any machine can look it up."""
    return fingerprint(caption=caption)


EMPTY_CAPTION = caption_key("")
