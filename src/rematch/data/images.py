"""Pictures from disk to RGB: rotated as EXIF says, transparency on white, first frame of an animation."""

import base64
import io
import warnings
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from rematch.errors import ImageError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def load_image(source: Image.Image | Path | str) -> Image.Image:
    """A decoded RGB picture.

    Args:
        source: A path or an opened picture.

    Raises:
        ImageError: If the file is missing, is no picture, is cut off, or would decode to more pixels than Pillow's
            limit (``PIL.Image.MAX_IMAGE_PIXELS``) allows.
    """
    name = "picture" if isinstance(source, Image.Image) else str(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = source if isinstance(source, Image.Image) else Image.open(source)
            picture.load()
    except FileNotFoundError:
        raise ImageError(f"{name}: no such picture. Check the path; relative paths start at the data file.") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = Image.MAX_IMAGE_PIXELS
        raise ImageError(
            f"{name}: more than {limit:,} pixels, refused as a decompression bomb. Scale it down."
        ) from None
    except UnidentifiedImageError:
        raise ImageError(f"{name}: not a picture that Pillow can read. Convert it to PNG or JPEG.") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError(f"{name}: broken or cut off ({error}). Replace the file.") from None
    picture = ImageOps.exif_transpose(picture)
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return picture.convert("RGB")


def data_url(picture: Image.Image, edge: int = 96) -> str:
    """A picture as a PNG data URL, its longer side ``edge`` pixels."""
    buffer = io.BytesIO()
    ImageOps.contain(picture.convert("RGB"), (edge, edge), Image.Resampling.LANCZOS).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
