"""What a worker of another environment needs: one JSON line in, one JSON line out; libraries may print to stderr only.

Run by that environment's Python, so nothing of prewan is imported here.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any


def define_missing_operators() -> None:
    """PyPI's torchvision is linked to CUDA and fails to load beside a CPU torch, unless its two operators exist."""
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        KEPT.append(library)


KEPT: list[Any] = []  # a library's operators go when it does


def serve(prepare: Callable[[], tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]]]]) -> None:
    """Answer `prepare`'s facts, then each request with what its function returns."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    define_missing_operators()
    reply, work = prepare()
    print(json.dumps(reply), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(work(json.loads(line))), file=answers, flush=True)
