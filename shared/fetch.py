"""Models from the Hub. Input: a repository id and the files wanted. Output: a local folder that holds them."""

from collections.abc import Sequence
from pathlib import Path

from shared.errors import ModelError

HUB_ID = r"[\w.-]+/[\w.-]+"


def snapshot(repo: str, patterns: Sequence[str], download: bool = True) -> Path:
    """Folder of a repository's files that match; those that are here already are not fetched again."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, allow_patterns=list(patterns), local_files_only=not download))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        why = str(error).splitlines()[0]
        raise ModelError(f"{repo}: no such folder here, and it cannot be downloaded ({why}); check the network, or "
                         "give a local folder or .safetensors file with MODEL=path") from None  # fmt: skip
