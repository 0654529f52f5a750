"""When the updates of a full fine-tune are made: block by block, inside the backward, or all at the end; who has what.

All of it is known before torch loads.
"""

import os

from shared.config import Config

SEPARABLE = ("ADAMW", "ADAMW_8BIT", "ADAFACTOR", "LION", "CAME")  # the update of a tensor depends on it alone


def processes() -> int:
    """How many processes train together, as their launcher says it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def processes_here() -> int:
    """How many of them share this computer's RAM."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def videos_at_once(config: Config) -> int:
    """Videos per forward pass: batch_size x video_batch_size_multiplier, at least one."""
    return max(1, round(config.batch_size * config.video_config.video_batch_size_multiplier))


def parts_of_weights(config: Config) -> int:
    """Among how many processes the block weights of a full fine-tune are divided (shard.py)."""
    return processes() if config.trains_dit else 1


def is_blockwise(config: Config) -> bool:
    """Whether the updates of a full fine-tune can be made block by block (blockwise.py), so that blocks can stream."""
    alone = config.trains_dit and processes() == 1
    return alone and config.optimizer.name in SEPARABLE and config.train_dtype != "FLOAT_16"


def is_fused(config: Config) -> bool:
    """Whether they are made inside the backward: nothing then needs the gradients of all blocks at once."""
    whole_batch = videos_at_once(config) == config.batch_size
    return is_blockwise(config) and whole_batch and (config.clip == "BLOCK" or not config.max_grad_norm)
