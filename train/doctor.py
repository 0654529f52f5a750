"""`train doctor`: what this machine can do, one line per fact: ok, warning or error, and how to mend it.

Nothing of a vendor is imported: CUDA and ROCm are both torch.cuda, and a driver's tool is asked only if it is there.
"""

import importlib.metadata
import platform
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import psutil
import torch

from shared.config import Config, TransformerConfig
from shared.errors import ModelError, RunError
from shared.models import ModelSpec
from shared.weights import model_folder
from train.fit import refuse_if_too_large
from train.memory import GIB, MemoryPlan, available_ram, plan_for_device, weight_cost_of
from train.model import pick_device
from train.plan import tera

PACKAGES = ("torch", "diffusers", "transformers", "peft", "safetensors", "zarr")
FP8_CAPABILITY = (8, 9)  # Ada; older cards store FLOAT_8 all the same and widen it before each product
STORE_WANTED = 10 * GIB
MOSTLY_FREE = 0.9  # of a card that nothing else uses
TEXT_AND_VAE = 14_000_000_000  # bytes: UMT5 in bfloat16 11.4 GB, VAE in float32 0.5 or 2.8 GB
SMALL_STEP = 1e11  # FLOPs of an update that a CPU makes in about a second: tiny's, not those of a real Wan
VENDOR_TOOLS = {"nvidia-smi": ("cuda", ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]),
                "rocm-smi": ("rocm", ["rocm-smi", "--showdriverversion", "--csv"])}  # fmt: skip


State = Literal["ok", "warning", "error"]


class Finding(NamedTuple):
    """One line of the report."""

    state: State
    text: str

    def __str__(self) -> str:
        return f"{self.state:8} {self.text}"


def examine(config: Config, spec: ModelSpec, work: Path, ffmpeg: str | None) -> list[Finding]:
    """All findings, in the order in which a beginner meets them."""
    plan = plan_for_device(config, spec, pick_device())
    return [versions(), *device(config, spec, plan), memory(), pinned(), fit(config, spec, plan), disk(work),
            video_tool(ffmpeg), model(spec)]  # fmt: skip


def versions() -> Finding:
    """Python and the packages that decide results."""
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return Finding("ok", f"Python {platform.python_version()}, {found}")


def driver() -> tuple[str, str] | None:
    """(torch build, what its vendor's tool says of card and driver), of the first tool that answers."""
    for tool, (build, command) in VENDOR_TOOLS.items():
        if shutil.which(tool) is not None:
            answer = subprocess.run(command, capture_output=True, text=True, check=False)
            if answer.returncode == 0 and answer.stdout.strip():
                return build, f"{tool}: {answer.stdout.strip().splitlines()[-1]}"
    return None


def device(config: Config, spec: ModelSpec, plan: MemoryPlan) -> Iterator[Finding]:
    """The GPU torch sees, or why it sees none."""
    found = driver()
    if torch.cuda.is_available():
        yield from gpu(config, found[1] if found is not None else "no driver tool here to ask")
        return
    if found is not None:
        build, said = found
        yield Finding("error", f"{said}, but torch {torch.__version__} sees no GPU; run: make setup TORCH={build}; if "
                      "that is done, update the driver")  # fmt: skip
        return
    cost = f"{tera(plan.step_flops)} TFLOP per step"
    if is_local(spec) and plan.step_flops < SMALL_STEP:
        yield Finding("ok", f"no GPU: training runs on the CPU, which is enough for {spec.name} ({cost})")
    else:
        yield Finding("warning", f"no GPU: training {spec.name} on the CPU is slow ({cost}); MODEL=tiny is for trying "
                      "things out, make demo a first example")  # fmt: skip


def fit(config: Config, spec: ModelSpec, plan: MemoryPlan) -> Finding:
    """Whether the steps of this config fit device and RAM, or what makes them fit."""
    try:
        refuse_if_too_large(plan, config, spec)
    except RunError as error:
        return Finding("error", str(error))
    on_card = f"{plan.need / GIB:.1f} GiB on the card and " if plan.room.gpu else ""
    return Finding("ok", f"{spec.name} with this config needs {on_card}{plan.ram / GIB:.1f} GiB of RAM to train")


def gpu(config: Config, said: str) -> Iterator[Finding]:
    """Name, driver, memory and abilities of the first GPU."""
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    build = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    yield Finding("ok", f"{properties.name}, {torch.cuda.device_count()} in all, torch for {build} ({said})")
    state: State = "warning" if free < MOSTLY_FREE * total else "ok"
    mend = ": end other programs that use the card" if state == "warning" else ""
    yield Finding(state, f"{free / GIB:.1f} of {total / GIB:.1f} GiB of GPU memory are free{mend}")
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    fp8 = (properties.major, properties.minor) >= FP8_CAPABILITY
    lacks = config.train_dtype == "BFLOAT_16" and not bf16
    yield Finding("warning" if lacks else "ok",
                  f"capability {properties.major}.{properties.minor}: bfloat16 arithmetic {'yes' if bf16 else 'no'}"
                  f"{'; use SET=train_dtype=FLOAT_32' if lacks else ''}, FLOAT_8 {'yes' if fp8 else 'no'} (not needed: "
                  "FLOAT_8 weights are widened before each use)")  # fmt: skip


