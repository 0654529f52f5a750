"""A run's result as a ComfyUI workflow, in the API form that ComfyUI opens and runs: nodes by id, links as [id, slot].

Input: a finished run whose result was exported. Output: a JSON file that names the published model files and the run's
own. Nodes and inputs are those of ComfyUI's nodes.py, comfy_extras/nodes_wan.py, nodes_video.py and
nodes_model_advanced.py. Sampling is our previews': Euler steps, evenly spaced before the shift ("simple").
"""

from pathlib import Path
from typing import Any

from shared.errors import RunError
from shared.files import write_json
from shared.models import ModelSpec, expert_end
from shared.single_file import DIT_FILE
from train.adapter_file import base_adapters
from train.run import Run
from train.sample import Scene, scene_of, sigma_grid

# Comfy-Org/Wan_2.2_ComfyUI_Repackaged and Wan_2.1_ComfyUI_repackaged, split_files/
DIT_FILES = {
    "t2v-a14b": "wan2.2_t2v_{}_14B_fp8_scaled.safetensors",
    "i2v-a14b": "wan2.2_i2v_{}_14B_fp8_scaled.safetensors",
    "ti2v-5b": "wan2.2_ti2v_5B_fp16.safetensors",
    "t2v-1.3b": "wan2.1_t2v_1.3B_fp16.safetensors",
    "t2v-14b": "wan2.1_t2v_14B_fp16.safetensors",
}
VAE_FILES = {16: "wan_2.1_vae.safetensors", 48: "wan2.2_vae.safetensors"}
TEXT_FILE = "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
IMAGE = "example.png"  # ComfyUI's input/ has it
LORA_FORMATS = ("COMFY_LORA", "KOHYA_LORA")
Link = list[Any]  # [node id, output slot]


class Graph:
    """Nodes in the order in which they are added; ids are numbers from 1."""

    def __init__(self) -> None:
        self.nodes: dict[str, dict[str, Any]] = {}

    def add(self, kind: str, /, **inputs: Any) -> Link:
        """A node, shown under its kind or `title`; returns the link to its first output."""
        number, title = str(len(self.nodes) + 1), inputs.pop("title", kind)
        self.nodes[number] = {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}
        return [number, 0]


def write_workflow(run: Run, out: Path | None) -> tuple[Path, list[str]]:
    """Write the workflow of a run; returns its path and where each file belongs."""
    scene = scene_of(run.config, run.spec)
    results = result_files(run)
    graph = workflow(run, scene, {expert: path.name for expert, path in results.items()})
    path = (out or run.folder) / f"{run.name}-comfyui.json"
    write_json(path, graph.nodes)
    return path, places(graph, results)


def result_files(run: Run) -> dict[str, Path]:
    """Expert -> exported file that ComfyUI loads; raises RunError naming the export command when there is none."""
    method, form = run.config.training_method, run.config.output_model_format
    if method == "EMBEDDING":  # comfy/text_encoders/wan.py gives its tokenizer no folder of embeddings
        raise RunError(f"{run.folder} learned an embedding, which ComfyUI does not load for Wan; use it with "
                       f'diffusers: make embed RUN={run.folder} PROMPT="..."')  # fmt: skip
    wanted = ("SAFETENSORS",) if method == "FINE_TUNE" else LORA_FORMATS
    stems = [run.name] if form in wanted else []
    stems += [f"{run.name}-{name.lower()}" for name in wanted]
    found = {}
    for expert in run.spec.experts:
        paths = [run.folder / f"{stem}{expert_end(expert)}.safetensors" for stem in stems]
        if path := next((path for path in paths if path.is_file()), None):
            found[expert] = path
    if not found:
        raise RunError(f"{run.folder} holds no file that ComfyUI loads; make one with: make export RUN={run.folder} "
                       f"FORMAT={wanted[0]}")  # fmt: skip
    return found


def workflow(run: Run, scene: Scene, results: dict[str, str]) -> Graph:
    """The graph: loaders, adapters, prompts, one sampler per expert, a video file."""
    graph, spec = Graph(), run.spec
    text = graph.add("CLIPLoader", clip_name=TEXT_FILE, type="wan", device="default")
    vae = graph.add("VAELoader", vae_name=VAE_FILES.get(spec.vae.channels, "vae.safetensors"))
    prompt = scene.prompts[0] if scene.prompts else f"{run.config.caption_prefix} your prompt".strip()
    positive = graph.add("CLIPTextEncode", title="prompt", clip=text, text=prompt)
    negative = graph.add("CLIPTextEncode", title="negative prompt", clip=text, text=scene.negative)
    inputs = {"positive": positive, "negative": negative}
    inputs |= start(graph, spec, scene, vae, inputs)
    models = {expert: model(graph, run, expert, results) for expert in spec.experts}
    latent = sample_pair(graph, spec, scene, models, inputs) if spec.boundary is not None else sample_one(
        graph, scene, models["single"], inputs)  # fmt: skip
    images = graph.add("VAEDecode", samples=latent, vae=vae)
    video = graph.add("CreateVideo", images=images, fps=run.config.video_config.target_fps or spec.fps)
    graph.add("SaveVideo", video=video, filename_prefix=f"video/{run.name}", format="auto", codec="auto")
    return graph


