"""What a DiT costs at a given size: bytes and FLOPs, by running one block of it on tensors without data.

Input: model facts, config, bucket. Output: a BlockCost and a WeightCost. Nothing is downloaded, no weight is allocated;
the code that trains is the code that is measured, so no formula can fall behind it. Cost: a few seconds.

torch's fake tensors stand on the CPU here. CUDA's attention keeps the same tensors for its backward (queries, keys,
values, result, log-sum-exp), and its allocator rounds to 512 bytes, as is done here.
"""

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from shared.bucket import Bucket
from shared.config import Config
from shared.models import ModelSpec
from train.adapter import add_adapter
from train.lean import Modulation, Rope, Text, block_forward
from train.load import dit_config, hold_stored, keeps_float32
from train.quantize import TORCH_DTYPES, QuantizedLinear, stored_bytes
from train.text_encoder import empty_stack

ROUNDING = 512  # bytes; CUDA's allocator hands out multiples of it (pytorch/pytorch c10/cuda/CUDACachingAllocator.cpp)
TEXT_ROWS = 130  # rows of a caption of 128 tokens after the padding is collapsed


@dataclass(frozen=True)
class BlockCost:
    """Bytes and FLOPs of one block for one micro-batch."""

    tokens: int  # of the micro-batch
    input_bytes: int  # hidden states: what a checkpoint keeps
    shared_bytes: int  # text rows, timesteps, rotary tables: once for all blocks
    saved_bytes: int  # kept for the backward when it is not checkpointed, its output included
    peak_bytes: int  # most that is alive beyond the input, over forward and backward, once more or not
    forward_flops: int
    backward_flops: int


@dataclass(frozen=True)
class WeightCost:
    """Bytes of the weights of one expert in their storage dtypes, and the shapes that are trained."""

    blocks: int
    block_matrices: int  # of one block, what layer offload moves: codes and scales, or weights of linear layers
    block_rest: int  # of one block: biases, norms, modulation
    outside: int
    trained_per_block: tuple[torch.Size, ...]
    trained_outside: tuple[torch.Size, ...]


class Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that operations make while this is active, and forgets those that are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.known: dict[int, int] = {}

    def ignore(self, tensors: Any) -> None:
        """Tensors that exist already."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                self.known[tensor.untyped_storage()._cdata] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.known:
            self.known[key] = -(-storage.nbytes() // ROUNDING) * ROUNDING
            self.now += self.known[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self.known.pop(key)


def empty_transformer(spec: ModelSpec, config: Config, num_layers: int = 1) -> Any:
    """A DiT of `num_layers` blocks on the meta device, with the storage dtypes and the adapter of a config."""
    with torch.device("meta"):
        transformer = WanTransformer3DModel(**dit_config(spec) | {"num_layers": num_layers}).requires_grad_(False)
        train = TORCH_DTYPES[config.train_dtype]
        storage = TORCH_DTYPES.get(config.transformer.weight_dtype, train)
        fine_tune = config.trains_dit
        if config.transformer.weight_dtype != config.train_dtype and not fine_tune:
            hold_stored(transformer, config.transformer.weight_dtype)
        for name, parameter in transformer.named_parameters():
            kept = torch.float32 if keeps_float32(transformer, name) else storage if fine_tune else train
            parameter.data = parameter.data.to(kept)
        if config.training_method == "LORA":
            add_adapter(transformer, config, seed=0)
    return transformer.requires_grad_(True) if fine_tune else transformer


def to_fake(transformer: nn.Module) -> None:
    """Move a model from the meta device to fake memory; call under FakeTensorMode."""
    for module in transformer.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            fake = torch.empty(parameter.shape, dtype=parameter.dtype)
            module.register_parameter(name, nn.Parameter(fake, requires_grad=parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        if isinstance(module, QuantizedLinear) and module.storage_dtype in ("FLOAT_8", "INT_8"):
            module.storage_dtype = "FLOAT_32"  # widen codes in one operation, as a GPU does; a CPU takes hundreds


def weight_cost(spec: ModelSpec, config: Config) -> WeightCost:
    """Bytes of an expert's weights, adapters not included."""
    transformer = empty_transformer(spec, config)
    block = transformer.blocks[0]
    frozen = {id(tensor) for _, tensor in matrices_of(block)}
    inside = {id(part) for part in [*block.parameters(), *block.buffers()]}
    rest = [part for name, part in block.named_parameters() if id(part) not in frozen and ".lora_" not in name]
    outside = [part for part in [*transformer.parameters(), *transformer.buffers()] if id(part) not in inside]
    trained = [(name, part.shape) for name, part in transformer.named_parameters() if part.requires_grad]
    return WeightCost(
        blocks=int(dit_config(spec)["num_layers"]),
        block_matrices=sum(tensor.nbytes for _, tensor in matrices_of(block)),
        block_rest=sum(part.nbytes for part in rest),
        outside=sum(part.nbytes for part in outside),
        trained_per_block=tuple(shape for name, shape in trained if name.startswith("blocks.")),
        trained_outside=tuple(shape for name, shape in trained if not name.startswith("blocks.")),
    )