def memory() -> Finding:
    """RAM that is free; whether it is enough is said with the config."""
    available, total = available_ram(), psutil.virtual_memory().total
    return Finding("ok", f"{available / GIB:.1f} of {total / GIB:.1f} GiB of RAM are available")


def pinned() -> Finding:
    """How much RAM may be locked for copies to a GPU."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if not torch.cuda.is_available():
        return Finding("ok", "pinned memory: not needed without a GPU")
    try:
        torch.empty(GIB, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        shown = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit >> 10} KiB"
        return Finding("error", f"1 GiB of RAM cannot be pinned ({str(error).splitlines()[0]}; ulimit -l is {shown}); "
                       "raise memlock in limits.conf, or give the container --ulimit memlock=-1")  # fmt: skip
    return Finding("ok", "1 GiB of RAM was pinned for copies to the GPU")


def is_local(spec: ModelSpec) -> bool:
    """Whether the model is a folder here, so that nothing is downloaded."""
    return Path(spec.repo).expanduser().is_dir()


def disk(work: Path) -> Finding:
    """Room for store and runs."""
    free = free_on(work)
    state: State = "warning" if free < STORE_WANTED else "ok"
    mend = "; clips, store and checkpoints want some, WORK=folder puts them elsewhere" if state == "warning" else ""
    return Finding(state, f"{free / GIB:.0f} GiB are free on the disk of {nearest(work)}{mend}")


def nearest(folder: Path) -> Path:
    """The folder, or the first above it that exists."""
    return next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.is_dir())


def free_on(folder: Path) -> int:
    """Bytes that are free where a folder is or will be."""
    return shutil.disk_usage(nearest(folder)).free


def video_tool(ffmpeg: str | None) -> Finding:
    """ffmpeg: the wheel's, or the one that was named."""
    if ffmpeg is None:
        import imageio_ffmpeg

        ffmpeg = str(imageio_ffmpeg.get_ffmpeg_exe())
    try:
        answer = subprocess.run([ffmpeg, "-version"], capture_output=True, text=True, check=False)
    except OSError as error:
        return Finding(
            "error", f"ffmpeg {ffmpeg} cannot be run ({error.strerror}); leave FFMPEG out to use the wheel's"
        )
    if answer.returncode or not answer.stdout.startswith("ffmpeg"):
        return Finding("error", f"{ffmpeg} is no working ffmpeg; leave FFMPEG out to use the wheel's")
    return Finding("ok", answer.stdout.splitlines()[0])


def model(spec: ModelSpec) -> Finding:
    """Whether the model's files are here, or can be."""
    try:
        folders = [model_folder(spec, (part,), download=False) / part for _, part in spec.expert_folders]
        missing = [folder.name for folder in folders if not any(folder.glob("*.safetensors"))]
    except ModelError as error:
        if is_local(spec):
            return Finding("error", str(error))
        missing = [part for _, part in spec.expert_folders]
    if missing and is_local(spec):
        return Finding("error", f"{spec.source} has no weights in {', '.join(missing)}/; download the model again")
    if not missing:
        return Finding("ok", f"model {spec.name}: {Path(spec.source).expanduser() if is_local(spec) else folders[0]}")
    from huggingface_hub.constants import HF_HUB_CACHE

    size, free = download_size(spec), free_on(Path(HF_HUB_CACHE))
    line = f"model {spec.name} is not on this disk: {spec.repo}, about {size / 1e9:.0f} GB"
    if free < size:
        return Finding("error", f"{line}, and {free / 1e9:.0f} GB are free at {HF_HUB_CACHE}; set HF_HOME to a folder "
                       "on a larger disk, or give a folder with MODEL=path")  # fmt: skip
    return Finding("warning", f"{line}, is downloaded at the first start to {HF_HUB_CACHE}; or give a folder with "
                   "MODEL=path")  # fmt: skip


def download_size(spec: ModelSpec) -> int:
    """Bytes of a published folder in float32, its experts with text encoder and VAE."""
    exact = Config(train_dtype="FLOAT_32", transformer=TransformerConfig(weight_dtype="FLOAT_32"))
    cost = weight_cost_of(spec, exact)
    expert = cost.outside + cost.blocks * (cost.block_rest + cost.block_matrices)
    return len(spec.expert_folders) * expert + TEXT_AND_VAE
