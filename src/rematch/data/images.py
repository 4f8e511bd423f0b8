"""Pictures from disk or a zip archive to RGB: rotated as EXIF says, transparency on white, first
frame of an animation, no side shorter than what vision towers take.
"""

import base64
import io
import os
import warnings
import zipfile
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError
from xxhash import xxh3_128

from rematch.errors import ImageError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
SHORTEST, ENLARGED = (
    28,
    56,
)  # MMEB's rule: a picture with a side under 28 pixels is scaled to 56×56


@dataclass(frozen=True)
class Zipped:
    """A picture inside a zip archive that was never unpacked."""

    archive: Path
    member: str

    def __str__(self) -> str:
        return f"{self.archive}!{self.member}"

    def read_bytes(self) -> bytes:
        """The picture's file.

        Raises:
            ImageError: If the archive is broken or does not hold it.
        """
        try:
            return opened(self.archive, os.getpid()).read(self.member)
        except KeyError:
            raise ImageError(f"{self}: the archive holds no such picture.") from None
        except (zipfile.BadZipFile, OSError, EOFError) as error:
            raise ImageError(
                f"{self}: the archive is broken ({error}). Download it again."
            ) from None


@dataclass(frozen=True)
class Encoded:
    """A picture's file, read but not decoded."""

    name: str
    content: bytes

    def __str__(self) -> str:
        return self.name

    def read_bytes(self) -> bytes:
        """The file."""
        return self.content


@dataclass(frozen=True)
class Checked:
    """A picture's file on disk that was looked at before, and must not have changed since.

    Attributes:
        path: Where it lies.
        digest: xxh3 of its content.
        pixels: How many it has.
    """

    path: Path
    digest: bytes
    pixels: int

    def __str__(self) -> str:
        return str(self.path)

    def read_bytes(self) -> bytes:
        """The file.

        Raises:
            ImageError: If it is gone or has changed.
        """
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise ImageError(f"{self.path}: cannot be read ({error.strerror}).") from None
        if xxh3_128(content).digest() != self.digest:
            raise ImageError(f"{self.path}: changed while it was read. Run again.")
        return content


@lru_cache(maxsize=64)
def opened(archive: Path, process: int) -> zipfile.ZipFile:
    """An archive, opened once in each process: forked ones would share one place in the file.

    Raises:
        ImageError: If it is no whole zip archive.
    """
    try:
        return zipfile.ZipFile(archive)
    except (zipfile.BadZipFile, OSError) as error:
        raise ImageError(
            f"{archive}: no whole zip archive ({error}). Download it again."
        ) from None


class Archives:
    """The zip archives in a folder and in its ``images_zip/``.

    Args:
        root: The folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def _members(self) -> dict[str, Zipped]:
        found = {}
        for archive in sorted([*self.root.glob("*.zip"), *self.root.glob("images_zip/*.zip")]):
            if archive.name.startswith("._"):
                continue
            opened.cache_clear()  # it may have been replaced since
            for name in opened(archive, os.getpid()).namelist():
                if name.lower().endswith(EXTENSIONS) and not Path(name).name.startswith("._"):
                    found[_plain(name)] = Zipped(archive, name)
        return found

    def find(self, path: str) -> Zipped | None:
        """Where a picture lies, whether or not its path or the archive's begins with ``images/``.

        Raises:
            ImageError: If an archive is broken.
        """
        return self._members.get(_plain(path))


def _plain(path: str) -> str:
    return path.removeprefix("./").removeprefix("images/")


File = Zipped | Encoded | Checked
Picture = Image.Image | Path | File


def load_image(source: Picture | str) -> Image.Image:
    """A decoded RGB picture.

    Args:
        source: A path, a place in a zip archive, a file's content, or an opened picture.

    Raises:
        ImageError: If the file is missing, is no picture, is cut off, or would decode to more
            pixels than Pillow's limit (``PIL.Image.MAX_IMAGE_PIXELS``) allows.
    """
    name = "picture" if isinstance(source, Image.Image) else str(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(source, File):
                picture: Image.Image = Image.open(io.BytesIO(source.read_bytes()))
            else:
                picture = source if isinstance(source, Image.Image) else Image.open(source)
            picture.load()
    except FileNotFoundError:
        raise ImageError(
            f"{name}: no such picture. Check the path; relative paths start at the data file."
        ) from None
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = Image.MAX_IMAGE_PIXELS
        raise ImageError(
            f"{name}: more than {limit:,} pixels, refused as a decompression bomb. Scale it down."
        ) from None
    except UnidentifiedImageError:
        raise ImageError(
            f"{name}: not a picture that Pillow can read. Convert it to PNG or JPEG."
        ) from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError(f"{name}: broken or cut off ({error}). Replace the file.") from None
    if picture.getexif().get(0x0112, 1) != 1:  # Orientation
        picture = ImageOps.exif_transpose(picture)
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    picture = picture if picture.mode == "RGB" else picture.convert("RGB")
    return picture.resize((ENLARGED, ENLARGED)) if min(picture.size) < SHORTEST else picture


def data_url(picture: Image.Image, edge: int = 96) -> str:
    """A picture as a PNG data URL, its longer side ``edge`` pixels."""
    buffer = io.BytesIO()
    ImageOps.contain(picture.convert("RGB"), (edge, edge), Image.Resampling.LANCZOS).save(
        buffer, "PNG"
    )
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