def matrices_of(block: nn.Module) -> list[tuple[str, Tensor]]:
    """Names and tensors of a block's frozen matrices, adapters left out: what layer offload moves."""
    found: list[tuple[str, Tensor]] = []
    for name, module in block.named_modules():
        if isinstance(module, QuantizedLinear):
            found += [
                (f"{name}.{part}", tensor) for part, tensor in module.named_buffers(recurse=False) if tensor.numel()
            ]
        elif type(module) is nn.Linear and ".lora_" not in name:
            found.append((f"{name}.weight", module.weight))
    return found


def block_cost(spec: ModelSpec, config: Config, bucket: Bucket, micro_batch: int) -> BlockCost:
    """Run one block forward and backward, without data."""
    transformer = empty_transformer(spec, config)
    with FakeTensorMode():
        to_fake(transformer)
        hidden, text, modulation, rope = block_inputs(transformer, spec, config, (bucket, micro_batch))
        autocast = config.trains_dit and config.transformer.weight_dtype != config.train_dtype
        block = transformer.blocks[0]
        for parameter in block.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)  # gradients are counted for the whole model elsewhere
        existing = [list(transformer.parameters()), list(transformer.buffers()), hidden, text, modulation, rope,
                    [part.grad for part in block.parameters() if part.grad is not None]]  # fmt: skip

        def run() -> Tensor:
            with torch.autocast("cpu", TORCH_DTYPES[config.train_dtype]) if autocast else nullcontext():
                return block_forward(block, hidden, text, modulation, rope)

        hidden.requires_grad_(True)
        text.rows_BSd.requires_grad_(config.training_method == "EMBEDDING")
        peak, saved, flops = measured(run, existing)
        return BlockCost(
            tokens=micro_batch * hidden.shape[1],
            input_bytes=hidden.nbytes,
            shared_bytes=sum(part.nbytes for part in tree_leaves([text, modulation, rope]) if isinstance(part, Tensor)),
            saved_bytes=saved,
            peak_bytes=peak + hidden.nbytes,  # with the gradient that comes in
            forward_flops=flops[0],
            backward_flops=flops[1],
        )


@dataclass(frozen=True)
class TextCost:
    """What UMT5 in the trainer takes, for one caption."""

    weights: int  # bytes on the device
    table: int  # bytes of token vectors, in RAM
    saved_bytes: int  # kept for the backward
    peak_bytes: int  # most that is alive over forward and backward
    forward_flops: int
    backward_flops: int
    trained: tuple[torch.Size, ...]


