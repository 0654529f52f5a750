"""Adapters merged into frozen weights as these are read, before they are stored: some rows at a time.

Every kind by ComfyUI's rule (comfy/weight_adapter/): W + s alpha / r B A; LoHa's Hadamard and LoKr's Kronecker product
likewise, LoKr unscaled where both factors are whole; DoRA moves W to m (W + D) / |W + D|, a norm per row, by share s;
`diff` and `diff_b` are differences of weight and bias. Cost: one product per merged matrix; memory: the factors.

Names: O outputs, I inputs of a linear layer; rows are rows of O.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from shared.errors import RunError
from shared.tensors import Place
from train.adapter_file import AdapterFile, read_adapter

Factors = dict[str, Tensor]
SETTING = "base_adapters"


class Merge:
    """What adapters do to the weights of a model; raises RunError when one was made for another model."""

    def __init__(self, adapters: Sequence[tuple[Path, float]], places: Mapping[str, Place]) -> None:
        self.of: dict[str, list[tuple[AdapterFile, str, float]]] = {}  # weight -> (file, module there, strength)
        self.now: tuple[str, list[tuple[Factors, float, float]]] = ("", [])
        for path, strength in adapters:
            file = read_adapter(path, SETTING)
            modules = {name.removesuffix(".weight") for name in places if not name.endswith(".bias")}
            for module, name in file.module_of(modules).items():
                weight = f"{name}.weight" if f"{name}.weight" in places else name
                check(file, module, places[weight].shape)
                for target in targets(file.keys[module], name, weight):
                    self.of.setdefault(target, []).append((file, module, strength))

    def rows(self, name: str, first: int, rows: Tensor) -> Tensor:
        """Rows of a weight with what is merged into it, from row `first` on."""
        if name not in self.of:
            return rows
        if self.now[0] != name:
            self.now = (name, [factors_of(file, module, name, strength) for file, module, strength in self.of[name]])
        merged = rows.float()
        for factors, scale, strength in self.now[1]:
            merged = moved(merged, factors, scale, strength, slice(first, first + len(rows)))
        return merged


def targets(parts: Mapping[str, str], name: str, weight: str) -> list[str]:
    """Weights that a module of a file changes."""
    found = [] if parts.keys() <= {"diff_b", "alpha"} else [weight]
    return found + ([f"{name}.bias"] if "diff_b" in parts else [])


def factors_of(file: AdapterFile, module: str, name: str, strength: float) -> tuple[Factors, float, float]:
    """(tensors of a module for one weight, alpha / rank, strength)."""
    bias = name.endswith(".bias")
    parts = {"diff_b"} if bias else file.keys[module].keys() - {"alpha", "diff_b"}
    factors = {part: file.part(module, part).float() for part in parts}
    rank = rank_of(factors)
    return factors, 1.0 if rank is None else file.scale(module, rank), strength


def rank_of(factors: Factors) -> int | None:
    """Rank by which alpha is divided; None where there is none to divide by."""
    for part, axis in (("lora_A", 0), ("hada_w1_b", 0), ("lokr_w2_b", 0), ("lokr_w1_b", 0)):
        if part in factors:
            return factors[part].shape[axis]
    return None


def moved(rows: Tensor, factors: Factors, scale: float, strength: float, place: slice) -> Tensor:
    """Rows of W as one adapter leaves them."""
    if difference := [factors[part] for part in ("diff", "diff_b") if part in factors]:
        return rows + strength * difference[0][place]
    change_OI = scale * update(factors, place)
    if "dora_scale" not in factors:
        return rows + strength * change_OI.view(rows.shape)
    whole_OI = rows + change_OI
    length_O1 = whole_OI.norm(dim=1, keepdim=True)
    return torch.lerp(rows, whole_OI * (factors["dora_scale"].view(-1, 1)[place] / length_O1), strength)


def update(factors: Factors, place: slice) -> Tensor:
    """Rows of the unscaled update."""
    if "lora_A" in factors:
        return factors["lora_B"].flatten(1)[place] @ factors["lora_A"].flatten(1)  # of a convolution too
    if "hada_w1_a" in factors:
        first = factors["hada_w1_a"][place] @ factors["hada_w1_b"]
        return first * (factors["hada_w2_a"][place] @ factors["hada_w2_b"])
    left, right = (kronecker_factor(factors, part) for part in ("lokr_w1", "lokr_w2"))
    start, stop = place.start // len(right), -(-min(place.stop, len(left) * len(right)) // len(right))
    block = torch.kron(left[start:stop], right)
    return block[place.start - start * len(right) :][: place.stop - place.start]


def kronecker_factor(factors: Factors, part: str) -> Tensor:
    """One of LoKr's factors, whole or as a product."""
    return factors[part] if part in factors else factors[f"{part}_a"] @ factors[f"{part}_b"]


def size_of(file: AdapterFile, module: str) -> tuple[int, int]:
    """(outputs, inputs) of the update that a complete module makes; those of a convolution's kernel are inputs."""

    def size(part: str) -> tuple[int, int]:
        tensor = file.part(module, part)
        return len(tensor), tensor.numel() // max(1, len(tensor))

    def product(left: str, right: str) -> tuple[int, int]:
        return size(left)[0], size(right)[1]

    parts = file.keys[module]
    if "lora_A" in parts:
        return product("lora_B", "lora_A")
    if "hada_w1_a" in parts:
        return product("hada_w1_a", "hada_w1_b")
    if "diff" in parts:
        return size("diff")
    first, second = (size(name) if name in parts else product(f"{name}_a", f"{name}_b")
                     for name in ("lokr_w1", "lokr_w2"))  # fmt: skip
    return first[0] * second[0], first[1] * second[1]


def check(file: AdapterFile, module: str, shape: tuple[int, ...]) -> None:
    """Raise RunError when a module's tensors are incomplete or not of the weight's shape."""
    parts = file.keys[module].keys()
    kinds = ({"lora_A", "lora_B"}, {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, {"diff"}, {"diff_b"})
    whole = any(kind <= parts for kind in kinds) or all(
        {part} <= parts or {f"{part}_a", f"{part}_b"} <= parts for part in ("lokr_w1", "lokr_w2")
    )
    if not whole:
        raise RunError(f"{SETTING}={file.path}: {module} has only {', '.join(sorted(parts))}; the file is incomplete")
    if parts - {"alpha", "diff_b"} and (found := size_of(file, module)) != (shape[0], torch.Size(shape[1:]).numel()):
        raise RunError(f"{SETTING}={file.path}: {module} is {found[0]}x{found[1]}, the model's is {tuple(shape)}; it "
                       "was made for another model")  # fmt: skip
    if "dora_scale" in parts and file.part(module, "dora_scale").numel() != shape[0]:
        raise RunError(f"{SETTING}={file.path}: {module} has DoRA magnitudes of columns; only those of rows are known")
