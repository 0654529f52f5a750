"""python -m train: latent store -> adapter. Sub-commands explain a config, sample from a run, export it again."""

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import click

from shared.cli import Group, config_options, work_option
from shared.config import OutputFormat
from shared.errors import RunError, StoreError
from shared.resolve import Choice, resolve

# fewer lines between the user and the loss; set before torch and transformers load
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # `deterministic` needs it before CUDA starts
warnings.filterwarnings("ignore", category=FutureWarning)

Command = Callable[..., Any]
YES_NO = click.Choice(["yes", "no"])

HELP = """Train on a latent store; nothing but the DiT and its gradients is in memory.

\b
  python -m train --work work --preset 16gb          train, or go on with the newest unfinished run
  python -m train --set "max_steps=500 lora_rank=16" settings laid over the preset
  python -m train --model t2v-a14b                   both experts, one after the other, two files
  python -m train --run runs/cats --resume no        a new run in a folder of your choice
  torchrun --standalone --nproc_per_node 2 -m -- train --work work     two GPUs: twice the batch

Ctrl-C stops after the current step with a checkpoint; the same command goes on from there.
"""


def store_option(command: Command) -> Command:
    """--store: where latents and text are."""
    return click.option("--store", default=None, help="Stores, comma-separated. [default: WORK/latents.zarr]")(command)


def run_option(command: Command) -> Command:
    """--run: the run folder."""
    return click.option("--run", type=click.Path(path_type=Path), help="Run folder, such as runs/cats-16gb.")(command)


def named_run(run: Path | None) -> Path:
    """The run a command was told; raises RunError naming the newest one when it was told none."""
    from train.run import RUNS, is_run

    if run is None:
        runs = sorted(filter(is_run, RUNS.glob("*")), key=lambda path: path.stat().st_mtime)
        hint = f"the newest is RUN={runs[-1]}" if runs else "there is none yet; train one with: make train"
        raise RunError(f"RUN is missing: which run? {hint}")
    return run


@click.group(cls=Group, invoke_without_command=True, help=HELP)
@work_option
@store_option
@run_option
@click.option("--resume", type=click.Choice(["yes", "no", ""]), default="", help="no: start anew. [default: go on]")
@config_options
@click.pass_context
def main(context: click.Context, work: Path, store: str | None, run: Path | None, resume: str, choice: Choice) -> None:
    """Train."""
    if context.invoked_subcommand is None:
        train(work, store or None, run, choice, {"yes": "yes", "no": "no"}.get(resume))  # type: ignore[arg-type]


def train(
    work: Path, store: str | None, folder: Path | None, choice: Choice, resume: Literal["yes", "no"] | None
) -> None:
    """Choose the run, open its data, train what is left."""
    from train.contradictions import refuse_contradictions
    from train.run import check_changes, choose_run, is_finished, is_run, require_stores
    from train.stores import open_dataset

    run = choose_run(choice, work, store, folder, resume)  # what is wrong here is said before torch loads
    require_stores(run.stores, work)
    refuse_contradictions(run.config, run.spec)
    if is_run(run.folder):
        check_changes(run)
    data = open_dataset(list(run.stores), run.work, run.config, run.spec)
    from train.group import join, leave
    from train.session import start

    group = join()
    try:
        folder = group.agree(lambda: choose_run(choice, work, store, folder, resume).folder)
        run = choose_run(choice, work, store, folder, None)
        finished = is_run(run.folder) and is_finished(run.folder)
        start(run, finished, group, data=data)
    finally:
        leave(group)


@main.command()
@work_option
@store_option
@config_options
def explain(work: Path, store: str | None, choice: Choice) -> None:
    """Print every setting with its source, and what follows: sizes, batches, steps, experts."""
    from train.explain import derived, missing_store, plan_lines, settings
    from train.run import store_paths
    from train.session import open_data

    resolved = resolve(choice, work / "config.json")
    stores = store_paths(store or None, work)
    lines = [*settings(resolved), "", *derived(resolved)]
    if all(path.is_dir() for path in stores):
        try:
            lines += plan_lines(resolved, *open_data(resolved, stores, work))
        except StoreError as error:  # settings can be explained without data that fits them
            lines.append(str(error))
    else:
        lines.append(missing_store(stores))
    click.echo("\n".join(lines))


@main.command()
@work_option
@store_option
@click.option(
    "--card", type=click.FloatRange(1), default=None, help="GiB of the card. [default: the one here, or the preset's]"
)
@click.option("--gpus", type=click.IntRange(1), default=None, help="Processes on this machine, one per GPU.")
@config_options
def plan(work: Path, store: str | None, card: float | None, gpus: int | None, choice: Choice) -> None:
    """Print what a config needs, what AUTO chooses, and whether it fits. Downloads nothing."""
    if gpus is not None:  # as torchrun will say it
        os.environ |= {"WORLD_SIZE": str(gpus), "LOCAL_WORLD_SIZE": str(gpus)}
    from train.group import Group as Processes
    from train.plan import report
    from train.run import store_paths
    from train.session import open_data
    from train.updates import processes

    resolved = resolve(choice, work / "config.json")
    stores = store_paths(store or None, work)
    steps, samples = resolved.config.max_steps, None
    if all(path.is_dir() for path in stores):
        try:
            data, batches = open_data(resolved, stores, work, Processes(world=processes()))
            steps, samples = batches.total_steps(), len(data.train)
        except StoreError:  # a plan needs no data; only the number of steps stays open
            click.echo(f"steps: unknown, {stores[0]} does not fit this model or preset")
    click.echo("\n".join(report(resolved, card, steps, samples)))


