"""`python -m encode`: from shards to a store of latents and text that any machine can train from.

Without a sub-command it makes what is missing or stale and says why; it can be stopped and started at any time.
"""

import gc
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from encode.lock import writing
from encode.plan import Part, Plan, Recipe, dataset_list, keyed, make_plan, wanted_captions
from encode.recipe import recipes, text_recipe
from encode.status import Wanted, describe, to_encode
from shared.bucket import Bucket, parse_bucket
from shared.cli import Group, config_options, work_option
from shared.errors import DatasetError, StoreError
from shared.files import atomic_write, read_json
from shared.models import ModelSpec
from shared.progress import progress
from shared.resolve import Choice, Resolved, refuse_late, resolve
from shared.shards import Index, index_path, read_index
from shared.store import Kind, create_store, open_store, read_datasets, read_markers, write_dataset
from shared.store_read import StoreReader
from shared.store_remote import is_url
from shared.words import counted

Command = Callable[..., Any]
SCALE = "a real Wan VAE gives 30 dB and more, below 20 something is wrong; the tiny one knows drawn shapes alone"
EMPTY = Index(dataset="", ingest_version=0)  # no samples: only texts are made


def folder_only(context: click.Context, parameter: click.Parameter, value: str | None) -> Path | None:
    """A store that is written or checked is a folder here; an empty make variable is none."""
    del context, parameter
    if value and is_url(value):
        raise StoreError(
            f"STORE={value}: encode works on a folder; fetch it with make pull FROM=..., share with make push"
        )
    return Path(value) if value else None


def store_option(command: Command) -> Command:
    """--store: where the latents are."""
    return click.option("--store", callback=folder_only, help="Latent store; default: WORK/latents.zarr.")(command)


@click.group(cls=Group, invoke_without_command=True)
@work_option
@store_option
@click.option("--shard", default="", help="Share of the work: 2/4 is the second of four machines.")
@config_options
@click.pass_context
def main(context: click.Context, work: Path, store: Path | None, shard: str, choice: Choice) -> None:
    """Encode clips with the VAE and captions with UMT5 into WORK/latents.zarr; only what is missing or stale."""
    if context.invoked_subcommand is None:
        resolved = resolve(choice, work / "config.json")
        refuse_late(resolved, work / "config.json")
        encode(work, store or work / "latents.zarr", Part.parse(shard), resolved)


def encode(work: Path, store: Path, part: Part, resolved: Resolved) -> None:
    """Make what the store lacks of this part, then say what is trained."""
    index = read_index(work)
    check_geometry(index, resolved.spec)
    with writing(store, part):
        wanted = recipes(resolved.config, resolved.spec)
        create_store(store)
        captions = wanted_captions(index, resolved.config)
        plan = make_plan(index, captions, wanted, read_markers(store), part)
        say(plan, index)
        if plan.rows:
            from encode.worker import Job, run  # torch and diffusers: seconds that an up-to-date store does not need

            run(Job(work, store, resolved.config, resolved.spec, wanted), plan)
        write_dataset(store, dataset_list(index, wanted))
    click.echo(f"{store}: complete" + (f" (part {part})" if part.count > 1 else "; next: make train"))


def say(plan: Plan, index: Index) -> None:
    """What will be made, and why."""
    if not index.samples:
        raise DatasetError(
            "the index has no samples: ingest kept none of the clips; see report.html in the work folder"
        )
    click.echo(to_encode(plan) if plan.rows else "nothing to encode: every row is there and fresh")


def check_geometry(index: Index, spec: ModelSpec) -> None:
    """Raise DatasetError when the model cannot take the sizes that were ingested."""
    for bucket in sorted({sample.bucket for sample in index.samples}):
        if not fits(bucket, spec):
            raise DatasetError(f"the shards hold {bucket} samples; {spec.name} needs sides that are multiples of "
                               f"{spec.grid} and 4n+1 frames; run: make ingest MODEL={spec.name}")  # fmt: skip


