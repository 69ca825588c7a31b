"""Files that others read while they are written: whole, or as they were before."""

import os


def write_whole(path: str | os.PathLike, text: str) -> None:
    """Writes a text file in one piece; its folder is made if there is none.

    What is no text in it (a lone surrogate, of a file name) becomes a question mark.

    Raises:
        ValueError: the file cannot be written there.
    """
    path = os.path.abspath(path)
    partial = f"{path}.partial"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(partial, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written ({error.strerror}); make room, or give another path"
        ) from error
