"""Laws of the doctor: it never fails itself, every line has a state, and what is wrong names the next step."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shared.models import SPECS
from shared.resolve import Choice, resolve
from train.__main__ import main
from train.doctor import disk, download_size, examine, model, video_tool
from train.memory import GIB, Room


def test_every_line_is_ok_warning_or_error_and_each_subject_is_there(tmp_path: Path) -> None:
    findings = examine(resolve(Choice("8gb")).config, SPECS["ti2v-5b"], tmp_path / "not" / "yet", None)
    assert {finding.state for finding in findings} <= {"ok", "warning", "error"}
    text = "\n".join(map(str, findings))
    for subject in (f"torch {torch.__version__}", "RAM", "pinned", "disk", "ffmpeg version", "model ti2v-5b"):
        assert subject in text
    assert ("no GPU" in text) != torch.cuda.is_available()


def test_advice_fits_the_model_and_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("train.memory.room_of", lambda device: Room(None, 16 * GIB, gpu=False))

    def lines(preset: str) -> list[str]:
        resolved = resolve(Choice(preset))
        return [str(finding) for finding in examine(resolved.config, resolved.spec, tmp_path, None)]

    cpu, demo = lines("cpu"), lines("demo")
    assert any(line.startswith("warning  no GPU: training ti2v-5b") and "MODEL=tiny" in line for line in cpu)
    assert any(line.startswith("error    ti2v-5b") and 'fits with SET="transformer' in line for line in cpu)
    assert not any("PRESET=" in line for line in cpu + demo) and not any(line.startswith("error") for line in demo)
    assert any(line.startswith("ok       no GPU") for line in demo)


@pytest.mark.parametrize("program", ["/no/such/ffmpeg", "/bin/true", "/bin/false"])
def test_a_wrong_ffmpeg_is_an_error_with_the_way_out(program: str) -> None:
    finding = video_tool(program)
    assert finding.state == "error"
    assert "leave FFMPEG out" in finding.text


def test_an_error_is_exit_code_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--work", str(tmp_path), "--preset", "demo"])
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--work", str(tmp_path), "--preset", "demo", "--ffmpeg", "/no/such/ffmpeg"])
    assert stop.value.code == 2
    assert "error    ffmpeg /no/such/ffmpeg cannot be run" in capsys.readouterr().out


def test_a_model_that_the_disk_cannot_hold_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(SPECS["t2v-a14b"], repo="nobody/has-this")
    assert 126e9 < download_size(spec) < 130e9
    for free, state in ((100 * 10**9, "error"), (200 * 10**9, "warning")):
        monkeypatch.setattr("train.doctor.free_on", lambda folder, free=free: free)
        assert model(spec).state == state


def test_a_model_folder_without_weights_is_an_error(tmp_path: Path) -> None:
    spec = replace(SPECS["t2v-a14b"], repo=str(tmp_path))
    assert model(spec).state == "error"
    for part in ("transformer", "transformer_2"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "model.safetensors").touch()
    assert model(spec).state == "ok"


def test_the_disk_asked_is_that_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    assert str(tmp_path) in disk(tmp_path / "a" / "b").text