def fits(bucket: Bucket, spec: ModelSpec) -> bool:
    """Whether a model can train on samples of this size."""
    return (
        bucket.height % spec.grid == bucket.width % spec.grid == 0 and bucket.num_frames % spec.vae.stride_THW[0] == 1
    )


@main.command()
@work_option
@store_option
@config_options
def status(work: Path, store: Path | None, choice: Choice) -> None:
    """What the store holds, and what is missing or stale."""
    gc.disable()  # a third of the time of reading 10,000 records, which hold no cycles
    store, resolved = store or work / "latents.zarr", resolve(choice, work / "config.json")
    markers = read_markers(open_store(store)) if store.is_dir() or not index_path(work).is_file() else []
    wanted = None
    if index_path(work).is_file():
        index = read_index(work)
        recipe = recipes(resolved.config, resolved.spec, download=False)
        plan = make_plan(index, wanted_captions(index, resolved.config), recipe, markers, Part())
        wanted = Wanted(plan, dataset_list(index, recipe))
    click.echo("\n".join(describe(store, markers, read_datasets(store), wanted)))


@main.command()
@work_option
@store_option
@config_options
@click.option("--prompt", "texts", multiple=True, help="A text to embed; may be given several times.")
@click.option("--file", type=click.Path(path_type=Path, exists=True), help="JSON list of texts to embed.")
def prompts(work: Path, store: Path | None, choice: Choice, texts: tuple[str, ...], file: Path | None) -> None:
    """Embed texts into the store, where they are missing: sample prompts that were not known when it was made."""
    store, resolved = store or work / "latents.zarr", resolve(choice, work / "config.json")
    wanted = keyed((*texts, *(read_json(file) if file else ())), resolved.config)
    create_store(store)
    with writing(store, Part(), name="prompts"):
        recipe: dict[Kind, Recipe] = {"text": text_recipe(resolved.config, resolved.spec)}
        plan = make_plan(EMPTY, wanted, recipe, read_markers(store), Part())
        if plan.rows:
            from encode.worker import Job, run

            run(Job(work, store, resolved.config, resolved.spec, recipe), plan)
    click.echo(f"{store}: {counted(plan.rows, 'text')} embedded, {len(wanted) - plan.rows} were there")


@main.command()
@work_option
@store_option
@config_options
@click.option("--samples", "count", default=4, show_default=True, help="Clips to decode and compare; 0: none.")
def verify(work: Path, store: Path | None, choice: Choice, count: int) -> None:
    """Check every checksum; decode a few clips, measure them against the shards and show them side by side."""
    from encode.verify import check_files, check_finite, compare, decoder_of, write_report

    store = store or work / "latents.zarr"
    markers = read_markers(open_store(store))
    with progress("checksums", len(markers)) as advance:
        check_files(store, markers, advance)
    index = read_index(work) if index_path(work).is_file() else EMPTY
    reader = StoreReader([store])
    check_finite(reader, {sample.key: f"{sample.source} at {sample.start:g} s" for sample in index.samples})
    found = {"unit": markers, "latent": reader.latents, "text": reader.texts}
    click.echo(f"{store}: {', '.join(counted(len(each), noun) for noun, each in found.items())}: all intact")
    if count and index.samples:
        resolved = resolve(choice, work / "config.json")
        from encode.worker import device
        from shared.weights import load_vae, torch_dtype

        vae = load_vae(resolved.spec, torch_dtype(resolved.config.vae.weight_dtype)).to(device())
        compared = list(compare(work, index, reader, decoder_of(vae), count))
        click.echo(f"decoded and compared with the clips ({SCALE}):")
        for pair in compared:
            click.echo(f"  {pair.psnr:5.1f} dB  {pair.sample.source} at {pair.sample.start:g} s ({pair.sample.bucket})")
        write_report(work / "verify.png", compared)
        click.echo(f"  side by side: {work / 'verify.png'}")
    elif count:
        click.echo(f"there are no clips at {work} to compare it with")


