"""`make demo`: draw videos, ingest, encode, train a LoRA, compare samples before and after, check them.

Every stage is the command a user runs, in a process of its own; each goes on where it was stopped, so the demo can be
killed at any moment and run again.
"""

import shlex
import subprocess
import sys
import time
from pathlib import Path

import click

from tests.demo.check import Verdict, judge
from tests.demo.dataset import write_dataset

ROOT = Path(__file__).parent.parent.parent
CONCEPT_PROMPTS = (
    "a zorb moving left on a gray background",
    "a zorb moving right on a black background",
    "a zorb moving up on a black background",
    "a zorb moving down on a gray background",
)
ORDINARY_PROMPTS = (
    "a red circle moving right on a black background",
    "a blue square moving up on a gray background",
    "a yellow triangle moving left on a black background",
    "a green circle moving down on a gray background",
)
NEXT = """
Now your own videos: put them in a folder, with a .txt beside each that says what it shows, then
  make ingest DATA=that_folder/ && make encode && make train PRESET=16gb
(PRESET=8gb, 24gb, cpu ... fit other machines; make help lists everything.)"""


def stage(title: str, *arguments: object) -> None:
    """Run one command of the project; its output is the user's to see. Ends the demo with its exit code if it fails."""
    command = [sys.executable, "-m", *(str(argument) for argument in arguments)]
    shown = " ".join(shlex.quote(word) for word in command[1:])
    click.secho(f"\n== {title}\n   python {shown}", bold=True)
    start = time.monotonic()
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if code:
        click.echo(f"the demo stopped here; run it again to go on (exit code {code})", err=True)
        sys.exit(code)
    click.echo(f"   {time.monotonic() - start:.0f} s")


def report(verdict: Verdict, work: Path, run: Path) -> None:
    """Say what the samples show, where everything is and what to do next."""
    click.secho("\n== What the samples show", bold=True)
    for line in verdict.lines:
        click.echo(f"   {line}")
    click.echo(f"""
   contact sheet, before | after   {work / "samples" / "sheet.png"}
   videos                          {work / "samples"}/*.mp4
   the LoRA, for ComfyUI           {", ".join(str(path) for path in sorted(run.glob("*.safetensors")))}
   what ingest kept, and why       {work / "report.html"}
   TensorBoard                     .venv/bin/tensorboard --logdir {run / "tb"}{NEXT}""")


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("work/demo"), show_default=True)
@click.option("--run", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True)
@click.option("--set", "settings", default="", help="Settings laid over the preset demo, for experiments.")
@click.option("--check/--no-check", default=True, help="Fail unless the samples show the concept and nothing is lost.")
def main(work: Path, run: Path, settings: str, check: bool) -> None:
    """Train a first LoRA on a tiny Wan: a shape it has never seen, from drawn videos to samples before and after."""
    config = ["--work", work, "--preset", "demo", *(["--set", settings] if settings else [])]
    click.secho(f"== Drawing a dataset: {work / 'dataset'}", bold=True)
    write_dataset(work / "dataset")
    stage("Ingest: videos to shards", "ingest", "--data", work / "dataset", *config)
    stage("Encode: shards to latents and text", "encode", *config)
    if not (run / "done").exists():
        stage("Train: a LoRA of the concept", "train", *config, "--run", run)
    before, after = (run / "samples" / f"{name}.safetensors" for name in ("before", "after"))
    stage("Samples before and after", "encode", "decode", "--model", "tiny", "--latents", before, "--latents", after,
          "--out", work / "samples")  # fmt: skip
    verdict = judge(work / "samples", CONCEPT_PROMPTS, ORDINARY_PROMPTS)
    report(verdict, work, run)
    if check and not verdict.passed:
        click.echo("error: the samples are not what the demo promises; see the lines above", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
