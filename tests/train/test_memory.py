"""Laws of the plan: counts of the real models, FLOPs as torch counts them, bytes as a real step takes them."""

from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch.utils.flop_counter import FlopCounterMode

from shared.bucket import Bucket
from shared.config import Config
from shared.errors import RunError
from shared.models import SPECS, WAN21_VAE, ModelSpec
from shared.resolve import Choice, resolve
from train.blockwise import held_states
from train.dryrun import UNCOUNTED, Alive, block_cost, block_inputs, empty_transformer, weight_cost
from train.fit import refuse_if_too_large, ways_to_fit, with_setting
from train.lean import LeanOptions, Text, lean_forward
from train.load import dit_config
from train.memory import (
    GIB,
    Placement,
    Room,
    add_up,
    block_cost_of,
    largest_bucket,
    placements,
    plan_memory,
    weight_cost_of,
)
from train.optim import make_optimizer
from train.plan import report, table
from train.states import trained_bytes, update_bytes

SMALL = ModelSpec("small", "small", WAN21_VAE, fps=16, heads=4, head_dim=32, ffn_dim=320, num_layers=4, in_channels=16,
                  text_dim=64)  # fmt: skip
BUCKET = Bucket(9, 96, 128)  # 144 tokens of the small model
ANY = Room(None)


def config(**values: object) -> Config:
    return Config(lora_rank=4, resolution="128x96", frames=9, **values)


def real_transformer(cfg: Config, layers: int) -> WanTransformer3DModel:
    torch.manual_seed(0)
    transformer = empty_transformer(SMALL, cfg, layers).to_empty(device="cpu")
    transformer.rope = WanTransformer3DModel(**dit_config(SMALL) | {"num_layers": 1}).rope
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return transformer


@pytest.mark.parametrize(("name", "count"), [("ti2v-5b", 4_999_787_712), ("t2v-a14b", 14_288_491_584),
                                             ("i2v-a14b", 14_288_901_184), ("t2v-1.3b", 1_418_996_800)])  # fmt: skip
def test_parameter_counts_are_those_of_the_published_models(name: str, count: int) -> None:
    with torch.device("meta"):
        model = WanTransformer3DModel(**dit_config(SPECS[name]))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("dtype", ["BFLOAT_16", "FLOAT_8", "INT_8", "NFLOAT_4"])
def test_weight_bytes_are_those_of_a_real_model(dtype: str) -> None:
    cfg = config(transformer={"weight_dtype": dtype})
    cost = weight_cost(SMALL, cfg)
    with torch.device("meta"):
        state = empty_transformer(SMALL, cfg, SMALL.num_layers)
    parts = [(name, part.nbytes) for name, part in [*state.named_parameters(), *state.named_buffers()]]
    assert cost.blocks * (cost.block_matrices + cost.block_rest) + cost.outside == sum(
        size for name, size in parts if ".lora_" not in name
    )


def test_forward_flops_follow_the_formula() -> None:
    # per block: linears on N tokens, keys and values of S text rows, two attentions (2 FLOPs per multiply-add)
    cfg = config(training_method="EMBEDDING")
    cost = block_cost(SMALL, cfg, BUCKET, 2)
    batch, tokens, rows, dim, ffn = 2, 144, 130, SMALL.dim, SMALL.ffn_dim
    linears = 2 * tokens * (6 * dim**2 + 2 * dim * ffn) + 2 * rows * 2 * dim**2
    attention = 4 * tokens**2 * dim + 4 * tokens * rows * dim
    assert cost.tokens == batch * tokens
    assert cost.forward_flops == batch * (linears + attention)


def test_flops_are_those_torch_counts_in_a_real_step() -> None:
    cfg = config(train_dtype="FLOAT_32", transformer={"weight_dtype": "FLOAT_32"})
    transformer = real_transformer(cfg, 2)
    hidden, text, modulation, rope = block_inputs(transformer, SMALL, cfg, (BUCKET, 1))
    del hidden, modulation, rope
    latent = torch.randn(1, *SMALL.latent_shape(9, 96, 128))
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        velocity = lean_forward(transformer, latent, torch.tensor([500.0]), Text(torch.randn_like(text.rows_BSd), None))
        velocity.square().mean().backward()
    cost = block_cost(SMALL, cfg, BUCKET, 1)
    # the first block's input needs no gradient, and embedding, time and head are counted in the real step only
    assert 2 * (cost.forward_flops + cost.backward_flops) == pytest.approx(counter.get_total_flops(), rel=0.08)