@main.command()
@work_option
@store_option
@click.option("--to", "place", required=True, help="Folder, s3://, gs:// or hf://datasets/user/name.")
def push(work: Path, store: Path | None, place: str) -> None:
    """Copy what the place lacks; prints the sha256 that a careful pull requires."""
    from shared.store_share import push as copy

    with ExitStack() as stack:
        sha256, count = copy(store or work / "latents.zarr", place, transfer_bar(stack, "push"))
    click.echo(f"{place}: {counted(count, 'file')} copied; fetch with: make pull FROM={place} SHA256={sha256}")


@main.command()
@work_option
@store_option
@click.option("--from", "place", required=True, help="Folder, http(s)://, s3://, gs:// or hf://datasets/user/name.")
@click.option("--sha256", default="", help="sha256 that the manifest must have, as push printed it.")
def pull(work: Path, store: Path | None, place: str, sha256: str) -> None:
    """Fetch what the store lacks, verified; goes on where it was interrupted."""
    from shared.store_share import pull as copy

    target = store or work / "latents.zarr"
    with ExitStack() as stack:
        count = copy(place, target, sha256 or None, transfer_bar(stack, "pull"))
    click.echo(f"{target}: {counted(count, 'file')} fetched and verified; train from it with: make train "
               f"STORE={target}, and the PRESET, MODEL and sizes it was encoded with")  # fmt: skip


def transfer_bar(stack: ExitStack, name: str) -> Callable[[int, int], Callable[[float], None]]:
    """A progress that is started once it is known how many files and bytes there are."""
    return lambda files, size: stack.enter_context(progress(f"{name} {size / 1e6:.0f} MB", files))


@main.command()
@work_option
@config_options
@click.option("--image", "files", type=click.Path(path_type=Path), multiple=True, required=True, help="Repeatable.")
@click.option("--size", default="", help="WIDTHxHEIGHTxFRAMES of the video; default: the first picture's shape.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Safetensors file of the latents.")
def picture(work: Path, choice: Choice, files: tuple[Path, ...], size: str, out: Path) -> None:
    """Encode pictures that videos start from, as `train sample --image` needs them for i2v-a14b and ti2v-5b."""
    from encode.picture import bucket_of, encode_pictures, open_picture

    resolved = resolve(choice, work / "config.json")
    config, spec = resolved.config, resolved.spec
    pictures = [open_picture(path) for path in files]
    bucket = parse_bucket(size, spec.grid) if size else bucket_of(pictures[0], config, spec)
    from safetensors.torch import save

    from encode.worker import device
    from shared.weights import load_vae, torch_dtype

    vae = load_vae(spec, torch_dtype(config.vae.weight_dtype)).to(device())
    latents = encode_pictures(vae, spec, pictures, bucket)
    with atomic_write(out) as file:
        file.write(save({str(number): latent for number, latent in enumerate(latents)}, {"size": str(bucket)}))
    click.echo(f"{counted(len(files), 'picture')} encoded for {bucket}: {out}")


@main.command()
@work_option
@config_options
@click.option("--latents", "files", type=click.Path(path_type=Path, exists=True), multiple=True, required=True,
              help="Safetensors file of latents; several are shown side by side.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the videos and sheet.png.")
@click.option("--fps", type=float, help="Frames per second; default: the model's own.")
@click.option("--device", type=click.Choice(["cpu"]), help="Leave the GPU alone, while a run trains on it.")
def decode(
    work: Path, choice: Choice, files: tuple[Path, ...], out: Path, fps: float | None, device: str | None
) -> None:
    """Decode latents to MP4 files and one contact sheet."""
    from encode.preview import preview, read_latents

    resolved = resolve(choice, work / "config.json")
    latents = [read_latents(path) for path in files]
    from encode.worker import device as best_device
    from shared.weights import load_vae, torch_dtype

    vae = load_vae(resolved.spec, torch_dtype(resolved.config.vae.weight_dtype)).to(device or best_device())
    *videos, sheet = preview(vae, latents, out, fps or resolved.spec.fps)
    click.echo(f"{counted(len(videos), 'video')} in {out}, side by side in {sheet}")


if __name__ == "__main__":
    main()
