"""The commands around an encode: previews that other rooms start as a child, prompts, push and pull."""

import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import save_file

from encode.__main__ import main
from encode.pixels import decode_video
from encode.preview import contact_sheet, strip, write_mp4
from shared.keys import caption_key
from shared.shards import read_index
from shared.store import read_markers
from shared.store_read import StoreReader
from tests.e2e.commands import refused
from tests.e2e.commands import run as command
from tests.encode.make import moving_square
from tests.encode.test_encode import run


def encode(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def latents_file(path: Path, count: int, seed: int = 0) -> Path:
    generator = torch.manual_seed(seed)
    tensors = {str(number): torch.randn(16, 3, 4, 6, generator=generator) for number in range(count)}
    save_file(tensors, path, metadata={"labels": json.dumps([f"prompt {number}" for number in range(count)])})
    return path


def test_latents_become_videos_and_a_sheet_side_by_side(tmp_path: Path, model: Path) -> None:
    files = [latents_file(tmp_path / f"{name}.safetensors", 2, seed) for seed, name in enumerate(("before", "after"))]
    out = tmp_path / "out"
    encode("decode", "--model", model, "--preset", "demo", "--latents", files[0], "--latents", files[1], "--out", out,
           "--fps", 12)  # fmt: skip
    assert {path.name for path in out.iterdir()} == {
        "before_0.mp4", "before_1.mp4", "after_0.mp4", "after_1.mp4", "sheet.png"}  # fmt: skip
    with av.open(str(out / "after_1.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (48, 32, 12)
        assert sum(1 for _ in container.decode(stream)) == 9
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.width > 2 * 5 * 48


def test_what_ingest_alone_obeys_is_refused_by_encode(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"gates": {"black": 5.0}}))
    result = encode("--work", tmp_path, "--preset", "demo", "--set", "gates.black=3")
    assert result.exit_code == 2 and "gates.black=3.0 (from SET): ingest alone obeys it" in result.output
    later = encode("--work", tmp_path, "--preset", "demo", "--set", "gates.black=5")
    assert later.exit_code == 2 and "ingest alone" not in later.output  # there are no shards


def test_a_decoded_video_is_the_pixels_that_were_written(tmp_path: Path) -> None:
    frames_THWC = moving_square(3, 5, 64, 64)
    write_mp4(tmp_path / "a.mp4", frames_THWC, 23.976)
    back_THWC = decode_video((tmp_path / "a.mp4").read_bytes())
    assert np.abs(back_THWC.astype(int) - frames_THWC).mean() < 3


def test_a_sheet_shows_every_clip_of_every_column() -> None:
    red, blue = (np.full((2, 8, 8, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))
    sheet = np.asarray(contact_sheet({"left": [red, blue], "right": [blue, red]}, ["one", "two"]))
    half = sheet.shape[1] // 2
    for side in (sheet[:, :half], sheet[:, half:]):
        for colour in ((255, 0, 0), (0, 0, 255)):
            assert (side == colour).all(-1).sum() == 2 * 8 * 8
    assert strip(np.zeros((9, 8, 8, 3), np.uint8)).width == 5 * 8


def test_what_is_no_file_of_latents_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"no")
    line = refused("encode", "decode", "--preset", "demo", "--latents", tmp_path / "x.safetensors", "--out", tmp_path)
    assert "x.safetensors is not a file of latents" in line


def test_prompts_are_embedded_once_beside_what_is_there(work: Path, model: Path) -> None:
    store = run(work, model)
    before = {marker.id for marker in read_markers(store)}
    known = read_index(work).samples[0].captions[0]
    (work / "more.json").write_text(json.dumps(["a third prompt", known]))
    arguments = ("prompts", "--work", work, "--model", model, "--preset", "demo", "--prompt", "a new prompt", "--file",
                 work / "more.json")  # fmt: skip
    assert "2 texts embedded, 1 were there" in encode(*arguments).output
    assert "0 texts embedded, 3 were there" in encode(*arguments).output
    added = [marker for marker in read_markers(store) if marker.id not in before]
    assert sorted(row.text for marker in added for row in marker.captions.values()) == [
        "a new prompt",
        "a third prompt",
    ]
    assert caption_key("a new prompt") in StoreReader([store]).texts


def test_push_and_pull_as_commands(work: Path, model: Path, tmp_path: Path) -> None:
    store = run(work, model)
    said = command("encode", "push", "--work", work, "--to", tmp_path / "there")
    sha256 = said.split("SHA256=")[1].split()[0]
    target = tmp_path / "else.zarr"
    command("encode", "pull", "--store", target, "--from", tmp_path / "there", "--sha256", sha256)
    assert set(StoreReader([target]).latents) == set(StoreReader([store]).latents)
    assert "SHA256" in refused("encode", "pull", "--store", target, "--from", tmp_path / "there", "--sha256", "0" * 64)


@pytest.mark.parametrize("name", ["status", "verify"])
def test_a_store_that_is_not_there_is_said(tmp_path: Path, name: str) -> None:
    assert "make encode" in refused("encode", name, "--work", tmp_path, "--preset", "demo")


def test_every_command_explains_itself() -> None:
    for name in main.commands:
        help_text = encode(name, "--help").output
        assert "Usage" in help_text
        assert main.commands[name].help


def test_a_url_is_nowhere_to_encode_to(work: Path) -> None:
    line = refused("encode", "--work", work, "--store", "https://host/latents.zarr", "--preset", "demo")
    assert "https://host/latents.zarr" in line
    assert "make push" in line