@main.command()
@work_option
@click.option("--ffmpeg", default=None, help="Program to test in place of the bundled one.")
@config_options
def doctor(work: Path, ffmpeg: str | None, choice: Choice) -> None:
    """Examine GPU, memory, disk, ffmpeg, versions and the model's files; each line is ok, or says how to mend it."""
    from train.doctor import examine

    resolved = resolve(choice, work / "config.json")
    findings = examine(resolved.config, resolved.spec, work, ffmpeg or None)
    click.echo("\n".join(map(str, findings)))
    if any(finding.state == "error" for finding in findings):
        sys.exit(2)  # click would return its own Exit as a value


@main.command()
@run_option
@click.option("--prompt", "prompts", multiple=True, help="What to show; repeatable. [default: sample_prompts]")
@click.option("--image", "images", type=click.Path(path_type=Path), multiple=True,
              help="Picture the video starts from (i2v-a14b, ti2v-5b); repeatable, one per prompt.")  # fmt: skip
@click.option("--negative", default=None, help="What to avoid. [default: sample_negative_prompt]")
@click.option("--seed", type=int, default=None, help="[default: sample_seed]")
@click.option("--steps", type=click.IntRange(1, 1000), default=None, help="[default: sample_steps, or the model's own]")
@click.option("--guidance", type=click.FloatRange(1), default=None, help="[default: sample_guidance_scale]")
@click.option("--size", default=None, help="WIDTHxHEIGHTxFRAMES. [default: that of the run's clips]")
@click.option("--base", is_flag=True, help="Without the adapter, to compare.")
@click.option("--ema", is_flag=True, help="With the averaged weights.")
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Folder. [default: RUN/samples/]")
def sample(run: Path | None, out: Path | None, base: bool, ema: bool, **wish: Any) -> None:
    """Make videos with a run's adapter: MP4 files and a contact sheet."""
    folder = named_run(run)
    from train.session import sample_run

    folder = sample_run(folder, wish, "base" if base else "average" if ema else "weights", out)
    click.echo(f"wrote {folder}")


@main.command()
@run_option
@click.option("--prompt", required=True, help="What to show; a learned concept by its placeholder.")
@click.option("--negative", default=None, help="What to avoid. [default: sample_negative_prompt]")
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Folder. [default: RUN/prompts/]")
def embed(run: Path | None, prompt: str, negative: str | None, out: Path | None) -> None:
    """Write a prompt's embedding, with what a run has learned of text, for diffusers' prompt_embeds."""
    folder = named_run(run)
    from train.embed import embed_run

    for path in embed_run(folder, prompt, negative, out):
        click.echo(f"wrote {path}")


@main.command()
@run_option
@click.option("--format", "form", default="", help="COMFY_LORA, DIFFUSERS_LORA, KOHYA_LORA, DIFFUSERS, SAFETENSORS.")
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Folder. [default: the run folder]")
def export(run: Path | None, form: str, out: Path | None) -> None:
    """Write a run's newest weights in another format."""
    folder = named_run(run)
    if form not in (known := get_args(OutputFormat)):
        what = f"FORMAT={form}: no such format" if form else "FORMAT is missing: which format to write"
        raise RunError(f"{what}; there are {', '.join(known)}")
    from train.session import export_run

    for path in export_run(folder, form, out):  # type: ignore[arg-type]
        click.echo(f"wrote {path}")


@main.command()
@run_option
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Folder. [default: the run folder]")
def workflow(run: Path | None, out: Path | None) -> None:
    """Write a ComfyUI workflow that loads a run's result, and say where each file belongs."""
    folder = named_run(run)
    from train.run import open_run
    from train.workflow import write_workflow

    path, lines = write_workflow(open_run(folder), out)
    click.echo("\n".join([*lines, f"wrote {path}; open it in ComfyUI"]))


@main.command()
@run_option
@click.option("--repo", default="", help="user/name on the Hub.")
@click.option("--private", type=YES_NO, default="no", help="yes: only you see the repository.")
@click.option("--dry-run", type=YES_NO, default="no", help="yes: write the folder, upload nothing.")
def publish(run: Path | None, repo: str, private: str, dry_run: str) -> None:
    """Upload a run's result with a model card: settings, trigger words, samples, validation curve."""
    folder = named_run(run)
    if "/" not in repo:
        raise RunError(f"REPO={repo}: name the repository, as REPO=user/name")
    from train.publish import publish as publish_run
    from train.run import open_run

    dry = dry_run == "yes"
    place = publish_run(open_run(folder), repo, dry, private == "yes")
    click.echo(f"wrote {place}; look at it, then leave DRY_RUN out" if dry else f"published {place}")


if __name__ == "__main__":
    main(prog_name="python -m train")
