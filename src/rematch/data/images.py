"""Loading pictures, from disk or out of a zip archive, as RGB.

They are rotated as EXIF says, transparency is put on white, of an animation the first frame is
taken, and no side is shorter than vision towers take.
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

from rematch.data.clips import Frame
from rematch.data.pages import PdfPage
from rematch.errors import DataError, ImageError, first_line
from rematch.files import read_regular

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # of these files, whatever their names
LARGEST_FILE = 256 << 20  # bytes
# MMEB's rule: a picture with a side under 28 pixels is scaled to 56×56
SHORTEST = 28
ENLARGED = 56


@dataclass(frozen=True)
class ZippedPicture:
    """A picture inside a zip archive.

    Attributes:
        archive: Path of the archive.
        member: Name of the picture in it.
    """

    archive: Path
    member: str

    def __str__(self) -> str:
        return f"{self.archive}!{self.member}"

    def read_bytes(self) -> bytes:
        """Return the content of the picture's file.

        Raises:
            ImageError: If the archive is broken or does not hold the picture.
        """
        try:
            return open_archive(self.archive, os.getpid()).read(self.member)
        except KeyError:
            raise ImageError(f"{self}: the archive holds no such picture.") from None
        except (zipfile.BadZipFile, OSError, EOFError) as error:
            raise ImageError(
                f"{self}: the archive is broken ({error}). Download it again."
            ) from None


@dataclass(frozen=True)
class EncodedPicture:
    """A picture's file in memory, not decoded.

    Attributes:
        name: Name of the picture, for errors.
        content: Content of the file.
    """

    name: str
    content: bytes

    def __str__(self) -> str:
        return self.name

    def read_bytes(self) -> bytes:
        """Return the content of the file."""
        return self.content


@dataclass(frozen=True)
class CheckedPicture:
    """A picture's file on disk, with a checksum that reveals a later change.

    Attributes:
        path: Path of the file.
        digest: xxh3 digest of its content.
        pixels: Number of its pixels.
    """

    path: Path
    digest: bytes
    pixels: int

    def __str__(self) -> str:
        return str(self.path)

    def read_bytes(self) -> bytes:
        """Return the content of the file.

        Raises:
            ImageError: If the file cannot be read or has changed.
        """
        content = read_picture(self.path)
        if xxh3_128(content).digest() != self.digest:
            raise ImageError(f"{self.path}: the file changed during the run. Run again.")
        return content


@lru_cache(maxsize=64)
def open_archive(archive: Path, process: int) -> zipfile.ZipFile:
    """Open a zip archive once in each process; forked processes would share its file position.

    Args:
        archive: Path of the archive.
        process: Id of the process, a part of the cache's key.

    Raises:
        ImageError: If the file is not a complete zip archive.
    """
    try:
        return zipfile.ZipFile(archive)
    except (zipfile.BadZipFile, OSError) as error:
        raise ImageError(
            f"{archive}: not a complete zip archive ({error}). Download it again."
        ) from None


class Archives:
    """The pictures in the zip archives of a folder and of its subfolder ``images_zip``.

    Args:
        root: The folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def _members(self) -> dict[str, ZippedPicture]:
        members = {}
        for archive in sorted([*self.root.glob("*.zip"), *self.root.glob("images_zip/*.zip")]):
            if archive.name.startswith("._"):
                continue
            open_archive.cache_clear()  # the archive may have been replaced since
            for name in open_archive(archive, os.getpid()).namelist():
                if name.lower().endswith(EXTENSIONS) and not Path(name).name.startswith("._"):
                    members[_without_images_folder(name)] = ZippedPicture(archive, name)
        return members

    def find(self, path: str) -> ZippedPicture | None:
        """Find a picture by its path; ``None`` if no archive holds it.

        A leading ``images/`` in the path or in the archive makes no difference.

        Raises:
            ImageError: If an archive is broken.
        """
        return self._members.get(_without_images_folder(path))


def _without_images_folder(path: str) -> str:
    return path.removeprefix("./").removeprefix("images/")


PictureFile = ZippedPicture | EncodedPicture | CheckedPicture | PdfPage | Frame
PictureSource = Image.Image | Path | PictureFile


def load_image(source: PictureSource | str) -> Image.Image:
    """Load a picture as RGB.

    Args:
        source: A path, a picture's file, or an opened picture.

    Raises:
        ImageError: If the file is missing, is not a picture in one of the ``FORMATS``, is broken
            or cut off, or would decode to more pixels than Pillow's limit
            (``PIL.Image.MAX_IMAGE_PIXELS``) allows.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of metadata that Pillow doubts
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(source, Image.Image):
                picture = source
            else:
                content = (
                    source.read_bytes()
                    if isinstance(source, PictureFile)
                    else read_picture(Path(source))
                )
                picture = Image.open(io.BytesIO(content), formats=FORMATS)
            picture.load()
            return _as_rgb(picture)
    except Exception as error:
        name = "picture" if isinstance(source, Image.Image) else str(source)
        raise picture_error(name, error) from None


def read_picture(path: Path) -> bytes:
    """The content of a picture's file.

    Raises:
        ImageError: If it cannot be read, is not a regular file, or is too large.
    """
    try:
        return read_regular(path, LARGEST_FILE)
    except Exception as error:
        raise picture_error(str(path), error) from None


def picture_error(name: str, error: Exception) -> ImageError:
    """What reading, opening or decoding a picture raised, as an error that a user can fix."""
    if isinstance(error, ImageError):
        return error
    if isinstance(error, DataError):
        return ImageError(str(error))
    if isinstance(error, FileNotFoundError):
        return ImageError(
            f"{name}: no such picture ({error.strerror}). Check the path; relative paths start "
            "at the data file's folder."
        )
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return ImageError(
            f"{name}: has more than {Image.MAX_IMAGE_PIXELS:,} pixels and is refused as a "
            "decompression bomb. Scale it down."
        )
    if isinstance(error, UnidentifiedImageError):
        return ImageError(
            f"{name}: not a picture that Pillow can read as {', '.join(FORMATS)}. Convert it to "
            "PNG or JPEG."
        )
    if isinstance(error, OSError) and error.errno:
        return ImageError(f"{name}: cannot be read ({error.strerror}).")
    reason = first_line(error)
    return ImageError(f"{name}: broken or cut off ({reason}). Replace the file.")


def _as_rgb(picture: Image.Image) -> Image.Image:
    if picture.getexif().get(0x0112, 1) != 1:  # Orientation
        picture = ImageOps.exif_transpose(picture)
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    picture = picture if picture.mode == "RGB" else picture.convert("RGB")
    return picture.resize((ENLARGED, ENLARGED)) if min(picture.size) < SHORTEST else picture


def data_url(picture: Image.Image, edge: int = 96) -> str:
    """Return a picture as a PNG data URL, scaled so that its longer side has ``edge`` pixels."""
    buffer = io.BytesIO()
    ImageOps.contain(picture.convert("RGB"), (edge, edge), Image.Resampling.LANCZOS).save(
        buffer, "PNG"
    )
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
