"""Every layout of a dataset gives each file its captions; unclear ones are refused, never guessed."""

import json
from pathlib import Path

import pytest

from ingest.caption import caption_from_name, lint, names_direction, with_prefix
from ingest.discover import Dataset, discover, natural
from shared.errors import DatasetError


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def found(root: Path, from_file_names: bool = True) -> Dataset:
    return discover(root, root / "work", from_file_names)


def captions(root: Path) -> dict[str, tuple[tuple[str, ...], str]]:
    return {file.path: (file.captions, file.origin) for file in found(root).files}


ROWS = [
    {"file_name": "b.mp4", "text": "bee"},
    {"file_name": "sub/a.MOV", "text": "ay"},
    {"file_name": "b.mp4", "text": "b2"},
]
LAYOUTS: dict[str, tuple[dict[str, str], dict[str, tuple[tuple[str, ...], str]]]] = {
    "captions folder": (
        {"videos/a.mp4": "", "videos/x/b.webm": "", "captions/a.txt": "ay", "captions/x/b.txt": "bee\n\nsecond\n"},
        {"videos/a.mp4": (("ay",), "captions/"), "videos/x/b.webm": (("bee", "second"), "captions/")},
    ),
    "file names": (
        {"A_red_cat_runs.mp4": "", "two dogs 02.gif": ""},
        {"A_red_cat_runs.mp4": (("A red cat runs",), "file names"), "two dogs 02.gif": (("two dogs",), "file names")},
    ),
    "captions.txt in natural order": (
        {"videos/clip10.mp4": "", "videos/clip2.mp4": "", "captions.txt": "two\nten\n"},
        {"videos/clip2.mp4": (("two",), "captions.txt"), "videos/clip10.mp4": (("ten",), "captions.txt")},
    ),
    "captions.txt with names": (
        {"videos/x.mp4": "", "videos/y.mp4": "", "captions.txt": "y.mp4\twhy\nx\tex\ny.mp4\twhy not\n"},
        {"videos/x.mp4": (("ex",), "captions.txt"), "videos/y.mp4": (("why", "why not"), "captions.txt")},
    ),
    "text beside": (
        {"a.mp4": "", "a.txt": "\ufeffay\r\nay2\r\n", "s/a.mkv": "", "s/a.txt": "other"},
        {"a.mp4": (("ay", "ay2"), ".txt files"), "s/a.mkv": (("other",), ".txt files")},
    ),
    "metadata.jsonl": (
        {"b.mp4": "", "sub/a.MOV": "", "metadata.jsonl": "\n".join(map(json.dumps, ROWS))},
        {"b.mp4": (("bee", "b2"), "metadata.jsonl"), "sub/a.MOV": (("ay",), "metadata.jsonl")},
    ),
    "metadata.csv": (
        {"b.mp4": "", "metadata.csv": 'file_name,text\nb.mp4,"bee, with comma"\n'},
        {"b.mp4": (("bee, with comma",), "metadata.csv")},
    ),
    "video_path and image_path": (
        {"v/b.mp4": "", "i/c.png": "", "all.jsonl": '{"video_path": "v/b.mp4", "caption": "bee"}\n'
         '{"image_path": "./i/c.png", "caption": ["see", "sea"]}\n'},
        {"v/b.mp4": (("bee",), "all.jsonl"), "i/c.png": (("see", "sea"), "all.jsonl")},
    ),
    "mixed, the nearest text wins": (
        {"a.mp4": "", "a.txt": "beside", "b.mp4": "", "c_cat_sits.jpg": "", "IMG_1.mp4": "",
         "metadata.jsonl": '{"file_name": "a.mp4", "text": "table"}\n{"file_name": "b.mp4", "text": "bee"}'},
        {"a.mp4": (("beside",), ".txt files"), "b.mp4": (("bee",), "metadata.jsonl"), "IMG_1.mp4": ((), ""),
         "c_cat_sits.jpg": (("c cat sits",), "file names")},
    ),
    "an empty text is no caption": ({"a.mp4": "", "a.txt": " \n"}, {"a.mp4": ((), "")}),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_gives_its_captions(tmp_path: Path, layout: str) -> None:
    files, expected = LAYOUTS[layout]
    assert captions(tree(tmp_path, files)) == expected


def test_absolute_paths_of_a_table_are_understood(tmp_path: Path) -> None:
    row = json.dumps({"video_path": str(tmp_path / "v" / "b.mp4"), "caption": "bee"})
    assert captions(tree(tmp_path, {"v/b.mp4": "", "t/list.jsonl": row}))["v/b.mp4"][0] == ("bee",)


def test_the_layout_is_said_with_counts(tmp_path: Path) -> None:
    layout = found(
        tree(tmp_path, {"a.mp4": "", "a.txt": "ay", "b.png": "", "IMG_2.mp4": "", "x.zip": "", "y.zip": ""})
    ).layout
    assert layout.startswith("2 videos, 1 image; captions: 1 from .txt files, 2 without")
    assert layout.endswith("files of no use here: 2 .zip")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"captions.txt": "one\ntwo\n"}, "2 captions for 1 files"),
        ({"metadata.jsonl": "{"}, "line 1: not JSON"),
        ({"metadata.jsonl": '{"file_name": "a.mp4", "text": 7}'}, "line 1: the caption is not text"),
        ({"s/a.mp4": "", "captions.txt": "a\tone\n"}, "'a' may be a.mp4 or s/a.mp4; write the path"),
    ],
)
def test_an_unclear_table_is_refused(tmp_path: Path, files: dict[str, str], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        found(tree(tmp_path, {"a.mp4": "", **files}))


def test_a_row_without_a_file_and_an_odd_text_are_told(tmp_path: Path) -> None:
    tree(tmp_path, {"a.mp4": "", "b.mp4": "", "metadata.jsonl": '{"file_name": "gone.mp4", "text": "x"}'})
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    dropped = {drop.source: drop.reason for drop in found(tmp_path).dropped}
    assert "metadata.jsonl, line 1" in dropped["gone.mp4"]
    assert "not UTF-8" in dropped["b.mp4"]


def test_links_to_folders_are_followed_once_and_hidden_files_are_not_data(tmp_path: Path) -> None:
    tree(tmp_path, {"s/a.mp4": "", "s/._a.mp4": "", ".git/b.mp4": ""})
    (tmp_path / "s" / "loop").symlink_to(tmp_path)
    assert [file.path for file in found(tmp_path).files] == ["s/a.mp4"]


def test_natural_order_counts() -> None:
    assert sorted(["b1", "a10", "a9", "A2", "a"], key=natural) == ["a", "A2", "a9", "a10", "b1"]


@pytest.mark.parametrize(
    ("stem", "caption"),
    [
        ("a_cat_running_03", "a cat running"),
        ("bikes", "bikes"),
        ("red-haired_woman's_hat", "red-haired woman's hat"),
        *((name, None) for name in ("IMG_0042", "clip7", "video", "x", "2024-01-01", "DJI_1", "final_cut2", "a1b2")),
    ],
)
def test_a_name_is_a_caption_when_it_is_words(stem: str, caption: str | None) -> None:
    assert caption_from_name(stem) == caption


def test_file_names_are_no_captions_where_they_are_not_wanted(tmp_path: Path) -> None:
    """caption.from_file_names=false."""
    (tmp_path / "A_red_cat_runs.mp4").touch()
    assert [file.captions for file in found(tmp_path).files] == [("A red cat runs",)]
    assert [file.captions for file in found(tmp_path, from_file_names=False).files] == [()]


def test_the_prefix_stands_before_every_caption() -> None:
    assert with_prefix(("a cat", "a dog"), "sks ") == ("sks a cat", "sks a dog")
    assert with_prefix(("a cat",), "") == ("a cat",)


@pytest.mark.parametrize(
    ("caption", "remark"),
    [
        ("too short", "2 words"),
        ("word " * 51, "51 words"),
        ("First a cat sits on a red chair and then it jumps away", "tells a sequence"),
        ("This video shows a cat that sits on a red chair in the sun", "talks about the video"),
    ],
)
def test_lint_follows_the_caption_rules(caption: str, remark: str) -> None:
    good = "a ginger cat sits on a red chair in the warm evening sun"
    remarks = lint({"a.mp4": (caption,), "b.mp4": (good,)})
    assert list(remarks) == [caption]
    assert any(remark in found for found in remarks[caption])


def test_lint_sees_one_caption_for_all() -> None:
    good = "a ginger cat sits on a red chair in the warm evening sun"
    assert "the same for all 2 files" in lint({"a.mp4": (good,), "b.mp4": (good,)})[good]


def test_directions_are_words_of_their_own() -> None:
    assert names_direction("a car drives to the left")
    assert names_direction("Steam RISES")
    assert not names_direction("a bright uplifted leftist mural")
