"""Blocks that live in RAM and visit the device, and block inputs that wait in RAM for the backward.

Input: a loaded DiT on the CPU and a Placement. Output: the same DiT on the device, and a `run_block` for lean.py.
Matrices of streamed blocks stay in one flat pinned buffer per block, in their storage dtype, and are copied to one of
two device buffers on a side stream while other blocks compute: forward, and in reverse in the backward, where a
streamed block is computed again. Nothing frozen is ever copied back; what a full fine-tune changes is (blockwise.py
says when). Norms, biases, modulation and adapters stay on the device: an operation may read them again in the backward.
The numbers are those of fraction 0, bit for bit.

On the CPU the same code runs; streams and events are then absent.
"""

import weakref
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shared.codes import Stored
from train.lean import block_forward
from train.memory import Placement
from train.quantize import QuantizedLinear, dtype_name, replace_module
from train.states import SLOTS

Result = TypeVar("Result")
ALIGNMENT = 256  # bytes; what vectorised kernels and dtype views ask of an address
PARKED_CELLS = 1 << 20  # smaller inputs are not worth a copy


Owner = MutableMapping[str, Any] | nn.Parameter


class Piece(NamedTuple):
    """Where a tensor lies in its block's bytes, and who holds it: a mapping under `name`, or a parameter."""

    owner: Owner
    name: str
    start: int
    size: int
    dtype: torch.dtype
    shape: torch.Size

    def give(self, tensor: Tensor) -> None:
        """Let the owner hold this tensor."""
        if isinstance(self.owner, nn.Parameter):
            self.owner.data = tensor
        else:
            self.owner[self.name] = tensor


@dataclass(frozen=True)
class HostBlock:
    """Tensors of one block in RAM. Owners of what changes hold views of it while it is not on the device; owners of
    what is frozen hold nothing then, so that reading it outside its turn fails."""

    bytes: Tensor  # flat uint8, pinned when the device is a GPU
    pieces: tuple[Piece, ...]
    changes: bool

    def take_away(self, device: torch.device) -> None:
        """Take the tensors from the device."""
        for piece in self.pieces:
            piece.give(
                piece_of(self.bytes, piece) if self.changes else torch.empty(0, dtype=piece.dtype, device=device)
            )


def place(
    transformer: Any,
    placement: Placement,
    parked: bool,
    device: torch.device,
    trained: bool = False,
    moved: bool = True,
) -> "BlockRunner":
    """Move a DiT to the device, its streamed blocks' matrices to pinned RAM; returns what runs its blocks.

    Streamed blocks are spread evenly, so that each copy has several blocks' time, and are always computed again; of the
    others, the leading ones. `trained`: the matrices themselves are, so that they change. `moved`: else what stays on
    the device is left where it is, to be divided first (shard.py).
    """
    blocks = transformer.blocks
    streamed = spread(placement.streamed, len(blocks))
    hosts = {index: to_host(blocks[index], device, trained) for index in streamed}
    if moved:
        transformer.to(device)
    for host in hosts.values():
        host.take_away(device)
    kept = [index for index in range(len(blocks)) if index not in hosts]
    again = {*streamed, *kept[: placement.recomputed - len(streamed)]}
    ring = Ring(hosts, device) if hosts else None
    return BlockRunner(blocks, again, ring, Parking(device) if parked else None, device, trained)


