"""Small pictures and archives, and what a source says of them."""

import io
import tarfile

from PIL import Image

from data_pipelines.samples import Options

OPTIONS = Options(resolution=16)


def picture(value, kind="PNG", size=(16, 16)):
    file = io.BytesIO()
    Image.new("RGB", size, (value, 2 * value % 256, 3)).save(file, kind)
    return file.getvalue()


def write_tar(path, members):
    """`members`: (name, bytes) in order; a name may come twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def told(source):
    return {s.name: [tuple(caption) for caption in s.captions] for s in source.samples}


def reasons(source):
    return {case.name: case.reason for case in source.dropped}
