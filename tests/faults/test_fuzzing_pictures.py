"""Damaged pictures, captions and archives: dropped and reported, and nothing else is lost.

The short form runs on every test; `-m slow` runs the long one, 10,000 inputs and more a target.
"""

import functools
import io
import json
import random
import tarfile

import numpy as np
import pytest
from PIL import Image

from data_pipelines.samples import REASONS, Options, Rejected
from data_pipelines.sources.folders import Folder
from data_pipelines.sources.jsonl import Lines
from data_pipelines.sources.tars import Tars
from data_pipelines.stages import images
from data_pipelines.stages.filters import Rules
from tests.data_pipelines.making import write_tar
from tests.faults.mutations import few, fuzz, mutated_bytes, mutated_json, sizes

pytestmark = pytest.mark.filterwarnings("ignore")  # of Pillow, about damaged files


def encoded(kind, mode="RGB", size=(24, 17), **options):
    rng = np.random.default_rng(0)
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = rng.integers(0, 256, (size[1], size[0], channels), np.uint8)
    file = io.BytesIO()
    Image.frombytes(mode, size, values.tobytes()).save(file, kind, **options)
    return file.getvalue()


@functools.cache
def pictures():
    text = Image.Exif()
    text[0x0112] = 6
    found = [
        encoded("PNG"),
        encoded("PNG", "RGBA"),
        encoded("PNG", "P"),
        encoded("JPEG", exif=text),
        encoded("JPEG", progressive=True),
        encoded("JPEG", "CMYK"),
        encoded("WEBP"),
        encoded("WEBP", lossless=True),
        encoded("GIF", "P"),
        encoded("BMP"),
        encoded("PPM"),
        encoded("TIFF"),
        encoded("TIFF", compression="tiff_lzw"),
        encoded("TIFF", compression="jpeg"),
    ]
    grey = Image.fromarray(np.arange(300, dtype=np.uint16).reshape(15, 20))
    for kind in ("PNG", "TIFF"):
        file = io.BytesIO()
        grey.save(file, kind)
        found.append(file.getvalue())
    return found


def decode(data):
    target = (8, 8)
    decoded = images.decode(data, target)
    height, width = decoded.size
    assert decoded.image.mode == "RGB" and 1 <= height * width <= images.MAX_PIXELS
    assert decoded.image.size == (width // decoded.scale, height // decoded.scale)
    crop = images.centre_crop(decoded.size, target)
    pixels = images.resize(decoded.image, crop, target, decoded.scale)
    assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8


def known_reason(target):
    """Runs a target whose refusals have to be one of the documented reasons."""

    def checked(example):
        try:
            target(example)
        except Rejected as rejected:
            assert rejected.reason in REASONS and "\n" not in rejected.detail
            raise

    return checked


@sizes
def test_damaged_pictures_are_dropped_for_a_documented_reason_or_are_pictures(count):
    rng = random.Random(6)
    good = pictures()
    for data in good:
        decode(data)
    examples = (mutated_bytes(rng, rng.choice(good), good) for _ in range(count))
    counts = fuzz(known_reason(decode), examples, refusal=Rejected)
    assert counts["refused"] > count / 4 and counts["accepted"], counts


# Captions and archives


def listed(source):
    """Everything a source lists is usable, and everything it leaves out has a reason."""
    rules = Rules(score="aesthetic>=5")
    for sample in source.samples:
        assert sample.captions and all(caption.text.strip() for caption in sample.captions)
        "".join(caption.text for caption in sample.captions).encode()
        try:
            rules.before(sample)
            source.read(sample)
        except Rejected as rejected:
            assert rejected.reason in REASONS
    for case in source.dropped:
        assert case.reason in REASONS and "\n" not in case.detail
    names = [sample.name for sample in source.samples]
    assert len(set(names)) == len(names)
    json.dumps([names, source.dropped])


ENTRIES = [
    {"file": "a.png", "caption": "a cat", "aesthetic": 6},
    {"file": "b/c.png", "captions": ["one", "two"], "synthetic": "three", "aesthetic": 4.5},
]


@few
def test_damaged_caption_files_lose_lines_and_nothing_else(tmp_path, count):
    rng = random.Random(7)
    (tmp_path / "b").mkdir()
    for name in ("a.png", "b/c.png"):
        (tmp_path / name).write_bytes(encoded("PNG"))
    text = "\n".join(map(json.dumps, ENTRIES)).encode()
    options = Options(resolution=16, fields=frozenset(["aesthetic"]))

    def examples():
        for number in range(count):
            if rng.random() < 0.3:
                yield number, mutated_bytes(rng, text)
            else:
                lines = [mutated_json(rng, entry) for entry in ENTRIES]
                yield number, "\n".join(lines).encode("utf-8", "surrogatepass")

    def read(example):
        number, data = example
        (tmp_path / "captions.jsonl").write_bytes(data)
        if number % 2:
            listed(Folder(str(tmp_path), options))
        else:
            listed(Lines(str(tmp_path / "captions.jsonl"), options))

    assert fuzz(read, examples())["refused"] == 0


@few
def test_damaged_tar_files_lose_members_and_nothing_else(tmp_path, count):
    rng = random.Random(8)
    members = []
    for number in range(3):
        members.append((f"{number}.png", encoded("PNG")))
        members.append((f"{number}.txt", b"a picture"))
        members.append((f"{number}.json", json.dumps(ENTRIES[1]).encode()))
    plain = write_tar(tmp_path / "plain.tar", members).read_bytes()
    with tarfile.open(tmp_path / "pax.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo("é" * 120 + name)
            info.size, info.pax_headers = len(data), {"comment": "x" * 200}
            archive.addfile(info, io.BytesIO(data))
    good = [plain, (tmp_path / "pax.tar").read_bytes()]
    options = Options(resolution=16, fields=frozenset(["aesthetic"]))

    def read(data):
        (tmp_path / "x.tar").write_bytes(data)
        listed(Tars(str(tmp_path / "x.tar"), options))

    examples = (mutated_headers(rng, rng.choice(good)) for _ in range(count))
    assert fuzz(read, examples)["refused"] == 0


def mutated_headers(rng, data):
    """A tar with bytes damaged anywhere, or a field of a header changed and its sum made right."""
    if rng.random() < 0.5:
        return mutated_bytes(rng, data)
    changed, blocks = bytearray(data), len(data) // 512
    for _ in range(50):
        start = 512 * rng.randrange(blocks)
        if changed[start + 257 : start + 262] == b"ustar":
            break
    fields = [(0, 100), (100, 8), (124, 12), (124, 12), (124, 12), (156, 1), (345, 155)]
    field, width = rng.choice(fields)
    # In base 256: minus one, minus 4096, and the largest.
    odd = [b"\xff" * width, b"\xff" * (width - 2) + b"\xf0\0", b"\x80" + b"\xff" * (width - 1)]
    odd.append(b"7" * width)
    odd += [b"../" * (width // 3), b"/etc/passwd".ljust(width, b"\0"), rng.randbytes(width)]
    changed[start + field : start + field + width] = rng.choice(odd)[:width].ljust(width, b"\0")
    changed[start + 148 : start + 156] = b" " * 8
    total = sum(changed[start : start + 512])
    changed[start + 148 : start + 156] = b"%06o\0 " % total
    return bytes(changed)
