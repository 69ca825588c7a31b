"""The report of a data set as one HTML file that needs nothing else: the pictures are in it."""

import base64
import html
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipelines.statistics import Example, Statistics, describe, summarize

BARS = 20
SIDE = 256  # pixels of the longer side of a picture on the page, which shows them at this size

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem;
       color: #222; background: #fff; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; font-size: 1.1rem; }
table { border-collapse: collapse; }
td, th { padding: .1rem .8rem .1rem 0; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.bar { background: #4a7ab5; height: .8em; display: inline-block; min-width: 1px; }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; width: 16rem; }
figcaption { font-size: 13px; overflow-wrap: anywhere; }
img { width: 100%; image-rendering: pixelated; }
.kind { color: #888; }
pre { overflow-x: auto; }
"""


def write_page(
    path: Path, statistics: Statistics, examples: Sequence[Example], why_not: str
) -> None:
    """Writes the page in one piece.

    Args:
      path: of the HTML file.
      statistics: of the data set.
      examples: pictures to show.
      why_not: why there are none, or "".
    """
    dropped = statistics.report.get("dropped", {})
    kept = {
        split: sum(shard.records for shard in shards)
        for split, shards in statistics.manifest.splits.items()
    }
    parts = [
        "<h1>Data set</h1>",
        _section("Samples", _bars(kept)),
        _section("Dropped", _dropped(dropped) if statistics.report else "<p>no report.json</p>"),
        _section(
            "Sizes, height x width",
            _bars({size: sum(splits.values()) for size, splits in statistics.buckets.items()}),
        ),
    ]
    for name, values in statistics.lengths.items():
        unit = "words" if name == "words" else f"{name} tokens"
        limit = (
            f"; the encoder takes {statistics.limits[name]}" if name in statistics.limits else ""
        )
        parts.append(
            _section(
                f"Caption length, {unit}",
                f"<p>{html.escape(summarize(values) + limit)}</p>" + _bars(_histogram(values)),
            )
        )
    parts.append(_section("Latents", _channels(statistics)))
    if examples or why_not:
        pictures = "".join(_figure(example) for example in examples)
        text = f"<p>none: {html.escape(why_not)}</p>" if why_not else ""
        parts.append(
            _section(
                "Pictures, decoded from their latents",
                f'{text}<div class="pictures">{pictures}</div>',
            )
        )
    parts.append(_section("As text", f"<pre>{html.escape(describe(statistics))}</pre>"))
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Data set</title>'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    partial = path.with_name(path.name + ".partial")
    # The name of a dropped file may hold bytes that are no text.
    partial.write_text(page, encoding="utf-8", errors="replace")
    os.replace(partial, path)


def _section(title: str, content: str) -> str:
    return f"<h2>{html.escape(title)}</h2>{content}"


def _bars(counts: Mapping[str, int]) -> str:
    largest = max(counts.values(), default=0) or 1
    rows = "".join(
        f'<tr><td>{html.escape(name)}</td><td class="number">{count:,}</td>'
        f'<td><span class="bar" style="width:{24 * count / largest:.2f}rem"></span></td></tr>'
        for name, count in counts.items()
    )
    return f"<table>{rows}</table>"


def _histogram(values: np.ndarray) -> dict[str, int]:
    """Whole numbers in at most `BARS` ranges of equal width."""
    if not len(values):
        return {}
    low, high = int(values.min()), int(values.max())
    width = -(-(high - low + 1) // BARS)
    counts = np.bincount((values - low) // width)
    starts = [low + width * number for number in range(len(counts))]
    names = [str(s) if width == 1 else f"{s}-{s + width - 1}" for s in starts]
    return {name: int(count) for name, count in zip(names, counts, strict=True)}


def _dropped(dropped: Mapping[str, Mapping]) -> str:
    if not dropped:
        return "<p>nothing</p>"
    rows = "".join(
        f'<tr><td>{html.escape(reason)}</td><td class="number">{entry["count"]:,}</td>'
        f"<td>{html.escape(entry['meaning'])}</td>"
        f"<td>{html.escape(entry['examples'][0]['file'])}</td></tr>"
        for reason, entry in dropped.items()
    )
    return f"<table><tr><th>reason<th>count<th>meaning<th>the first one</tr>{rows}</table>"


def _channels(statistics: Statistics) -> str:
    channels = zip(statistics.channel_means, statistics.channel_deviations, strict=True)
    rows = "".join(
        f'<tr><td class="number">{number}</td><td class="number">{mean:+.4f}</td>'
        f'<td class="number">{deviation:.4f}</td></tr>'
        for number, (mean, deviation) in enumerate(channels)
    )
    return f"<table><tr><th>channel<th>mean<th>deviation</tr>{rows}</table>"


def _figure(example: Example) -> str:
    image = Image.fromarray(example.picture_HWC)
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "PNG")
    height, width = example.original_size
    captions = "".join(
        f'<div><span class="kind">{html.escape(kind)}</span> {html.escape(text)}</div>'
        for text, kind in example.captions
    )
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="">'
        f'<figcaption><span class="kind">of {width}x{height}</span>{captions}</figcaption></figure>'
    )
