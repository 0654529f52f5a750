"""What the commands do: start or resume a run, sample from one, export one."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import click
import torch
from torch import Tensor

from shared.bucket import parse_bucket
from shared.config import Config, OutputFormat
from shared.errors import RunError
from shared.files import write_json
from shared.progress import progress
from shared.resolve import Resolved
from train import checkpoint, export
from train.adapter import copy_into
from train.attention import choose
from train.contradictions import refuse_method_mismatch
from train.data import Plan
from train.explain import derived, plan_lines
from train.fit import measured_peaks, out_of_memory, refuse_if_too_large
from train.group import ALONE, Group, refuse_undivided
from train.learner import Loader
from train.log import NoLog, RunLog
from train.loop import train
from train.memory import plan_for_device
from train.method import make_trained
from train.model import TextBank, load_model, pick_device, refuse_mismatch
from train.phases import make_phases
from train.run import Run, is_run, open_run, start_folder
from train.sample import (
    Pictures,
    Scene,
    encode_pictures,
    ensure_texts,
    sample_range,
    scene_of,
    start_decode,
    start_of,
    steps_of,
    write_latents,
)
from train.stores import Dataset, open_dataset
from train.task import Task, restore

Weights = Literal["weights", "average", "base"]


def open_data(
    resolved: Resolved, stores: tuple[Path, ...], work: Path, group: Group = ALONE, data: Dataset | None = None
) -> tuple[Dataset, Plan]:
    """Check settings against model and stores, unless they are open; the samples and their order."""
    refuse_mismatch(resolved.config, resolved.spec)
    data = data or open_dataset(list(stores), work, resolved.config, resolved.spec)
    return data, Plan(data.train, resolved.config, resolved.config.batch_size * group.world)


def start(
    run: Run, finished: bool, group: Group = ALONE, loader: Loader = load_model, data: Dataset | None = None
) -> None:
    """Train a run to its end, from its newest checkpoint; `loader` loads an expert, `data` is what is open already."""
    refuse_undivided(run.config, group)
    data, plan = open_data(run.resolved, run.stores, run.work, group, data)
    saved = checkpoint.latest(run.folder)
    if finished and saved is not None and checkpoint.read_state(saved).step >= plan.total_steps():
        print(f"{run.folder} is finished; train on with a larger max_steps, or start anew with RESUME=no")
        return
    attention = choose(run.config, pick_device())
    memory = plan_for_device(run.config, run.spec, pick_device())
    refuse_if_too_large(memory, run.config, run.spec)
    torch.use_deterministic_algorithms(run.config.deterministic)
    how = "goes on" if is_run(run.folder) else "new"
    remarks = group.agree(lambda: start_folder(run, data.fingerprint))
    state, more = restore(run, data, group)
    done = state.step if state is not None else 0
    with RunLog(run.folder, done, plan.total_steps()) if group.first else NoLog() as log:
        several = [f"processes: {group.world}"] if group.world > 1 else []
        facts = [*derived(run.resolved), attention.said, *several, *plan_lines(run.resolved, data, plan)]
        for line in [f"run: {run.folder} ({how})", *facts, *remarks, *more]:
            log.say(line)
        log.text("config", run.config.model_dump_json(indent=1))
        try:
            train(Task(run, data, plan, log, state, group, loader))
        except torch.OutOfMemoryError:
            raise out_of_memory(memory, run.config, run.spec, checkpoint.latest(run.folder)) from None
        finally:
            if group.first:
                write_json(run.folder / "memory.json", measured_peaks(memory, pick_device()))
    if group.first:
        print(f"done: {run.folder}")


def latest_of(run: Run) -> Path:
    """The run's newest checkpoint, or an error."""
    saved = checkpoint.latest(run.folder)
    if saved is None:
        raise RunError(f"{run.folder} has no checkpoint yet; let it train on, or see the base model with --base")
    return saved


