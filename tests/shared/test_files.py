"""Files are whole or absent; keys come from content."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shared.files import atomic_write, read_json, sweep_partials, write_json
from shared.keys import caption_key, fingerprint


def test_a_failed_write_leaves_the_old_file_and_no_leftover(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(RuntimeError, match="midway"), atomic_write(path) as file:
        file.write(b"half")
        raise RuntimeError("midway")
    assert read_json(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_killed_writer_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom shared.files import atomic_write\n"
        "with atomic_write(Path(sys.argv[1])) as file:\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = tmp_path / "a.bin"
    root = Path(__file__).parent.parent.parent
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=root, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not path.exists()
    assert len(sweep_partials(tmp_path)) == 1
    assert not list(tmp_path.iterdir())


def test_equal_values_give_equal_bytes(tmp_path: Path) -> None:
    write_json(tmp_path / "a", {"x": 1, "y": [1.5, "e\u0301"]})
    write_json(tmp_path / "b", {"y": [1.5, "e\u0301"], "x": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_fingerprint_follows_values_and_names_not_order() -> None:
    assert fingerprint(a=1, b="x") == fingerprint(b="x", a=1)
    seen = [
        fingerprint(a=1),
        fingerprint(b=1),
        fingerprint(a="1"),
        fingerprint(a=1.0),
        fingerprint(a=[1]),
        caption_key("a"),
    ]
    assert len(set(seen)) == len(seen)


def test_a_captions_key_is_the_hash_of_its_exact_text() -> None:
    """Pinned, because stores are shared: machines of all versions look a caption up by it."""
    assert caption_key("a red ball") == "bc71b7628c550d296461bc10f0ecc1f0"
    spaced = ["a red ball", " a red ball", "a red ball ", "a  red ball", "A red ball", "a red ball\n", ""]
    assert len({caption_key(text) for text in spaced}) == len(spaced)


def test_bytes_are_on_disk_before_their_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named: list[bool] = []
    flush = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (named.append((tmp_path / "a").exists()), flush(file)))
    write_json(tmp_path / "a", 1)
    assert named == [False, True]  # the file's, then the folder's
