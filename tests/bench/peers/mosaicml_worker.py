"""mosaicml-streaming in its own environment: write MDS shards of the latents, then read batches of them.

Usage: python mosaicml_worker.py FOLDER, with latents.npy.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from protocol import serve


def prepare() -> tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]]]:
    import numpy as np
    from streaming import MDSWriter, StreamingDataset

    folder = Path(sys.argv[1])
    latents = np.load(folder / "latents.npy", mmap_mode="r")
    kind = f"ndarray:{latents.dtype.name}:{','.join(map(str, latents.shape[1:]))}"
    with MDSWriter(out=str(folder / "mds"), columns={"latent": kind}) as writer:
        for latent in latents:
            writer.write({"latent": np.asarray(latent)})
    samples = StreamingDataset(local=str(folder / "mds"), shuffle=False, batch_size=1)

    def read(request: dict[str, Any]) -> dict[str, Any]:
        order, size = request["order"], request["batch"]
        corners: list[float] = []
        for first in range(0, len(order), size):
            batch = np.stack([samples[number]["latent"] for number in order[first : first + size]])
            corners += batch[:, 0, 0, 0, 0].astype(float).tolist()
        return {"corners": corners}

    return {}, read


serve(prepare)
