"""The files that attngen reads and writes: templates, its cache, what users name."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from attngen.errors import FileError


def package() -> Path:
    """The folder of attngen itself."""
    return Path(__file__).parent


def template_folder() -> Path:
    """Where the templates are: inside an installed package, beside a checkout's."""
    inside = Path(__file__).parent / "templates"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "templates"


def cache_folder() -> Path:
    """The user's cache for attngen; ATTNGEN_CACHE names another."""
    import platformdirs

    named = os.environ.get("ATTNGEN_CACHE")
    return Path(named) if named else Path(platformdirs.user_cache_dir("attngen"))


def write(path: Path, text: str) -> None:
    """Write a whole file or nothing: into a temporary neighbour, then moved into place.

    Raises:
        FileError: it can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise FileError(
            f"{path} can't be written.",
            got=error.strerror,
            needed="a place that can be written",
            hint="name another path, or another cache folder in ATTNGEN_CACHE",
        ) from error


def read(path: Path) -> str:
    """The text of a file.

    Raises:
        FileError: it can't be read, or isn't text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise FileError(
            f"{path} can't be read.", got=error.strerror, needed="a readable file"
        ) from error
    except UnicodeDecodeError as error:
        raise FileError(
            f"{path} isn't text.", got=str(error), needed="UTF-8"
        ) from error
