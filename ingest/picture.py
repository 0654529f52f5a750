"""Still pictures as they are shown: upright, sRGB, 8 bits, transparency over black. Cost: decoding one."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

from ingest.probe import Unusable

if TYPE_CHECKING:
    from PIL.Image import Image


def load_picture(path: Path) -> "Image":
    """An RGB picture; raises Unusable for a damaged one, OSError when the file cannot be read."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            profile = opened.info.get("icc_profile")
            image = ImageOps.exif_transpose(opened)
            image.load()
    except (OSError, ValueError, SyntaxError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise Unusable(f"damaged: {error}") from None
    image = in_srgb(eight_bits(image), profile)
    if image.has_transparency_data:
        over = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", over.size, "black"), over)
    return image.convert("RGB")


def eight_bits(image: "Image") -> "Image":
    """Pillow cuts 16-bit grey off at 255 where it converts it: white."""
    import numpy as np
    from PIL import Image

    if not image.mode.startswith("I"):
        return image
    return Image.fromarray(np.round(np.clip(np.asarray(image), 0, 65535) / 257).astype(np.uint8))


def in_srgb(image: "Image", profile: bytes | None) -> "Image":
    """The colours of a picture with an ICC profile, such as a phone's Display P3; a profile that is none is ignored."""
    from PIL import ImageCms

    if profile is None or image.mode not in ("RGB", "RGBA", "CMYK", "L"):
        return image
    alpha = image.getchannel("A") if image.mode == "RGBA" else None
    try:
        source, target = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
        if "sRGB" in ImageCms.getProfileDescription(source):
            return image
        plain = image.convert("RGB") if alpha else image
        shown = ImageCms.profileToProfile(plain, source, target, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return image
    if shown is None:
        return image
    if alpha:
        shown.putalpha(alpha)
    return shown