@pytest.mark.parametrize(("dtype", "recomputed"), [("FLOAT_32", 0), ("FLOAT_32", 2), ("FLOAT_32", 4), ("FLOAT_8", 4)])
def test_bytes_of_a_real_step_are_within_ten_percent(dtype: str, recomputed: int) -> None:
    cfg = config(train_dtype="FLOAT_32", transformer={"weight_dtype": dtype}, gradient_checkpointing="DEFAULT")
    transformer = real_transformer(cfg, SMALL.num_layers)
    _, text, *_ = block_inputs(transformer, SMALL, cfg, (BUCKET, 2))
    rows = Text(torch.randn_like(text.rows_BSd), torch.zeros_like(text.bias_B11S))
    latent = torch.randn(2, *SMALL.latent_shape(9, 96, 128))
    for parameter in transformer.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    alive = Alive()
    alive.ignore([list(transformer.parameters()), list(transformer.buffers()), latent, list(rows),
                  [p.grad for p in transformer.parameters() if p.grad is not None]])  # fmt: skip
    with alive:
        options = LeanOptions(checkpoint_blocks=recomputed)
        velocity = lean_forward(transformer, latent, torch.tensor([500.0, 20.0]), rows, options=options)
        velocity.square().mean().backward()
    costs = weight_cost_of(SMALL, cfg), block_cost(SMALL, cfg, BUCKET, 2)
    plan = add_up(with_setting(cfg, "batch_size", 2), SMALL, costs, (BUCKET, Placement(0, recomputed)), ANY)
    predicted = sum(plan.device[row] for row in ("activations", "workspace of a block", "latents of a batch"))
    assert predicted == pytest.approx(alive.peak, rel=0.10)


def test_auto_takes_the_first_placement_that_fits() -> None:
    cfg, bucket = config(layer_offload_fraction="AUTO", gradient_checkpointing="DEFAULT"), BUCKET
    costs = weight_cost_of(SMALL, cfg), block_cost_of(SMALL, cfg, bucket)
    needs = [add_up(cfg, SMALL, costs, (bucket, placement), ANY).need for placement in placements(cfg, 4)]
    assert [Placement(0, 0), Placement(0, 4), Placement(1, 4), Placement(4, 4)] == [
        placement for number, placement in enumerate(placements(cfg, 4)) if number in (0, 4, 5, 8)
    ]
    for budget in (needs[0], needs[3], needs[3] - 1):
        plan = plan_memory(cfg, SMALL, bucket, Room(budget))
        assert plan.need <= budget
        assert plan.placement == next(p for p, need in zip(placements(cfg, 4), needs, strict=True) if need <= budget)


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.8, 1.0])
def test_a_fraction_that_is_asked_for_is_kept(fraction: float) -> None:
    cfg = config(layer_offload_fraction=fraction, gradient_checkpointing="NONE")
    assert list(placements(cfg, 30)) == [Placement(round(30 * fraction), round(30 * fraction))]


RAM_LIMITS = {"8gb": 16, "16gb": 32, "24gb": 32, "embedding": 32}


@pytest.mark.parametrize("preset", RAM_LIMITS)
@pytest.mark.parametrize("model", ["ti2v-5b", "t2v-a14b", "i2v-a14b"])
def test_presets_fit_their_card_and_ram(preset: str, model: str) -> None:
    cfg = resolve(Choice(preset, None, model)).config
    card = int(preset.removesuffix("gb")) if preset.endswith("gb") else 16
    plan = plan_memory(cfg, SPECS[model], largest_bucket(cfg, SPECS[model]), Room(card * GIB))
    assert plan.fits
    assert plan.ram <= RAM_LIMITS[preset] * GIB


@pytest.mark.parametrize("card", [16, 24])
def test_81_frames_at_512_of_an_a14b_expert_are_predicted_to_fit(card: int) -> None:
    cfg = resolve(Choice("16gb", None, "t2v-a14b", "frames=81 resolution=512x512 batch_size=1")).config
    assert plan_memory(cfg, SPECS["t2v-a14b"], Bucket(81, 512, 512), Room(card * GIB)).fits