def sample_run(folder: Path, wish: dict[str, Any], weights: Weights, out: Path | None) -> Path:
    """Sample prompts and decode; returns the folder of the videos."""
    run = open_run(folder)
    pictures = encode_pictures(wish["images"], wish["size"], run) if wish["images"] else None
    scene = wished_scene(run, wish, pictures)
    latents = sample_latents(run, scene, weights, pictures)
    target, number = out or run.folder / "samples", 1
    while (path := target / f"{weights if weights == 'base' else 'sample'}-{number}.safetensors").exists():
        number += 1
    write_latents(path, latents, scene.prompts, run.spec, run.config)
    click.echo(f"decoding {path} ...", err=True)
    if start_decode(path, run).wait() != 0:
        raise RunError(f"{path} could not be decoded, see {path.with_suffix('.log')}; the latents are kept")
    return path.with_suffix("")


def sample_latents(run: Run, scene: Scene, weights: Weights, pictures: Pictures | None = None) -> Tensor:
    """Latents of every prompt, from every expert in turn; prompts take turns with the pictures they start from."""
    reader = ensure_texts(scene.texts, run)
    start = start_of(scene, run, pictures)
    for expert in run.spec.experts:
        model = load_model(run.spec, expert, run.config, pick_device())
        bank = trained_bank(run, expert, weights, TextBank(model, reader), scene.texts)
        total = len(scene.prompts) * len(steps_of(scene, run.spec, expert))
        with progress("sample" if expert == "single" else f"sample {expert}", total) as advance:
            state, _ = sample_range(bank, run.spec, scene, expert, start, advance)
        start = start._replace(latent_BCthw=state)
    return start.latent_BCthw


def trained_bank(run: Run, expert: str, weights: Weights, plain: TextBank, texts: list[str]) -> TextBank:
    """Put a run's trained tensors into a loaded expert; one that was not trained stays as it is."""
    if weights == "base":
        return plain
    saved, stem = latest_of(run), f"{weights}_{expert}"
    if weights == "average" and run.config.ema is None:
        raise RunError(f"{run.folder} has no averaged weights; it was trained without ema")
    if not (saved / f"{stem}.safetensors").is_file():
        return plain
    bank, trained = make_trained(plain.model, run, 0, plain.reader, texts)
    copy_into(trained, checkpoint.read_tensors(saved, stem), str(saved))
    return bank


def wished_scene(run: Run, wish: dict[str, Any], pictures: Pictures | None) -> Scene:
    """The config's scene with what the command line says instead; the size may be the pictures'."""
    size = parse_bucket(wish["size"], run.spec.grid) if wish["size"] else None
    scene = scene_of(run.config, run.spec, pictures.bucket if pictures is not None else size)
    prompts = tuple(wish["prompts"]) or scene.prompts
    if not prompts:
        raise RunError('nothing to sample: give PROMPT="...", or set sample_prompts for the next run')
    guidance = scene.guidance if wish["guidance"] is None else (wish["guidance"], wish["guidance"])
    return replace(
        scene,
        prompts=prompts,
        guidance=guidance,
        negative=scene.negative if wish["negative"] is None else wish["negative"],
        seed=scene.seed if wish["seed"] is None else wish["seed"],
        steps=wish["steps"] or scene.steps,
    )


def with_format(config: Config, form: OutputFormat) -> Config:
    """The config as if this format had been asked for at the start."""
    return config.model_copy(update={"output_model_format": form})


def export_run(folder: Path, form: OutputFormat, out: Path | None) -> list[Path]:
    """Write the newest weights of every expert in a format; returns the files."""
    run = open_run(folder)
    refuse_method_mismatch(with_format(run.config, form))
    saved = latest_of(run)
    state = checkpoint.read_state(saved)
    phases = {phase.expert: phase for phase in make_phases(run.config, run.spec, max(state.step, 2))}
    paths = []
    for expert in run.spec.experts:
        for weights in ("weights", "average"):
            if (saved / f"{weights}_{expert}.safetensors").is_file():
                tensors = checkpoint.read_tensors(saved, f"{weights}_{expert}")
                metadata = export.describe(run.config, run.spec, expert, phases[expert].steps, state.data)
                stem = f"{run.name}-{form.lower()}{'_ema' if weights == 'average' else ''}"
                paths += export.write_result(out or run.folder, stem, (run, expert, form), tensors, metadata)
    return paths
