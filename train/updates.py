"""When the updates of a full fine-tune are made: block by block, and inside the backward, or all at the end."""

import os

from shared.config import Config

SEPARABLE = ("ADAMW", "ADAMW_8BIT", "ADAFACTOR", "LION", "CAME")  # the update of a tensor depends on it alone


def is_blockwise(config: Config) -> bool:
    """Whether the updates of a full fine-tune can be made block by block (blockwise.py), so that blocks can stream."""
    tuned, divided = config.trains_dit, int(os.environ.get("WORLD_SIZE", "1")) > 1  # as launchers say it, without torch
    return tuned and not divided and config.optimizer.name in SEPARABLE and config.train_dtype != "FLOAT_16"


def is_fused(config: Config) -> bool:
    """Whether they are made inside the backward: nothing then needs the gradients of all blocks at once."""
    whole_batch = (
        max(1, round(config.batch_size * config.video_config.video_batch_size_multiplier)) == config.batch_size
    )
    return is_blockwise(config) and whole_batch and (config.clip == "BLOCK" or not config.max_grad_norm)
