"""UMT5 in the trainer: token ids to embeddings, with gradients. Loaded in two cases only: embedding.kind INPUT, where
it is frozen and a concept's input vectors are learned, and text_encoder.train, where its blocks are trained.

The table of token vectors stays in RAM and is never trained: captions use a few hundred of its 256,384 rows. Texts go
through one by one, without padding, and dropout is off, so that a run can be repeated.

Names: S tokens of a text, V of the vocabulary, d columns of an embedding.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shared.config import Config
from shared.files import read_json
from shared.models import ModelSpec
from shared.store_read import Text
from shared.weights import home_of, load_umt5, torch_dtype
from train.flow import wide
from train.quantize import TORCH_DTYPES, quantize_blocks

PREFIX = "text_encoder."  # of its weights among the trained parameters
# google/umt5-xxl's config.json, for a plan before anything is downloaded
XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
       "feed_forward_proj": "gated-gelu", "vocab_size": 256384}  # fmt: skip


@dataclass(frozen=True)
class TextEncoder:
    """UMT5's blocks on the device and its token vectors in RAM."""

    stack: Any
    table_Vd: Tensor
    device: torch.device
    dtype: torch.dtype  # of activations
    autocast: bool = False  # trained weights are kept wider than the arithmetic
    checkpointed: bool = False

    def __call__(self, text: Text) -> Tensor:
        """(S, d) of a text's tokens, in float32 or wider."""
        return self.encode(self.vectors(text))

    def vectors(self, text: Text) -> Tensor:
        """(S, d) input vectors of a text's tokens."""
        return self.table_Vd[torch.from_numpy(text.ids_S.copy()).long()]

    def encode(self, vectors_Sd: Tensor) -> Tensor:
        """(S, d) of input vectors, in float32 or wider."""
        vectors_Sd = vectors_Sd.to(self.device, self.dtype)
        if self.checkpointed and torch.is_grad_enabled():
            hidden: Tensor = checkpoint(self._run, vectors_Sd, use_reentrant=False)
            return hidden
        return self._run(vectors_Sd)

    def _run(self, vectors_Sd: Tensor) -> Tensor:
        context = torch.autocast(self.device.type, self.dtype) if self.autocast else nullcontext()
        with context:
            return wide(self.stack(inputs_embeds=vectors_Sd[None]).last_hidden_state[0])

    def parameters(self) -> dict[str, nn.Parameter]:
        """Its weights by the name they have in UMT5's files, after PREFIX."""
        return {f"{PREFIX}encoder.{name}": part for name, part in self.stack.named_parameters()}


def needs_encoder(config: Config) -> bool:
    """Whether training needs UMT5 itself."""
    return config.text_encoder.train or (config.training_method == "EMBEDDING" and config.embedding.kind == "INPUT")


def load_encoder(spec: ModelSpec, config: Config, device: torch.device) -> TextEncoder:
    """UMT5, trainable as text_encoder.train says; frozen weights are stored in text_encoder.weight_dtype."""
    storage, trained = config.text_encoder.weight_dtype, config.text_encoder.train
    model = load_umt5(spec, TORCH_DTYPES[storage if trained else config.train_dtype])
    stack, table_Vd = model.encoder, model.shared.weight.detach()
    stack.embed_tokens = nn.Identity()  # token vectors are looked up in the table
    if not trained and storage != config.train_dtype:
        quantize_blocks(stack, storage, "block.")
    stack.to(device).requires_grad_(trained)
    autocast = trained and storage != config.train_dtype
    return TextEncoder(stack, table_Vd, device, torch_dtype(config.train_dtype), autocast,
                       config.gradient_checkpointing != "NONE")  # fmt: skip


def empty_stack(spec: ModelSpec) -> Any:
    """UMT5's blocks on the meta device; downloads nothing."""
    from transformers import UMT5Config
    from transformers.models.umt5.modeling_umt5 import UMT5Stack

    local = Path(home_of(spec, "text_encoder")).expanduser() / "text_encoder" / "config.json"
    facts = read_json(local) if local.is_file() else XXL
    config = UMT5Config(**{key: facts[key] for key in XXL})
    config.is_encoder_decoder = config.is_decoder = config.use_cache = False
    with torch.device("meta"):
        stack = UMT5Stack(config)
    stack.embed_tokens = nn.Identity()
    return stack.eval().requires_grad_(False)
