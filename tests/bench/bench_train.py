"""The training step, the start and the resume against a bare loop of stock diffusers + peft + AdamW."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from peft import LoraConfig

from shared.files import write_json
from shared.keys import caption_key
from shared.models import ModelSpec, model_spec, spec_of_folder
from shared.resolve import Choice, resolve, to_json
from shared.store import ListedSample
from shared.store_read import StoreReader
from tests.bench.bench_memory import positive
from tests.bench.harness import Pair
from tests.train.make import config, listed, make_all, make_model, make_run, make_store
from train.data import Draw, Plan, Slots, load_step
from train.feed import prefetch
from train.flow import SigmaLaw
from train.group import Group
from train.learner import Learner
from train.loop import accumulate
from train.method import make_trained
from train.model import load_model
from train.optim import make_optimizer, set_rate
from train.run import Run

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
WIDE = {"num_attention_heads": 8, "attention_head_dim": 64, "ffn_dim": 2048, "num_layers": 4, "text_dim": 256}
CLIP = (9, 192, 192)  # 3 x 12 x 12 tokens
CAPTION = " ".join(["word"] * 47)  # 48 tokens with the end


def made(folder: Path, **changes: int) -> tuple[Run, ModelSpec, StoreReader]:
    """The model of the facts' step table with some changes, one clip, one caption."""
    model = make_model(folder / "model", **WIDE | changes)
    spec = spec_of_folder(model)
    sample = listed(0, spec, CLIP, captions=(caption_key(CAPTION),))
    store = make_store(folder / "s.zarr", spec, [sample], (CAPTION,))
    settings = config(model, resolution="192x192", batch_size=1, lora_rank=16, lora_alpha=16, max_steps=10_000,
                      caption_dropout_probability=0.0, lr_scheduler="CONSTANT", warmup_steps=0)  # fmt: skip
    return make_run(folder / "run", settings, store), spec, StoreReader([store])


def our_step(run: Run, spec: ModelSpec, reader: StoreReader, slots: Slots) -> Callable[..., float]:
    """One update as loop.py takes it."""
    model = load_model(spec, "single", run.config, CPU)
    bank, trained = make_trained(model, run, 0, reader, [])
    torch.manual_seed(0)
    for name, part in trained.items():
        part.data = torch.randn(part.shape) * 0.02 if "lora_B" in name else part.data
    learner, alone = Learner(model, bank, trained, {}, make_optimizer(run.config, trained), None, None), Group()

    def step(slots: Slots = slots) -> float:
        rate = set_rate(learner.optimizer, run.config, 0, 1)
        loss = accumulate(learner, [slots], run.config)
        learner.sum_gradients(alone)
        norm = learner.clip(run.config.max_grad_norm, alone)
        learner.step(torch.stack([loss, norm]))
        learner.optimizer.zero_grad()
        return float(loss) + 0 * rate

    step.tensors = {name: part.detach().clone() for name, part in trained.items()}  # type: ignore[attr-defined]
    return step


def stock_step(run: Run, reader: StoreReader, slots: Slots, tensors: dict[str, torch.Tensor]) -> Callable[[], float]:
    """The same update with the stock forward, 512 text rows and peft's own layers."""
    settings = run.config
    model = WanTransformer3DModel.from_pretrained(
        Path(run.spec.repo) / "transformer", torch_dtype=torch.float32
    ).requires_grad_(False)
    model.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=settings.lora_targets))
    parts = {name.replace(".default", ""): part for name, part in model.named_parameters() if part.requires_grad}
    for name, part in parts.items():
        part.data = tensors[name].clone()
    optimizer = torch.optim.AdamW(parts.values(), lr=settings.learning_rate, fused=True)
    if settings.gradient_checkpointing != "NONE":
        model.enable_gradient_checkpointing()
        model.train()  # stock checkpoints in training mode only; there is no dropout
    rows = [torch.from_numpy(reader.text(caption).embedding_Sd.copy()).float() for caption in slots.captions]
    text = torch.stack([torch.cat([row, row.new_zeros(512 - len(row), row.shape[1])]) for row in rows])

    def step() -> float:
        sigma = slots.sigma_B.view(-1, 1, 1, 1, 1)
        noisy = (1 - sigma) * slots.latent_BCthw + sigma * slots.noise_BCthw
        predicted = model(noisy, slots.sigma_B * 1000, text).sample
        loss = F.mse_loss(predicted, slots.noise_BCthw - slots.latent_BCthw)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parts.values(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def near(ours: float, theirs: float) -> None:
    """Losses of the first update agree."""
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=1e-6)


def step() -> Iterator[Pair]:
    """4 layers, width 512, 432 video tokens, 48 text tokens, rank 16 on all ten linears, float32, batch 1."""
    with tempfile.TemporaryDirectory() as folder:
        run, spec, reader = made(Path(folder))
        sample = listed(0, spec, CLIP, captions=(caption_key(CAPTION),))
        (slots,) = load_step(reader, run.config, SigmaLaw("UNIFORM", 1.0), 0, [Draw(sample, "sample0")])
        ours = our_step(run, spec, reader, slots)
        stock = stock_step(run, reader, slots, ours.tensors)  # type: ignore[attr-defined]
        yield Pair("step", ours, stock, "stock diffusers + peft + AdamW", near, clock="cpu", rounds=7, unit="step")


def demo_store(folder: Path, spec: ModelSpec) -> tuple[list[ListedSample], StoreReader]:
    """16 samples of 64x64x9 with captions of ten words, in a store of random latents."""
    captions = [f"a zorb of kind {number} moving left on a gray background" for number in range(16)]
    samples = [listed(number, spec, (9, 64, 64), captions=(caption_key(text),)) for number, text in enumerate(captions)]
    return samples, StoreReader([make_store(folder / "s.zarr", spec, samples, tuple(captions))])