def text_cost(spec: ModelSpec, config: Config) -> TextCost:
    """Run UMT5's blocks forward and backward on a caption of usual length, without data."""
    stack, dtype, trained = empty_stack(spec), TORCH_DTYPES[config.train_dtype], config.text_encoder.train
    storage = config.text_encoder.weight_dtype
    shapes = [(name, part.shape) for name, part in stack.named_parameters()]
    linear = {f"{name}.weight" for name, part in stack.named_modules() if type(part) is nn.Linear}
    plain = TORCH_DTYPES[storage if trained else config.train_dtype].itemsize
    weights = sum(stored_bytes(shape, storage) if name in linear else shape.numel() * plain for name, shape in shapes)
    stack.to(dtype).requires_grad_(trained)
    with FakeTensorMode():
        to_fake(stack)
        for part in stack.parameters():
            part.grad = torch.zeros_like(part) if trained else None  # counted with what is trained
        grads = [part.grad for part in stack.parameters() if part.grad is not None]
        vectors_BSd = torch.empty(1, TEXT_ROWS, stack.config.d_model, dtype=dtype, requires_grad=True)
        existing = [list(stack.parameters()), list(stack.buffers()), grads, vectors_BSd]
        peak, saved, flops = measured(lambda: stack(inputs_embeds=vectors_BSd).last_hidden_state, existing)
    table = stack.config.vocab_size * stack.config.d_model * dtype.itemsize
    return TextCost(weights, table, saved, peak, *flops, tuple(shape for _, shape in shapes) if trained else ())


def measured(run: Callable[[], Tensor], existing: Any) -> tuple[int, int, tuple[int, int]]:
    """(peak bytes, bytes alive after the forward, FLOPs of forward and backward) of a computation and its gradients."""
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as forward_flops, Alive() as alive:
        alive.ignore(existing)
        result = run()
        saved = alive.now
    grad, edge = torch.ones_like(result), get_gradient_edge(result)
    del result  # as in a step, where nothing holds a block's output once the next block is through its backward
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as backward_flops, alive:
        torch.autograd.backward(edge, grad)
    return alive.peak, saved, (forward_flops.get_total_flops(), backward_flops.get_total_flops())


def block_inputs(
    transformer: Any, spec: ModelSpec, config: Config, batch: tuple[Bucket, int]
) -> tuple[Tensor, Text, Modulation, Rope]:
    """Hidden states and what all blocks share, of a micro-batch of video samples."""
    bucket, size = batch
    _, frames, height, width = spec.latent_shape(bucket.num_frames, bucket.height, bucket.width)
    tokens = frames * (height // spec.patch_THW[1]) * (width // spec.patch_THW[2])
    dtype = TORCH_DTYPES[config.train_dtype]
    rows = Text(torch.empty(size, TEXT_ROWS, spec.dim, dtype=dtype), torch.empty(size, 1, 1, TEXT_ROWS, dtype=dtype))
    table = torch.empty(tokens, 1, spec.head_dim // 2, dtype=transformer.rope.freqs_cos.dtype)
    first_frame = config.first_frame_conditioning_probability > 0  # its tokens have a timestep of their own
    modulation = Modulation(torch.empty(size, 1 + first_frame, 6, spec.dim, dtype=dtype),
                            torch.zeros(tokens, dtype=torch.long) if first_frame else None)  # fmt: skip
    span = tokens if config.video_config.use_temporal_attention else tokens // frames
    return (
        torch.empty(size, tokens, spec.dim, dtype=dtype),
        rows,
        modulation,
        Rope(torch.stack((table, table), dim=-1), span),
    )


def _addmm_flops(into: Any, left: Any, right: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(2 * left[0] * left[1] * right[1])


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attention_backward_flops(grad: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None,
                              **kwargs: Any) -> int:  # fmt: skip
    return int(sdpa_backward_flop_count(grad, query, key, value))  # type: ignore[no-untyped-call]


# what torch's counter passes over: the CPU's attention kernels, products added in place
UNCOUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    torch.ops.aten.addmm_: _addmm_flops,
}