def start(graph: Graph, spec: ModelSpec, scene: Scene, vae: Link, prompts: dict[str, Link]) -> dict[str, Link]:
    """What sampling starts from: an empty latent, with a picture where the model takes one."""
    frames, height, width = scene.bucket.num_frames, scene.bucket.height, scene.bucket.width
    size = {"width": width, "height": height, "length": frames, "batch_size": 1}
    if spec.image_condition == "concat":
        image = graph.add("LoadImage", title="first frame", image=IMAGE)
        number, _ = graph.add("WanImageToVideo", vae=vae, start_image=image, **prompts, **size)
        return {"positive": [number, 0], "negative": [number, 1], "latent_image": [number, 2]}
    if spec.image_condition == "first_frame":
        title = "add a start_image for image to video"
        return {"latent_image": graph.add("Wan22ImageToVideoLatent", title=title, vae=vae, **size)}
    return {"latent_image": graph.add("EmptyHunyuanLatentVideo", **size)}


def model(graph: Graph, run: Run, expert: str, results: dict[str, str]) -> Link:
    """An expert: the model's file, what was merged into it in training, the run's adapter, the shift."""
    method = run.config.training_method
    whole = method == "FINE_TUNE"
    name = results[expert] if whole and expert in results else dit_file(run.spec, expert)
    link = graph.add("UNETLoader", title=expert, unet_name=name, weight_dtype="default")
    adapters = [(path.name, strength) for path, strength in base_adapters(run.config, expert)] if not whole else []
    adapters += [(results[expert], 1.0)] if method == "LORA" and expert in results else []
    for file, strength in adapters:
        link = graph.add("LoraLoaderModelOnly", title=expert, model=link, lora_name=file, strength_model=strength)
    return graph.add("ModelSamplingSD3", title=expert, model=link, shift=run.spec.sample_shift)


def dit_file(spec: ModelSpec, expert: str) -> str:
    """Name of an expert's file: the user's own, or that of the repackaged model."""
    if spec.near:
        link = Path(spec.repo) / dict(spec.expert_folders)[expert] / DIT_FILE
        return link.readlink().name
    pattern = DIT_FILES.get(spec.name, spec.name + ("_{}.safetensors" if spec.boundary else ".safetensors"))
    return pattern.format(expert)


def sample_one(graph: Graph, scene: Scene, link: Link, inputs: dict[str, Link]) -> Link:
    """All steps with one model."""
    return graph.add("KSampler", model=link, seed=scene.seed, steps=scene.steps, cfg=scene.guidance[0], denoise=1.0,
                     sampler_name="euler", scheduler="simple", **inputs)  # fmt: skip


def sample_pair(graph: Graph, spec: ModelSpec, scene: Scene, models: dict[str, Link], inputs: dict[str, Link]) -> Link:
    """The steps from noise to the boundary with the high-noise expert, the rest with the other."""
    assert spec.boundary is not None
    grid = sigma_grid(scene.steps, spec.sample_shift)
    switch = sum(sigma >= spec.boundary for sigma in grid[:-1])
    common = {"noise_seed": scene.seed, "steps": scene.steps, "sampler_name": "euler", "scheduler": "simple"}
    high = graph.add("KSamplerAdvanced", title="high noise", model=models["high_noise"], add_noise="enable",
                     start_at_step=0, end_at_step=switch, return_with_leftover_noise="enable", cfg=scene.guidance[0],
                     **common, **inputs)  # fmt: skip
    return graph.add("KSamplerAdvanced", title="low noise", model=models["low_noise"], add_noise="disable",
                     start_at_step=switch, end_at_step=10000, return_with_leftover_noise="disable",
                     cfg=scene.guidance[1], **common, **inputs | {"latent_image": high})  # fmt: skip


def places(graph: Graph, results: dict[str, Path]) -> list[str]:
    """'models/loras: file' of every file the graph loads, with where our own lie now."""
    folders = {"unet_name": "models/diffusion_models", "lora_name": "models/loras", "vae_name": "models/vae",
               "clip_name": "models/text_encoders", "image": "input"}  # fmt: skip
    own = {path.name: f" (copy {path})" for path in results.values()}
    lines = [f"{folders[key]}: {value}{own.get(value, '')}" for node in graph.nodes.values()
             for key, value in node["inputs"].items() if key in folders]  # fmt: skip
    return list(dict.fromkeys(lines))
