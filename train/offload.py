"""Blocks that live in RAM and visit the device, and block inputs that wait in RAM for the backward.

Input: a loaded DiT on the CPU and a Placement. Output: the same DiT on the device, and a `run_block` for lean.py.
Frozen matrices of streamed blocks stay in one flat pinned buffer per block, in their storage dtype, and are copied to
one of two device buffers on a side stream while other blocks compute: forward, and in reverse in the backward, where a
streamed block is computed again. Nothing frozen is ever copied back. Norms, biases, modulation and adapters stay on the
device: an operation may read them again in the backward. The numbers are those of fraction 0, bit for bit.

On the CPU the same code runs; streams and events are then absent.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from train.lean import block_forward
from train.memory import SLOTS, Placement
from train.quantize import QuantizedLinear, Stored, dtype_name, replace_module

Result = TypeVar("Result")
ALIGNMENT = 256  # bytes; what vectorised kernels and dtype views ask of an address
PARKED_CELLS = 1 << 20  # smaller inputs are not worth a copy


class Piece(NamedTuple):
    """Where a buffer of a module lies in its block's bytes."""

    module: QuantizedLinear
    name: str
    start: int
    size: int
    dtype: torch.dtype
    shape: torch.Size


@dataclass(frozen=True)
class HostBlock:
    """The frozen matrices of one block in RAM."""

    bytes: Tensor  # flat uint8, pinned when the device is a GPU
    pieces: tuple[Piece, ...]


def place(transformer: Any, placement: Placement, parked: bool, device: torch.device) -> "BlockRunner":
    """Move a DiT to the device, its streamed blocks' matrices to pinned RAM; returns what runs its blocks.

    Streamed blocks are spread evenly, so that each copy has several blocks' time, and are always computed again; of the
    others, the leading ones.
    """
    blocks = transformer.blocks
    streamed = spread(placement.streamed, len(blocks))
    hosts = {index: to_host(blocks[index], device) for index in streamed}
    transformer.to(device)
    kept = [index for index in range(len(blocks)) if index not in hosts]
    again = {*streamed, *kept[: placement.recomputed - len(streamed)]}
    ring = Ring(hosts, device) if hosts else None
    return BlockRunner(blocks, again, ring, Parking(device) if parked else None, device)


def spread(count: int, blocks: int) -> list[int]:
    """`count` of `blocks` indices, evenly spaced, in order."""
    return [number * blocks // count for number in range(count)]


def to_host(block: nn.Module, device: torch.device) -> HostBlock:
    """Take a block's frozen matrices out of it, into one flat buffer. What is left in their place is empty."""
    stored_linears(block)
    pieces: list[Piece] = []
    start = 0
    for module in block.modules():
        if isinstance(module, QuantizedLinear):
            for name, tensor in module.named_buffers(recurse=False):
                pieces.append(Piece(module, name, start, tensor.nbytes, tensor.dtype, tensor.shape))
                start += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    flat = torch.empty(start, dtype=torch.uint8)
    for piece in pieces:
        piece_of(flat, piece).copy_(piece.module.get_buffer(piece.name))
        piece.module._buffers[piece.name] = piece.module.get_buffer(piece.name).new_empty(0)
    for codes, scale in zip(pieces[0::2], pieces[1::2], strict=True):
        codes.module.away = Stored(piece_of(flat, codes), piece_of(flat, scale))
    if device.type == "cuda":
        pin(flat)
    return HostBlock(flat, tuple(pieces))


def stored_linears(block: nn.Module) -> None:
    """Make every plain frozen linear layer a stored one of its own dtype, so that all matrices are buffers."""
    for name, linear in list(block.named_modules()):
        if type(linear) is nn.Linear and ".lora_" not in name:
            weight = linear.weight.detach()
            shape = (linear.out_features, linear.in_features)
            stored = Stored(weight, weight.new_empty(0, dtype=torch.float32))
            replace_module(block, name, QuantizedLinear(stored, shape, dtype_name(weight.dtype), linear.bias))


def piece_of(flat: Tensor, piece: Piece) -> Tensor:
    """View of a buffer in the bytes of a block."""
    return flat[piece.start : piece.start + piece.size].view(piece.dtype).view(piece.shape)


def pin(flat: Tensor) -> None:
    """Lock pages in RAM. torch's own pinned allocator would round the size up to a power of two."""
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    torch.cuda.check_error(int(cudart.cudaHostRegister(flat.data_ptr(), flat.nbytes, 0)))
    weakref.finalize(flat.untyped_storage(), cudart.cudaHostUnregister, flat.data_ptr())


def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream for copies; none on the CPU."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


class Ring:
    """Two device buffers through which streamed blocks pass; at most one copy is ahead of the computation."""

    def __init__(self, hosts: dict[int, HostBlock], device: torch.device) -> None:
        self.hosts, self.order = hosts, sorted(hosts)
        size = max(host.bytes.numel() for host in hosts.values())
        self.slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(min(SLOTS, len(hosts)))]
        self.held: list[int | None] = [None] * len(self.slots)
        self.side = side_stream(device)
        self.ready: list[torch.cuda.Event | None] = [None] * len(self.slots)
        self.copies = 0

    def load(self, index: int, backward: bool) -> None:
        """Give a block its matrices, and start the copy of the block that comes after it."""
        if index not in self.held:
            self._copy(index, self.held.index(None) if None in self.held else self._furthest(index))
        slot = self.held.index(index)
        if self.side is not None and self.ready[slot] is not None:
            torch.cuda.current_stream().wait_event(self.ready[slot])  # type: ignore[arg-type]
        for piece in self.hosts[index].pieces:
            piece.module._buffers[piece.name] = piece_of(self.slots[slot], piece)
        place_in_order = self.order.index(index) + (-1 if backward else 1)
        if 0 <= place_in_order < len(self.order) and (following := self.order[place_in_order]) not in self.held:
            self._copy(following, slot=1 - slot)

    def release(self) -> None:
        """Take the matrices out of the blocks, so that the buffers can be freed."""
        for host in self.hosts.values():
            for piece in host.pieces:
                piece.module._buffers[piece.name] = piece.module.get_buffer(piece.name).new_empty(0)

    def _furthest(self, index: int) -> int:
        """The slot whose block is further from `index`: the other one may be what comes next."""
        return max(range(len(self.held)), key=lambda slot: abs((self.held[slot] or 0) - index))

    def _copy(self, index: int, slot: int) -> None:
        """Start filling a slot once the kernels that were queued so far, its last readers, are through."""
        source = self.hosts[index].bytes
        target = self.slots[slot][: source.numel()]
        self.held[slot] = index
        self.copies += 1
        if self.side is None:
            target.copy_(source)
            return
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            target.copy_(source, non_blocking=True)
            self.ready[slot] = self.side.record_event()