def step_demo() -> Iterator[Pair]:
    """The demo's update: tiny, 16 samples of 64x64x9, captions of ten words; and with every block checkpointed."""
    with tempfile.TemporaryDirectory() as name:
        folder, spec = Path(name), model_spec("tiny")
        samples, reader = demo_store(folder, spec)
        for item, checkpointing in (("step-demo", "NONE"), ("step-demo-checkpointed", "DEFAULT")):
            changes = {"gradient_checkpointing": checkpointing, "caption_dropout_probability": 0.0}
            settings = resolve(Choice("demo")).config.model_copy(update=changes)
            run = make_run(folder / item, settings, folder / "s.zarr")
            draws = [Draw(sample, sample.keys[0]) for sample in samples]
            (slots,) = load_step(reader, settings, SigmaLaw("UNIFORM", 1.0), 0, draws)
            ours = our_step(run, spec, reader, slots)
            stock = stock_step(run, reader, slots, ours.tensors)  # type: ignore[attr-defined]
            yield Pair(item, ours, stock, "stock diffusers + peft + AdamW", near, clock="cpu", rounds=7, unit="step")


def step_wait() -> Iterator[Pair]:
    """Share of the demo's time that a step waits for its batch, over that of a loop that reads each batch itself."""
    with tempfile.TemporaryDirectory() as name:
        folder, spec, law = Path(name), model_spec("tiny"), SigmaLaw("UNIFORM", 1.0)
        samples, reader = demo_store(folder, spec)
        settings = resolve(Choice("demo")).config
        plan = Plan(samples, settings, settings.batch_size)
        batches, steps = prefetch(reader, plan, law, (0, plan.total_steps()), Group()), iter(range(10**6))

        def read() -> list[Slots]:
            number = next(steps)
            return load_step(reader, settings, law, number, plan.batch(number))

        update = our_step(make_run(folder / "run", settings, folder / "s.zarr"), spec, reader, read()[0])

        def share(fetch: Callable[[], list[Slots]]) -> float:
            """Percent of the time of eight steps."""
            began, waited = time.perf_counter(), 0.0
            for _ in range(8):
                asked = time.perf_counter()
                (slots,) = fetch()
                waited += time.perf_counter() - asked
                update(slots)
            return 100 * waited / (time.perf_counter() - began)

        yield Pair("step-wait", partial(share, partial(next, batches)), partial(share, read), "reading it oneself",
                   positive, clock="%", rounds=5)  # fmt: skip


def step_compiled() -> Iterator[Pair]:
    """The step of `step`, its blocks compiled, over itself uncompiled; compiling is not counted."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run, spec, reader = made(folder)
        sample = listed(0, spec, CLIP, captions=(caption_key(CAPTION),))
        (slots,) = load_step(reader, run.config, SigmaLaw("UNIFORM", 1.0), 0, [Draw(sample, "sample0")])
        wanted = make_run(folder / "compiled", run.config.model_copy(update={"compile": True}), folder / "s.zarr")
        ours, plain = our_step(wanted, spec, reader, slots), our_step(run, spec, reader, slots)
        yield Pair("step-compiled", ours, plain, "the same, uncompiled", near, clock="cpu", rounds=7, unit="step")


# without what only the tests install and peft imports where it finds it (2.7 s)
INSTALLED = "import sys; sys.modules['bitsandbytes'] = None\n"
OUR_START = INSTALLED + "import runpy; runpy.run_module('train', run_name='__main__', alter_sys=True)"
STOCK_START = (
    INSTALLED
    + """
import torch, torch.nn.functional as F
from diffusers import WanTransformer3DModel
from peft import LoraConfig
model = WanTransformer3DModel.from_pretrained(sys.argv[1] + "/transformer").requires_grad_(False)
model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
parts = [part for part in model.parameters() if part.requires_grad]
optimizer = torch.optim.AdamW(parts, lr=1e-3)
x = torch.randn(4, 16, 3, 4, 4)
F.mse_loss(model(x, torch.rand(4) * 1000, torch.zeros(4, 512, 16)).sample, x).backward()
optimizer.step()
"""
)


def command(*words: Any) -> Callable[[], int]:
    """Run Python with arguments to its end; the exit code."""

    def call() -> int:
        done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, check=False)
        return done.returncode

    return call


def both_end_well(ours: int, theirs: int) -> None:
    """Exit codes."""
    assert ours == theirs == 0


def start() -> Iterator[Pair]:
    """From the command to the end of a run of one step, with checkpoint and result; and a resume for one step more."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, _, store = make_all(folder / "made")
        write_json(folder / "c.json", to_json(config(model, max_steps=1)))
        common = ("-c", OUR_START, "--work", folder, "--store", store, "--config", folder / "c.json")
        runs = iter(range(1000))

        def fresh() -> int:
            return command(*common, "--run", folder / f"run{next(runs)}")()

        stock = command("-c", STOCK_START, model)
        yield Pair("start", fresh, stock, "stock imports, load, one step", both_end_well, clock="cpu", unit="start",
                   warm_up=False)  # fmt: skip
        steps = iter(range(2, 1000))
        again = (*common, "--run", folder / "run0", "--set")

        def resume() -> int:
            return command(*again, f"max_steps={next(steps)}")()

        yield Pair("resume", resume, fresh, "a fresh start", both_end_well, clock="cpu", unit="resume", warm_up=False)


ITEMS = {"step": step, "step-compiled": step_compiled, "step-demo": step_demo, "step-wait": step_wait, "start": start}