def spread(count: int, blocks: int) -> list[int]:
    """`count` of `blocks` indices, evenly spaced, in order."""
    return [number * blocks // count for number in range(count)]


def to_host(block: nn.Module, device: torch.device, trained: bool) -> HostBlock:
    """Take a block's matrices out of it, into one flat buffer. What is left in their place is empty."""
    tensors: list[tuple[Owner, str, Tensor]]
    if trained:
        weights = [cast(nn.Parameter, module.weight) for module in block.modules() if type(module) is nn.Linear]
        tensors = [(weight, "", weight.data) for weight in weights]
        return pack(tensors, device, changes=True)
    stored_linears(block)
    linears = [module for module in block.modules() if isinstance(module, QuantizedLinear)]
    tensors = [(module._buffers, name, part) for module in linears
               for name, part in module.named_buffers(recurse=False)]  # fmt: skip
    host = pack(tensors, device, changes=False)
    for module, codes, scale in zip(linears, host.pieces[0::2], host.pieces[1::2], strict=True):
        module.away = Stored(piece_of(host.bytes, codes), piece_of(host.bytes, scale))
    return host


def pack(tensors: Sequence[tuple[Owner, str, Tensor]], device: torch.device, changes: bool) -> HostBlock:
    """Copy tensors into one flat buffer in RAM; their owners hold empty ones from then on."""
    pieces, start = [], 0
    for owner, name, tensor in tensors:
        pieces.append(Piece(owner, name, start, tensor.nbytes, tensor.dtype, tensor.shape))
        start += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    flat = torch.empty(start, dtype=torch.uint8)
    for piece, (_, _, tensor) in zip(pieces, tensors, strict=True):
        piece_of(flat, piece).copy_(tensor)
        piece.give(tensor.new_empty(0))
    if device.type == "cuda":
        pin(flat)
    return HostBlock(flat, tuple(pieces), changes)


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
        self.hosts, self.order, self.device = hosts, sorted(hosts), device
        size = max(host.bytes.numel() for host in hosts.values())
        self.slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(min(SLOTS, len(hosts)))]
        self.held: list[int | None] = [None] * len(self.slots)
        self.side, self.back = side_stream(device), side_stream(device)
        self.ready: list[torch.cuda.Event | None] = [None] * len(self.slots)
        self.written: list[torch.cuda.Event | None] = [None] * len(self.slots)
        self.copies = 0

    def load(self, index: int, backward: bool) -> None:
        """Give a block its tensors, and start the copy of the block that comes after it."""
        if index not in self.held:
            self._copy(index, self._free_slot(index))
        self._give(index)
        place_in_order = self.order.index(index) + (-1 if backward else 1)
        if 0 <= place_in_order < len(self.order) and (following := self.order[place_in_order]) not in self.held:
            self._copy(following, slot=1 - self.held.index(index))

    def open(self, index: int) -> None:
        """Give a block room for tensors, whose values are still to be made."""
        if index not in self.held:
            slot = self._free_slot(index)
            self._empty(slot, index)
            self.ready[slot] = self.written[slot]
        self._give(index)

    def store(self, index: int) -> None:
        """Start copying a block that was changed on the device back to RAM."""
        slot = self.held.index(index)
        target = self.hosts[index].bytes
        source = self.slots[slot][: target.numel()]
        if self.back is None:
            target.copy_(source)
            return
        self.back.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.back):
            target.copy_(source, non_blocking=True)
            self.written[slot] = self.back.record_event()

    def settle(self) -> None:
        """Wait until all that was stored is in RAM."""
        if self.back is not None:
            self.back.synchronize()

    def release(self) -> None:
        """Take the tensors out of the blocks, so that the buffers can be freed."""
        self.settle()
        for host in self.hosts.values():
            host.take_away(self.device)

    def _give(self, index: int) -> None:
        slot = self.held.index(index)
        if self.side is not None and self.ready[slot] is not None:
            torch.cuda.current_stream().wait_event(self.ready[slot])  # type: ignore[arg-type]
        for piece in self.hosts[index].pieces:
            piece.give(piece_of(self.slots[slot], piece))

    def _free_slot(self, index: int) -> int:
        """An empty slot, or the one whose block is further from `index`: the other one may be what comes next."""
        if None in self.held:
            return self.held.index(None)
        return max(range(len(self.held)), key=lambda slot: abs((self.held[slot] or 0) - index))

    def _empty(self, slot: int, index: int) -> None:
        """Hand a slot from the block that is in it to another."""
        if (before := self.held[slot]) is not None:
            self.hosts[before].take_away(self.device)
        self.held[slot] = index

    def _copy(self, index: int, slot: int) -> None:
        """Start filling a slot once the kernels that were queued so far, its last readers, are through."""
        source = self.hosts[index].bytes
        target = self.slots[slot][: source.numel()]
        self._empty(slot, index)
        self.copies += 1
        if self.side is None:
            target.copy_(source)
            return
        self.side.wait_stream(torch.cuda.current_stream())
        if (written := self.written[slot]) is not None:
            self.side.wait_event(written)
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
    trained: bool = False  # the blocks' own matrices are
    may_stream_more: bool = False
    forward: Callable[..., Tensor] = block_forward

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
        return self.forward(block, *arguments)

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
        hosts = {index: to_host(self.blocks[index], self.device, self.trained) for index in moved}
        for host in hosts.values():
            host.take_away(self.device)
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
