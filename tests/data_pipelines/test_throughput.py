"""How much of the machine goes into decoding and resizing, and how much is lost around them."""

import io
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from data_pipelines.job import complete
from data_pipelines.pipeline import open_output
from data_pipelines.samples import Caption, Sample
from data_pipelines.settings import Settings
from data_pipelines.stage_times import StageTimes
from data_pipelines.stages import images
from data_pipelines.stages.check import Splits
from data_pipelines.stages.filters import Rules
from data_pipelines.stages.latents import Pixels
from data_pipelines.stages.pictures import TOGETHER, Checked, Pictures
from data_pipelines.stages.shards import Networks, Shards

PICTURES, SIDE, RESOLUTION, ROUNDS = 6000, 512, 256, 3


class Memory:
    """A source whose files are in memory: what is measured is not the disk."""

    def __init__(self, files):
        self.files, self.dropped, self.ignored = files, [], {}

    def read(self, sample):
        return self.files[int(sample.name)]


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


def bare(files, pool, workers):
    """Decoder and resizer alone, on all cores."""

    def work(part):
        for data in part:
            image = Image.open(io.BytesIO(data))
            image.load()
            crop = images.centre_crop((image.height, image.width), (RESOLUTION, RESOLUTION))
            box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
            image.resize((RESOLUTION, RESOLUTION), Image.Resampling.LANCZOS, box=box)

    list(pool.map(work, [files[number::workers] for number in range(workers)]))


def whole(files, pool, workers, folder):
    """The build's last stage, from the bytes of files to finished shards."""
    settings = Settings(
        source="shapes",
        output=str(folder),
        resolution=RESOLUTION,
        pixel_factor=1,
        workers=workers,
        overwrite=True,
    )
    times, autoencoder = StageTimes(workers), Pixels(1)
    pictures = Pictures(
        Memory(files),
        pool,
        sizes=settings.sizes(),
        rules=Rules(),
        window=settings.batch_size + 2 * TOGETHER * workers,
        times=times,
    )
    caption = (Caption("a picture", "original"),)
    splits = Splits([Checked(Sample(str(number), caption)) for number in range(len(files))], [], [])
    networks = Networks(autoencoder, {}, autoencoder.describe(), {})
    with open_output(settings) as output:
        shards = Shards(settings, output, splits, pictures, networks, times)
        complete(shards, settings.job())
        finished = shards.finished()["train"]
    assert sum(each.shard.records for each in finished) == len(files)
    return times.table()


@pytest.mark.slow
def test_the_build_runs_at_four_fifths_of_the_speed_of_decoder_and_resizer(tmp_path):
    files = photographs(PICTURES)
    workers = len(os.sched_getaffinity(0))
    seconds = {bare: [], whole: []}
    with ThreadPoolExecutor(workers) as pool:
        for _ in range(ROUNDS):
            for function, more in ((bare, ()), (whole, (tmp_path,))):
                start, cpu = time.perf_counter(), sum(os.times()[:4])
                table = function(files, pool, workers, *more)
                spent = time.perf_counter() - start, sum(os.times()[:4]) - cpu
                seconds[function].append(spent)
    # Of neighbouring rounds, and the middle one: other processes come and go.
    wall, cpu = (
        float(np.median([b[unit] / w[unit] for b, w in zip(*seconds.values(), strict=True)]))
        for unit in (0, 1)
    )
    best = {function: min(each[0] for each in times) for function, times in seconds.items()}
    size = sum(map(len, files)) / len(files)
    print(
        f"\n{SIDE} px JPEG of {size / 1e3:.0f} kB to {RESOLUTION} px on {workers} cores: decode "
        f"and resize {PICTURES / best[bare]:.0f}/s, build {PICTURES / best[whole]:.0f}/s at best; "
        f"{wall:.0%} of its speed, {cpu:.0%} of the computation is decoding and resizing\n\n{table}"
    )
    assert wall >= 0.8
