"""A run as a repository on the Hub: results, samples, curve, workflow, and a model card that says how they were made.

Input: a run with exported files. Output: the folder RUN/publish, and the repository it was uploaded to.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open

from shared.errors import RunError
from shared.files import atomic_write, write_json
from shared.models import SPECS
from shared.resolve import to_json
from train.curve import Line, chart
from train.log import read_events
from train.run import Run
from train.workflow import result_files, write_workflow

FOLDER = "publish"
MOST_SAMPLES = 8
SHOWN_FIRST = ("after", "sample")  # previews of the end, and what `make sample` made


def publish(run: Run, repo: str, dry_run: bool, private: bool = False) -> str:
    """Write the folder and upload it; returns where it is."""
    folder = write_folder(run, repo)
    return str(folder) if dry_run else upload(folder, repo, private)


def write_folder(run: Run, repo: str) -> Path:
    """RUN/publish, made anew."""
    folder = run.folder / FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    files = results(run)
    folder.mkdir(parents=True)
    for path in files:
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, folder / path.name)
    videos = copy_samples(run, folder)
    losses = validation_losses(run)
    if losses:
        with atomic_write(folder / "validation.png") as file:
            chart(losses, "validation loss (held-out clips, fixed noise)", "step").save(file, "PNG")
    write_json(folder / "config.json", to_json(run.config))
    workflows = []
    if run.config.training_method != "EMBEDDING" and not run.config.output_model_format.startswith("DIFFUSERS"):
        workflows = [write_workflow(run, folder)[0].name]
    card = model_card(run, repo, [path.name for path in files], videos, losses, workflows)
    with atomic_write(folder / "README.md") as out:
        out.write(card.encode())
    return folder


def results(run: Run) -> list[Path]:
    """The exported files of a run; raises RunError when there are none."""
    if run.config.training_method == "EMBEDDING" or run.config.output_model_format in ("DIFFUSERS", "DIFFUSERS_LORA"):
        names = [run.name, *(f"{run.name}{end}.safetensors" for end in ("", "_high_noise", "_low_noise"))]
        if found := [run.folder / name for name in names if (run.folder / name).exists()]:
            return found
        raise RunError(f"{run.folder} has no result yet; let it train to its end, or run: make export RUN={run.folder} "
                       f"FORMAT={run.config.output_model_format}")  # fmt: skip
    beside = [path for path in run.folder.glob(f"{run.name}*_text_encoder.safetensors") if path.is_file()]
    return [*result_files(run).values(), *beside]


def copy_samples(run: Run, folder: Path) -> list[tuple[str, str]]:
    """Copy the newest videos of the trained model; returns (path in the folder, prompt)."""
    found: list[tuple[str, str]] = []
    latents = [path for path in sorted((run.folder / "samples").glob("*.safetensors")) if
               path.stem.startswith(SHOWN_FIRST) and path.with_suffix("").is_dir()]  # fmt: skip
    for path in latents:
        with safe_open(path, "pt") as file:
            prompts = json.loads((file.metadata() or {}).get("labels", "[]"))
        for number, prompt in enumerate(prompts):
            video = path.with_suffix("") / f"{path.stem}_{number}.mp4"
            if video.is_file() and len(found) < MOST_SAMPLES:
                (folder / "samples").mkdir(exist_ok=True)
                shutil.copyfile(video, folder / "samples" / video.name)
                found.append((f"samples/{video.name}", prompt))
    return found


def validation_losses(run: Run) -> dict[str, Line]:
    """Expert -> (step, loss) of what was measured on held-out clips."""
    lines: dict[str, Line] = {}
    for row in read_events(run.folder):
        if row["event"] == "validation":
            lines[row["expert"]] = [*lines.get(row["expert"], []), (row["step"], row["loss"])]
    return lines


def model_card(
    run: Run, repo: str, files: list[str], videos: list[tuple[str, str]], losses: dict[str, Line], workflows: list[str]
) -> str:
    """README.md of the repository: metadata that the Hub reads, then what a user asks first."""
    config = run.config
    words = trigger_words(run)
    parts = [front_matter(run, words, videos), f"# {repo.rpartition('/')[2]}", "<Gallery />" if videos else ""]
    parts += [f"{config.training_method} of **{run.spec.name}** (`{base_model(run)}`), trained with prewan."]
    if words:
        parts += ["## Trigger words", " ".join(f"`{word}`" for word in words)]
    parts += ["## Files", "\n".join(f"- `{name}`" for name in [*files, *workflows])]
    parts += ["## Use", how_to_use(run, repo, files, workflows)]
    parts += ["## Settings", settings_table(run)]
    if losses:
        ends = ", ".join(f"{name} {line[0][1]:.4f} -> {line[-1][1]:.4f}" for name, line in losses.items())
        parts += [
            "## Validation",
            f"Held-out clips at fixed timesteps and noise: {ends}.",
            "![validation](validation.png)",
        ]
    return "\n\n".join(part for part in parts if part) + "\n"


def trigger_words(run: Run) -> list[str]:
    """What a prompt needs for the result to work."""
    if run.config.training_method == "EMBEDDING":
        return [run.config.embedding.placeholder]
    return [word] if (word := run.config.caption_prefix.strip(" ,")) else []


def base_model(run: Run) -> str:
    """Hub id of the base model, where it has one."""
    row = SPECS.get(run.spec.name)
    return row.repo if row else run.config.base_model_name


def front_matter(run: Run, words: list[str], videos: list[tuple[str, str]]) -> str:
    """YAML between dashes; JSON values are YAML values."""
    config, spec = run.config, run.spec
    task = "image-to-video" if spec.image_condition == "concat" else "text-to-video"
    facts: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": task, "tags": ["wan", task, spec.name]}
    if spec.name in SPECS:
        facts["base_model"] = [SPECS[spec.name].repo]
        facts["base_model_relation"] = "finetune" if config.training_method == "FINE_TUNE" else "adapter"
    if config.training_method == "LORA":
        facts["tags"] += [config.peft_type.lower()]
    if words:
        facts["instance_prompt"] = words[0]
    if videos:
        facts["widget"] = [{"text": prompt, "output": {"url": path}} for path, prompt in videos]
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in facts.items()), "---"])


def settings_table(run: Run) -> str:
    """The settings that decide what a result is; all are in config.json."""
    config = run.config
    weights = f"{config.train_dtype}, weights {config.transformer.weight_dtype}"
    rows: dict[str, Any] = {
            "steps": last_step(run), "batch size": config.batch_size, "learning rate": config.learning_rate,
            "optimizer": config.optimizer.name, "resolution": config.resolution, "frames": config.frames,
            "precision": weights, "seed": config.seed}  # fmt: skip
    if config.training_method == "LORA":
        rows = {"kind": config.peft_type, "rank": config.lora_rank, "alpha": config.lora_alpha} | rows
    merged = ", ".join(f"{Path(item.file).name} x {item.strength:g}" for item in config.base_adapters)
    rows |= {"trained on top of": merged} if merged else {}
    return "\n".join(["| setting | value |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])


def last_step(run: Run) -> int:
    """Updates that were made."""
    return max((row["step"] for row in read_events(run.folder)), default=0)


def how_to_use(run: Run, repo: str, files: list[str], workflows: list[str]) -> str:
    """ComfyUI and diffusers, in the words of their users."""
    config, parts = run.config, []
    if workflows:
        parts += [f"ComfyUI: open `{workflows[0]}`; it names every file and where it belongs."]
    if config.training_method == "LORA" and config.peft_type == "LORA":
        loads = [f'pipe.load_lora_weights("{repo}", weight_name="{name}"'
                 + (", load_into_transformer_2=True)" if "_low_noise" in name else ")") for name in files]  # fmt: skip
        parts += [snippet(run, [], loads)]
    if config.output_model_format == "DIFFUSERS":
        part = run.spec.expert_folders[0][1]
        first = ["from diffusers import WanTransformer3DModel", "",
                 f'transformer = WanTransformer3DModel.from_pretrained("{repo}", subfolder="{files[0]}/{part}", '
                 "torch_dtype=torch.bfloat16)"]  # fmt: skip
        parts += [snippet(run, first, ["pipe.transformer = transformer"])]
    if config.training_method == "EMBEDDING":
        parts += [f"`make embed` writes the embedding of a prompt with `{config.embedding.placeholder}` for diffusers' "
                  "`prompt_embeds`."]  # fmt: skip
    return "\n\n".join(parts)


def snippet(run: Run, before: list[str], after: list[str]) -> str:
    """A pipeline of the base model in diffusers, and what is done to it."""
    opened = f'pipe = WanPipeline.from_pretrained("{base_model(run)}", torch_dtype=torch.bfloat16)'
    lines = ["diffusers:", "", "```python", "import torch", "from diffusers import WanPipeline", *before, "", opened]
    return "\n".join([*lines, *after, "```"])


def upload(folder: Path, repo: str, private: bool) -> str:
    """Create the repository if it is not there, and upload the folder in one commit; returns its address."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError

    from shared.store_remote import hub_errors

    api = HfApi()
    refusals: tuple[type[Exception], ...] = (*hub_errors(), HFValidationError, LocalTokenNotFoundError, OSError)
    try:
        address = api.create_repo(repo, repo_type="model", private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload with prewan")
    except refusals as error:
        raise RunError(f"REPO={repo}: {str(error).strip().splitlines()[0]}; the folder is {folder}; log in with "
                       ".venv/bin/hf auth login, and name a repository of yours as user/name") from None  # fmt: skip
    return str(address)
