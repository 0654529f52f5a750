"""`train doctor`: what this machine can do, one line per fact: ok, warning or error, and how to mend it.

Nothing of a vendor is imported: CUDA and ROCm are both torch.cuda, and a driver's tool is asked only if it is there.
"""

import importlib.metadata
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import psutil
import torch

from shared.config import Config
from shared.errors import RunError
from shared.models import ModelSpec
from train.memory import GIB, MemoryPlan, plan_for_device, refuse_if_too_large
from train.model import pick_device

PACKAGES = ("torch", "diffusers", "transformers", "peft", "safetensors", "zarr")
FP8_CAPABILITY = (8, 9)  # Ada; older cards store FLOAT_8 all the same and widen it before each product
DISK_WANTED = 50 * GIB  # of a ti2v-5b folder with text encoder, and a store
SMALL_STEP = 1e11  # FLOPs of an update that a CPU makes in about a second: tiny's, not those of a real Wan
VENDOR_TOOLS = {"nvidia-smi": ("cuda", ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]),
                "rocm-smi": ("rocm", ["rocm-smi", "--showdriverversion", "--csv"])}  # fmt: skip


class Finding(NamedTuple):
    """One line of the report."""

    state: Literal["ok", "warning", "error"]
    text: str

    def __str__(self) -> str:
        return f"{self.state:8} {self.text}"


def examine(config: Config, spec: ModelSpec, work: Path, ffmpeg: str | None) -> list[Finding]:
    """All findings, in the order in which a beginner meets them."""
    plan = plan_for_device(config, spec, pick_device())
    return [*versions(), *device(config, spec, plan), fit(config, spec, plan), memory(plan), pinned(),
            disk(work, spec), video_tool(ffmpeg), model(spec)]  # fmt: skip


def versions() -> Iterator[Finding]:
    """Python and the packages that decide results."""
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    yield Finding("ok", found)


def device(config: Config, spec: ModelSpec, plan: MemoryPlan) -> Iterator[Finding]:
    """The GPU torch sees, or why it sees none."""
    if torch.cuda.is_available():
        yield from gpu(config)
        return
    for tool, (build, command) in VENDOR_TOOLS.items():
        if shutil.which(tool) is None:
            continue
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode == 0 and answer.stdout.strip():
            card = answer.stdout.strip().splitlines()[-1]
            yield Finding(
                "error", f"{tool} sees {card}, torch {torch.__version__} does not; run: make setup TORCH={build}"
            )
            return
    cost = f"{plan.step_flops / 1e12:.2g} TFLOP per step"
    if is_local(spec) and plan.step_flops < SMALL_STEP:
        yield Finding("ok", f"no GPU: training runs on the CPU, which is enough for {spec.name} ({cost})")
    else:
        yield Finding("warning", f"no GPU: training {spec.name} on the CPU is slow ({cost}); MODEL=tiny is for trying "
                      "things out, make demo a first example")  # fmt: skip


def fit(config: Config, spec: ModelSpec, plan: MemoryPlan) -> Finding:
    """Whether the steps of this config fit the device, or what makes them fit."""
    try:
        refuse_if_too_large(plan, config, spec, stream=torch.cuda.is_available())
    except RunError as error:
        return Finding("error", str(error))
    return Finding("ok", f"{spec.name} with this config needs {plan.need / GIB:.1f} GiB to train; make plan shows why")


def gpu(config: Config) -> Iterator[Finding]:
    """Name, memory and abilities of the first GPU."""
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    platform = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    yield Finding("ok", f"{properties.name}, {platform}, capability {properties.major}.{properties.minor}, "
                  f"{torch.cuda.device_count()} in all")  # fmt: skip
    if free < 0.9 * total:
        yield Finding(
            "warning", f"{free / GIB:.1f} of {total / GIB:.1f} GiB are free: end other programs that use the card"
        )
    else:
        yield Finding("ok", f"{free / GIB:.1f} of {total / GIB:.1f} GiB of GPU memory are free")
    if config.train_dtype == "BFLOAT_16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        yield Finding("warning", "this card has no bfloat16 arithmetic; use SET=train_dtype=FLOAT_32")
    if config.transformer.weight_dtype == "FLOAT_8" and (properties.major, properties.minor) < FP8_CAPABILITY:
        yield Finding(
            "ok", "no FLOAT_8 arithmetic here, and none is needed: FLOAT_8 weights are widened before each use"
        )


def memory(plan: MemoryPlan) -> Finding:
    """RAM, for loading, streamed blocks and checkpoints; on a CPU it is the device, too."""
    available, total = psutil.virtual_memory().available, psutil.virtual_memory().total
    line = f"{available / GIB:.1f} of {total / GIB:.1f} GiB of RAM are available"
    if torch.cuda.is_available() and plan.ram > available:
        return Finding("warning", f"{line}; this config wants {plan.ram / GIB:.1f}: end other programs")
    return Finding("ok", line)


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


def disk(work: Path, spec: ModelSpec) -> Finding:
    """Room for store, model and runs."""
    place = next(parent for parent in [work.absolute(), *work.absolute().parents] if parent.is_dir())
    free = shutil.disk_usage(place).free
    line = f"{free / GIB:.0f} GiB are free on the disk of {place}"
    if free < DISK_WANTED and not is_local(spec):
        return Finding("warning", f"{line}; a ti2v-5b model with its text encoder takes about 35 GB")
    return Finding("ok", line)


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
    """Whether the model's files are here."""
    folder = Path(spec.repo).expanduser()
    if is_local(spec):
        missing = [part for _, part in spec.expert_folders if not any((folder / part).glob("*.safetensors"))]
        if missing:
            return Finding("error", f"{folder} has no weights in {', '.join(missing)}/; download the model again")
        return Finding("ok", f"model {spec.name}: {Path(spec.source).expanduser()}")
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(spec.repo, f"{spec.expert_folders[0][1]}/config.json")
    if isinstance(cached, str):
        return Finding("ok", f"model {spec.name}: {Path(cached).parent.parent}")
    return Finding("warning", f"model {spec.name} is not on this disk: the first start downloads {spec.repo}; or give "
                   "a folder with MODEL=path")  # fmt: skip