def test_a_run_that_does_not_fit_is_refused_with_changes_that_do() -> None:
    spec = SPECS["t2v-a14b"]
    cfg = resolve(Choice("16gb", None, "t2v-a14b", "layer_offload_fraction=0")).config
    plan = plan_memory(cfg, spec, largest_bucket(cfg, spec), Room(16 * GIB))
    with pytest.raises(RunError, match=r"needs \d+\.\d GiB, the device has 16\.0 GiB; it fits with SET="):
        refuse_if_too_large(plan, cfg, spec)
    ways = ways_to_fit(cfg, spec, Room(16 * GIB))
    assert len(ways) == 2
    for way in ways:
        changed = resolve(Choice("16gb", None, "t2v-a14b", f"layer_offload_fraction=0 {way}")).config
        assert plan_memory(changed, spec, largest_bucket(changed, spec), Room(16 * GIB)).fits


def test_the_report_ends_in_a_verdict_and_downloads_nothing() -> None:
    lines = report(resolve(Choice("8gb", None, "t2v-a14b", "max_steps=100")), None, 100, 20)
    assert lines[-1].startswith("verdict: fits the 8 GiB card")
    assert any(line.startswith("  AUTO chose") for line in lines)
    assert any("steps: 100" in line for line in lines)
    tight = report(resolve(Choice("24gb", None, "t2v-a14b", "layer_offload_fraction=0.1")), 24.0, None, None)
    assert "does not fit" in tight[-1]
    assert "SET=" in tight[-1]


def test_the_readmes_table_is_what_the_plan_says() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert "\n\n" + "\n".join(table()) + "\n\n" in readme


@pytest.mark.parametrize(
    ("optimizer", "card"), [("ADAFACTOR", 24), ("ADAMW_8BIT", 24), ("ADAFACTOR", 16), ("ADAMW_8BIT", 16)]
)
def test_a_full_fine_tune_of_the_5b_model_is_predicted_to_fit(optimizer: str, card: int) -> None:
    resolved = resolve(Choice("24gb-finetune", None, None, f"batch_size=1 optimizer.name={optimizer}"))
    plan = plan_memory(resolved.config, resolved.spec, largest_bucket(resolved.config, resolved.spec), Room(card * GIB))
    assert plan.fits
    assert plan.ram < 32 * GIB
    assert (plan.placement.streamed > 0) == (optimizer == "ADAMW_8BIT" and card == 16)


def test_streaming_a_full_fine_tune_moves_bytes_to_ram_and_loses_none() -> None:
    for clip in ("GLOBAL", "BLOCK"):
        cfg = resolve(Choice("24gb-finetune", None, None, f"clip={clip} optimizer.name=ADAMW ema=0.9")).config
        weights = weight_cost_of(SPECS["ti2v-5b"], cfg)
        device, host = trained_bytes(cfg, weights, 0)
        less, more = trained_bytes(cfg, weights, 10)
        assert sum(host.values()) == 0
        slots = trained_bytes(cfg, weights, 11)[0]
        saved = [(each["optimizer"], each["averages"]) for each in (less, slots)]
        assert saved[0][0] - saved[1][0] == more["optimizer of streamed blocks"] // 10
        assert device["averages"] == less["averages"] + more["averages of streamed blocks"]
        assert (more["gradients of streamed blocks"] > 0) == (clip == "GLOBAL")
        assert (device["gradients"] > 9 * GIB) == (clip == "GLOBAL")
    assert "inside the backward" in "\n".join(report(resolve(Choice("24gb-finetune")), 24.0, None, None))
    assert "gradients take 9.1 GiB less" in "\n".join(
        report(resolve(Choice("24gb-finetune", None, None, "clip=GLOBAL")), 24.0, None, None)
    )


@pytest.mark.parametrize("optimizer", ["ADAMW", "ADAFACTOR", "LION"])
@pytest.mark.parametrize("rounding", ["STOCHASTIC", "KAHAN"])
def test_bytes_alive_in_an_update_are_those_predicted(optimizer: str, rounding: str) -> None:
    cfg = config(training_method="FINE_TUNE", optimizer={"name": optimizer, "rounding": rounding})
    cost = weight_cost_of(SMALL, cfg)
    largest = max((*cost.trained_per_block, *cost.trained_outside), key=torch.Size.numel)
    parts = {str(number): torch.nn.Parameter(torch.randn(largest).bfloat16()) for number in range(2)}
    made = make_optimizer(cfg, parts)
    for _ in range(2):
        for part in parts.values():
            part.grad = torch.randn_like(part)
        alive = Alive()
        alive.ignore([[part, part.grad] for part in parts.values()])
        alive.ignore([list(held.values()) for held in held_states(made)])
        with torch.no_grad(), alive:
            made.step()
    assert alive.peak == pytest.approx(update_bytes(cfg, cost), rel=0.05)
