"""What the encode room's tests need: a nano Wan in diffusers layout, and a work folder as ingest leaves it."""

import io
import json
import tarfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from shared.files import sha256_of
from shared.keys import fingerprint
from shared.shards import Index, SampleRecord, ShardRecord, shard_folder, write_index
from shared.tiny_variants import VAE_21

UMT5: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4, "dropout_rate": 0.0}
CORPUS = ["a red ball rolls left", "a blue cube spins", "two dogs run on grass", "waves at night, slow camera"]


def nano_model(folder: Path, vae: dict[str, Any] = VAE_21, seed: int = 0, in_channels: int = 16) -> Path:
    """A random model: VAE, UMT5, tokenizer, and only the config of its DiT; 16 or 36 input channels."""
    from diffusers import AutoencoderKLWan
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)
    AutoencoderKLWan(**vae).save_pretrained(folder / "vae")
    tokenizer = train_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), **UMT5))
    encoder.save_pretrained(folder / "text_encoder")
    dit = {"_class_name": "WanTransformer3DModel", "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32,
           "num_layers": 2, "in_channels": in_channels, "out_channels": vae["z_dim"], "text_dim": UMT5["d_model"],
           "patch_size": [1, 2, 2]}  # fmt: skip
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer/config.json").write_text(json.dumps(dit))
    (folder / "model_index.json").write_text(json.dumps({"expand_timesteps": False}))
    return folder


def train_tokenizer() -> Any:
    """A Unigram tokenizer of a small corpus, laid out like UMT5's: pad 0, end 1, unknown 2."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import T5Tokenizer

    learner = Tokenizer(models.Unigram())
    metaspace = pre_tokenizers.Metaspace("\u2581", prepend_scheme="always")
    learner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>",
                                      show_progress=False)  # fmt: skip
    learner.train_from_iterator(CORPUS, trainer)
    pieces = [tuple(piece) for piece in json.loads(learner.to_str())["model"]["vocab"]]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def moving_square(number: int, num_frames: int, height: int, width: int) -> NDArray[np.uint8]:
    """Frames (T, H, W, 3) of a coloured square that moves; every number gives other pixels."""
    rng = np.random.default_rng(number)
    colour, y, x = rng.integers(60, 255, 3), *rng.integers(0, 16, 2)
    frames_THWC = np.full((num_frames, height, width, 3), rng.integers(0, 60, 3), np.uint8)
    for time in range(num_frames):
        frames_THWC[time, y : y + 12, x + time : x + time + 12] = colour
    return frames_THWC


def mp4_bytes(frames_THWC: NDArray[np.uint8], fps: int = 8) -> bytes:
    """An H.264 file in memory, tagged bt709 as ingest's are."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=Fraction(fps))
        stream.height, stream.width = frames_THWC.shape[1:3]
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "10"}
        stream.color_range, stream.colorspace = 1, 1
        for pixels in frames_THWC:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace="ITU709")))
        container.mux(stream.encode())
    return buffer.getvalue()


def png_bytes(frames_THWC: NDArray[np.uint8]) -> bytes:
    """The first frame as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(frames_THWC[0]).save(buffer, "PNG")
    return buffer.getvalue()


def add_shard(work: Path, name: str, numbers: Sequence[int], image: bool = False,
              size: tuple[int, int, int] = (5, 32, 48)) -> tuple[ShardRecord, list[SampleRecord]]:  # fmt: skip
    """Write one tar of moving squares, as ingest would; the clip's number decides its pixels, key and captions."""
    num_frames, height, width = (1, *size[1:]) if image else size
    extension = "png" if image else "mp4"
    path = shard_folder(work) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = []
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            key = fingerprint(number=number, size=size, image=image)
            frames_THWC = moving_square(number, num_frames, height, width)
            data = png_bytes(frames_THWC) if image else mp4_bytes(frames_THWC)
            for suffix, content in ((extension, data), ("json", b"{}")):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            samples.append(SampleRecord(
                key=key, shard=name, extension=extension, num_frames=num_frames, height=height, width=width, fps=8,
                captions=(f"a square, take {number}", CORPUS[number % len(CORPUS)]), source=f"clip{number}.mp4",
                start=0.0, duration=num_frames / 8, clip=key))  # fmt: skip
    keys = tuple(sample.key for sample in samples)
    return ShardRecord(name=name, sha256=sha256_of(path), bytes=path.stat().st_size, keys=keys), samples


def index_of(work: Path, parts: Sequence[tuple[ShardRecord, list[SampleRecord]]]) -> Index:
    """Write the index of these shards."""
    index = Index(dataset="testset", ingest_version=1, samples=tuple(s for _, part in parts for s in part),
                  shards=tuple(shard for shard, _ in parts))  # fmt: skip
    write_index(work, index)
    return index


def shards(work: Path) -> Path:
    """Two shards of clips, one of images, and their index."""
    index_of(work, [add_shard(work, "a.tar", range(3)), add_shard(work, "b.tar", range(3, 5)),
                    add_shard(work, "c.tar", (7, 8), image=True)])  # fmt: skip
    return work