class Parking:
    """Saved-tensor hooks: block inputs go to pinned RAM on a side stream and come back one block early."""

    def __init__(self, device: torch.device, least: int = PARKED_CELLS) -> None:
        self.device, self.least = device, least
        self.side = side_stream(device)
        self.waiting: list[ParkedInput] = []

    def hooks(self) -> AbstractContextManager[Any]:
        """Around the call of a checkpointed block."""
        return torch.autograd.graph.saved_tensors_hooks(self.park, self.fetch)

    def park(self, saved: Tensor) -> "Tensor | ParkedInput":
        """Send a large tensor to RAM; small ones, which blocks share, stay."""
        if saved.numel() < self.least or isinstance(saved, nn.Parameter):
            return saved
        host = torch.empty(saved.shape, dtype=saved.dtype, pin_memory=self.side is not None)
        with self._beside():
            host.copy_(saved, non_blocking=True)
            if self.side is not None:
                saved.record_stream(self.side)  # its memory is not handed out before the copy is done
        self.waiting.append(ParkedInput(host))
        return self.waiting[-1]

    def fetch(self, parked: "Tensor | ParkedInput") -> Tensor:
        """Back on the device; the input of the block before it starts its way."""
        if isinstance(parked, Tensor):
            return parked
        self._start(parked)
        tensor, parked.tensor = parked.tensor, None
        if parked in self.waiting:
            self.waiting.remove(parked)
        if self.waiting:
            self._start(self.waiting[-1])
        if parked.ready is not None:
            torch.cuda.current_stream().wait_event(parked.ready)
        assert tensor is not None
        if self.side is not None:
            tensor.record_stream(torch.cuda.current_stream())
        return tensor

    def _start(self, parked: "ParkedInput") -> None:
        if parked.tensor is None:
            with self._beside():
                parked.tensor = parked.host.to(self.device, non_blocking=True)
                parked.ready = self.side.record_event() if self.side is not None else None

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """On the side stream, after what is queued now."""
        if self.side is None:
            yield
            return
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            yield


@dataclass(eq=False)
class ParkedInput:
    """A tensor in RAM, and on the device once its way back has begun."""

    host: Tensor
    tensor: Tensor | None = None
    ready: torch.cuda.Event | None = None


@dataclass
class BlockRunner:
    """Runs the blocks of one DiT as placed; give it to lean.py as `run_block`."""

    blocks: nn.ModuleList
    recomputed: set[int]
    ring: Ring | None
    parking: Parking | None
    device: torch.device
    may_stream_more: bool = False

    def __post_init__(self) -> None:
        self.numbers = {id(block): index for index, block in enumerate(self.blocks)}

    def __call__(self, block: Any, *arguments: Any) -> Tensor:
        """What `block_forward` returns."""
        index = self.numbers[id(block)]
        if not torch.is_grad_enabled() or index not in self.recomputed:
            return self._run(index, block, arguments, backward=False)
        directions = iter((False, True))  # checkpoint calls it once in the forward and once in the backward

        def run(hidden_BNd: Tensor) -> Tensor:
            return self._run(index, block, (hidden_BNd, *arguments[1:]), backward=next(directions, True))

        with self.parking.hooks() if self.parking is not None else nullcontext():
            result: Tensor = checkpoint(run, arguments[0], use_reentrant=False)
        return result

    def _run(self, index: int, block: Any, arguments: tuple[Any, ...], backward: bool) -> Tensor:
        if self.ring is not None and index in self.ring.hosts:
            self.ring.load(index, backward)
        run: Callable[..., Tensor] = block_forward
        return run(block, *arguments)

    def stream_more(self) -> bool:
        """After the device ran out of memory: compute every block again, then stream a few more; False when all are."""
        if self.parking is not None:
            self.parking.waiting.clear()
        streamed = set(self.ring.hosts) if self.ring is not None else set()
        kept = [index for index in range(len(self.blocks)) if index not in streamed]
        if not self.may_stream_more or not kept:
            return False
        self.recomputed = set(range(len(self.blocks)))
        moved = kept[:: -(-len(kept) // max(SLOTS + 1, len(self.blocks) // 8))]
        hosts = {index: to_host(self.blocks[index], self.device) for index in moved}
        if self.ring is not None:
            hosts |= self.ring.hosts
            self.ring.release()
        self.ring = Ring(hosts, self.device)
        return True


def with_room(attempt: Callable[[], Result], make_room: Callable[[], bool]) -> Result:
    """The result of `attempt`; when the device runs out of memory and room can be made, of one more attempt."""
    try:
        return attempt()
    except torch.OutOfMemoryError:
        if not make_room():
            raise
    torch.cuda.empty_cache()  # what the failed attempt held is free once its exception is gone
    return attempt()
