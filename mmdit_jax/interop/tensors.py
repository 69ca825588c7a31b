"""safetensors files, read and written one tensor at a time; nothing here holds a whole model."""

import json
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from mmdit_jax.encoders import folder as hf_folder

PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")

# Name in a safetensors header -> numpy type.
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16)} | {
    "BF16": np.dtype(ml_dtypes.bfloat16)
}
# Types that are read as bfloat16, which holds all of their values.
WIDENED = {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}


class Tensors:
    """The tensors of one file, or of the shards of one folder, by name."""

    def __init__(self, path: str | os.PathLike):
        """Opens a .safetensors file, or a model folder with one or with an index of several.

        Raises:
            FileNotFoundError: no such file or folder, no weights in it, or missing shards.
            ValueError: a pickle, a damaged file, or a tensor in two shards.
        """
        self.path = Path(path)
        if self.path.suffix in PICKLES:
            raise ValueError(
                f"{path} is a pickle, which can run any code when it is read; only .safetensors "
                "files are read: convert it where it came from"
            )
        if self.path.is_dir():
            pickles = sorted(p.name for p in self.path.iterdir() if p.suffix in PICKLES)
            if pickles and not any(self.path.glob("*.safetensors*")):
                raise ValueError(
                    f"{path} holds pickles only ({pickles[0]}); only .safetensors files are read: "
                    "save the model with safe_serialization=True"
                )
            files = hf_folder.weight_files(self.path)
        elif self.path.is_file():
            files = [self.path]
        else:
            raise FileNotFoundError(
                f"{path} does not exist; give a .safetensors file or a model folder"
            )
        self._files = {}
        for file in files:
            opened = hf_folder.open_safetensors(file)
            for name in opened.keys():
                if name in self._files:
                    raise ValueError(f"{file} holds {name} a second time; remove one")
                self._files[name] = (file, opened)

    def names(self) -> list[str]:
        """All names, in no particular order."""
        return list(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape, from the header alone."""
        return tuple(self._files[name][1].get_slice(name).get_shape())

    def dtype(self, name: str) -> np.dtype:
        """The type that `read` returns.

        Raises:
            ValueError: a type that weights do not have.
        """
        stored = self._files[name][1].get_slice(name).get_dtype()
        if stored in WIDENED:
            return DTYPES["BF16"]
        if stored not in DTYPES:
            raise ValueError(
                f"{name} in {self._files[name][0]} is stored as {stored}; known are "
                f"{', '.join((*DTYPES, *WIDENED))}: convert the file"
            )
        return DTYPES[stored]

    def read(self, name: str, *index: slice) -> np.ndarray:
        """A part of a tensor; only that part is read."""
        file, opened = self._files[name]
        part = opened.get_slice(name)
        if part.get_dtype() in WIDENED:
            return self._read_narrow(file, name)[index]
        self.dtype(name)
        return part[index] if index else opened.get_tensor(name)

    def _read_narrow(self, file: Path, name: str) -> np.ndarray:
        """8-bit floats, which safetensors does not give to numpy."""
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            entry = json.loads(stream.read(length))[name]
            start, end = entry["data_offsets"]
            stream.seek(8 + length + start)
            values = np.frombuffer(stream.read(end - start), WIDENED[entry["dtype"]])
        return values.astype(DTYPES["BF16"]).reshape(entry["shape"])


class Stored(NamedTuple):
    """A tensor to be written: `read` makes the array when its turn has come."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def write_file(path: str | os.PathLike, tensors: Sequence[Stored]) -> None:
    """Writes one safetensors file; it appears under its name when it is whole.

    Raises:
        ValueError: a value that the type of the file cannot hold, or that is not a number.
    """
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": codes[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.bytes],
        }
        offset += tensor.bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data must be aligned
    partial = Path(f"{path}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(struct.pack("<Q", len(text)))
            file.write(text)
            for tensor in tensors:
                values = tensor.read()
                assert values.shape == tensor.shape, (tensor.name, values.shape, tensor.shape)
                with np.errstate(over="ignore"):
                    cast = np.ascontiguousarray(values, tensor.dtype)
                if not np.isfinite(cast).all():
                    raise ValueError(
                        f"{tensor.name} has values that are not finite in {tensor.dtype.name}; "
                        "use float32 or bfloat16, and weights without NaN"
                    )
                file.write(cast.view(np.uint8).data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_folder(
    folder: str | os.PathLike, stem: str, tensors: Iterable[Stored], *, shard_bytes: int
) -> list[Path]:
    """Writes `stem`.safetensors, or shards of at most `shard_bytes` and their index.

    A tensor larger than `shard_bytes` gets a file of its own. If one cannot be written none stays.
    """
    shards: list[list[Stored]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.bytes for t in shards[-1]) + tensor.bytes > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if len(shards) == 1:
        write_file(folder / f"{stem}.safetensors", shards[0])
        return [folder / f"{stem}.safetensors"]
    files, weight_map = [], {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        try:
            write_file(folder / name, shard)
        except BaseException:
            for file in files:
                file.unlink()
            raise
        files.append(folder / name)
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(tensor.bytes for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return files


def check_names(found: dict[str, tuple], expected: dict[str, tuple], source: object) -> None:
    """Refuses a file whose names or shapes are not exactly the expected ones.

    Raises:
        ValueError: missing and unexpected names, or else the first shape that differs.
    """
    problems = []
    for what, names in (
        ("lacks", expected.keys() - found.keys()),
        ("has unexpected", found.keys() - expected.keys()),
    ):
        if names:
            shown = ", ".join(sorted(names)[:8])
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            problems.append(f"{what} {len(names)} weights: {shown}{more}")
    if problems:
        raise ValueError(f"{source} {'; it '.join(problems)}; give a whole file of this kind")
    for name, shape in expected.items():
        if tuple(found[name]) != tuple(shape):
            raise ValueError(
                f"{name} in {source} has the shape {tuple(found[name])}, the other weights ask "
                f"for {tuple(shape)}; the file is damaged or of another architecture"
            )
