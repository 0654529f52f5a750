"""Regional torch.compile of the blocks (`compile: true`): one graph that all blocks share, never a cause of failure.

What is compiled is kept on disk, so that the next run starts with it. A new kind of input (another bucket, another
number of text rows for the first time) is compiled when it comes. Results agree with the uncompiled ones to rounding; a
run that goes on may take other kernels for its first steps, so resuming is bit-equal without it only.
"""

import os
import sys
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from shared.files import kept_folder
from train.lean import block_forward

VARIANTS = 64  # graphs of a block: kinds of inputs, with and without gradients


class CompiledBlock:
    """`block_forward`, compiled at its first use; where that fails it is said once, and blocks run as they are."""

    def __init__(self, backend: Any = "inductor") -> None:
        # torch's own place is cleared at each boot
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(kept_folder() / "compiled"))
        torch._dynamo.config.recompile_limit = VARIANTS
        self.run: Any = torch.compile(block_forward, backend=backend)

    def __call__(self, *arguments: Any) -> Tensor:
        """What `block_forward` returns."""
        try:
            result: Tensor = self.run(*arguments)
        except TorchDynamoException as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            print(f"compile: torch.compile failed here ({reason}); the run goes on uncompiled", file=sys.stderr)
            self.run = block_forward
            result = block_forward(*arguments)
        return result
