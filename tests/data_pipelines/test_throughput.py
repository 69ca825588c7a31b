"""How much of the machine goes into decoding and resizing, and how much is lost around them."""

import io
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from data_pipelines.stages import images

PICTURES, SIDE, RESOLUTION, ROUNDS = 4000, 512, 256, 3


def photographs(count):
    """Bytes of JPEG files as large as those of photographs: about 1 bit per pixel and more."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(16):
        small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        values = np.asarray(small.resize((SIDE + 170, SIDE), Image.Resampling.BICUBIC)).astype(int)
        noisy = (values + rng.integers(-12, 13, values.shape)).clip(0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(noisy).save(file, "JPEG", quality=85)
        files.append(file.getvalue())
    return [files[number % len(files)] for number in range(count)]


def bare(files, workers):
    """Seconds of decoder and resizer alone, on all cores."""

    def work(part):
        for data in part:
            image = Image.open(io.BytesIO(data))
            image.load()
            crop = images.centre_crop((image.height, image.width), (RESOLUTION, RESOLUTION))
            box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
            image.resize((RESOLUTION, RESOLUTION), Image.Resampling.LANCZOS, box=box)

    start = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, [files[number::workers] for number in range(workers)]))
    return time.perf_counter() - start


def build(source, output):
    """Runs the build; returns its table of stage times."""
    command = [sys.executable, "-m", "data_pipelines.build", f"--source=folder:{source}"]
    command += [f"--output={output}", f"--resolution={RESOLUTION}", "--pixel_factor=1"]
    command += ["--text_length=12", "--overwrite"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert re.search(rf"^captions {PICTURES:,},", said, re.MULTILINE), said
    return re.search(r"^stage .*? s in all.*?$", said, re.MULTILINE | re.DOTALL).group()


@pytest.mark.slow
def test_the_build_runs_at_four_fifths_of_the_speed_of_decoder_and_resizer(tmp_path):
    files = photographs(PICTURES)
    source = tmp_path / "pictures"
    source.mkdir()
    for number, data in enumerate(files):
        (source / f"{number:05d}.jpg").write_bytes(data)
        # Few different captions: encoding them is a network's work, which here has no device of its
        # own.
        (source / f"{number:05d}.txt").write_text(f"picture number {number % 16}")
    workers = len(os.sched_getaffinity(0))
    ratios = []
    for _ in range(ROUNDS):
        alone = bare(files, workers)
        table = build(source, tmp_path / "built")
        whole = float(re.search(r"^([\d.]+) s in all", table, re.MULTILINE).group(1))
        # Of neighbouring rounds, and the middle one: other processes come and go.
        ratios.append((alone + bare(files, workers)) / 2 / whole)
        print(
            f"\n{SIDE} px JPEG to {RESOLUTION} px on {workers} cores: decode and resize "
            f"{PICTURES / alone:.0f}/s, build {PICTURES / whole:.0f}/s: {ratios[-1]:.0%}\n\n{table}"
        )
    assert np.median(ratios) >= 0.8
