"""Files a command reads or writes: whole or not at all, with errors that say what to do."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageFile, UnidentifiedImageError

from vtc.errors import InputError, OptionError, VtcError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends without an error.

    It is created at once, so a folder that cannot be written to is found before any work is done.

    Raises:
        InputError: the folder does not exist or `path` is a folder.
        VtcError: the folder cannot be written to.
    """
    if path.is_dir():
        raise InputError(f"{str(path)!r} is a folder, expected a file to write: add a file name")
    if not path.parent.is_dir():
        raise InputError(
            f"cannot write {str(path)!r}: {str(path.parent)!r} is not a folder, expected one: "
            f"create it first"
        )
    try:
        handle, name = tempfile.mkstemp(suffix=path.suffix, prefix=".vtc-", dir=path.parent)
    except OSError as error:
        raise VtcError(
            f"cannot write into {str(path.parent)!r} ({error.strerror}), expected a writable folder"
            f": choose another place"
        ) from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files that only their owner may read
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def picture_suffix(path: Path) -> None:
    """Refuse a picture's file name whose ending Pillow cannot write."""
    endings = Image.registered_extensions()
    writable = {e for e, kind in endings.items() if kind in Image.SAVE}
    if path.suffix.lower() not in writable:
        raise OptionError(
            f"{str(path)!r} ends in {path.suffix!r}, expected a picture's ending such as .png: "
            f"rename it"
        )


def read_picture(path: Path) -> Image.Image:
    """The picture in a file, upright, as RGB.

    Raises:
        InputError: no file, not a picture, or a damaged one.
    """
    from PIL import ImageOps

    if not path.is_file():
        kind = "a folder" if path.is_dir() else "not there"
        raise InputError(f"image {str(path)!r} is {kind}, expected a picture file: check the path")
    try:
        with _whole_files_only(), Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError:
        raise InputError(
            f"image {str(path)!r} is not a picture, expected a format that Pillow reads, such as "
            f"PNG: convert it"
        ) from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(
            f"image {str(path)!r} is damaged ({error}), expected a whole picture: get the file "
            f"again"
        ) from None


@contextmanager
def _whole_files_only() -> Iterator[None]:
    """Other packages make Pillow fill with gray what a file lacks, for the whole process."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in aligned columns, the first row being the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
