"""DiffSynth-Studio's training step in its own environment: its WanModel, LoRA, flow matching loss and AdamW.

Usage: python diffsynth_worker.py FOLDER, with config.json, weights, lora and batch as safetensors.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from protocol import serve


def prepare() -> tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]]]:
    import torch
    from diffsynth.diffusion.loss import FlowMatchSFTLoss
    from diffsynth.diffusion.training_module import DiffusionTrainingModule
    from diffsynth.models.wan_video_dit import WanModel
    from diffsynth.pipelines.wan_video import WanVideoPipeline
    from safetensors.torch import load_file

    folder = Path(sys.argv[1])
    config = json.loads((folder / "config.json").read_text())
    torch.set_num_threads(config["threads"])
    pipe = WanVideoPipeline(device="cpu", torch_dtype=torch.float32)
    pipe.scheduler.set_timesteps(1000, training=True)
    dit = WanModel(**config["model"])
    dit.load_state_dict(load_file(folder / "weights.safetensors"))
    dit.requires_grad_(False)
    pipe.dit = DiffusionTrainingModule().add_lora_to_model(dit, config["targets"], config["rank"], config["rank"])
    trained = {name: part for name, part in pipe.dit.named_parameters() if part.requires_grad}
    for name, value in load_file(folder / "lora.safetensors").items():
        trained.pop(name.replace(".weight", ".default.weight")).data.copy_(value)
    assert not trained
    parts = [part for part in pipe.dit.parameters() if part.requires_grad]
    optimizer = torch.optim.AdamW(parts, lr=config["rate"], weight_decay=0.01)
    inputs = load_file(folder / "batch.safetensors")
    place = config["timestep"]
    bounds = {"min_timestep_boundary": (place + 0.5) / 1000, "max_timestep_boundary": (place + 1.5) / 1000}

    def step(request: dict[str, Any]) -> dict[str, Any]:
        torch.manual_seed(request["seed"])
        loss = FlowMatchSFTLoss(pipe, **inputs, **bounds, use_gradient_checkpointing=False)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": float(loss.detach())}

    scheduler = pipe.scheduler
    weight = float(scheduler.training_weight(scheduler.timesteps[place : place + 1]))
    return {"sigma": float(scheduler.sigmas[place]), "weight": weight}, step


serve(prepare)
