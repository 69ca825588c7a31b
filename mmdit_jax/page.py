"""HTML pages in one file that need nothing else: no network, pictures inside, text escaped."""

import base64
import html
import os
from collections.abc import Iterable, Sequence

from mmdit_jax import files

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8888; --accent: #3867b7; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem;
       color: #222; background: #fff; }
h1 { font-size: 1.5rem; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line);
       font-size: 1.15rem; padding-bottom: .2rem; }
table { border-collapse: collapse; font-size: 14px; }
.scroll { overflow-x: auto; }
td, th { padding: .15rem 1rem .15rem 0; text-align: left; vertical-align: top; }
th { font-weight: 600; border-bottom: 1px solid var(--line); }
tr > .number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.differs td { overflow-wrap: anywhere; }
figure { margin: 0; } figcaption { font-size: 13px; overflow-wrap: anywhere; }
.figures, .pictures { display: flex; flex-wrap: wrap; gap: 1.2rem; align-items: flex-start; }
.figures svg { width: 36rem; max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
.pictures figure { width: 24rem; max-width: 100%; }
.pictures img { width: 100%; border-radius: 4px; }
.bar { display: flex; height: 1.1rem; border-radius: 4px; overflow: hidden; margin: .4rem 0; }
.bar span { min-width: 1px; } .note { color: #777; font-size: 13px; }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em; }
pre { overflow-x: auto; font-size: 12.5px; }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #16181c; } }
"""


def write(path: str | os.PathLike, title: str, parts: Iterable[str], style: str = STYLE) -> None:
    """Writes a page in one piece.

    Args:
        path: of the HTML file.
        title: text.
        parts: HTML of the body.
        style: CSS.

    Raises:
        ValueError: it cannot be written there.
    """
    files.write_whole(
        path,
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{style}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n",
    )


def section(title: str, *content: str) -> str:
    """A heading (text) and what is below it (HTML)."""
    return f"<section><h2>{html.escape(title)}</h2>{''.join(content)}</section>"


def note(text: str) -> str:
    """A remark in small print."""
    return f'<p class="note">{html.escape(text)}</p>'


def table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table of text; `numbers` are the columns that are set flush right."""

    def cells(tag: str, row: Sequence[str]) -> str:
        style = [' class="number"' if i in numbers else "" for i in range(len(row))]
        return "".join(
            f"<{tag}{css}>{html.escape(text)}</{tag}>" for css, text in zip(style, row, strict=True)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{cells("th", header)}</tr>{body}</table></div>'


def picture(data: bytes, caption: str, kind: str = "image/png") -> str:
    """A picture that lies in the page, with text below it."""
    return (
        f'<figure><img src="{data_uri(data, kind)}" alt="{html.escape(caption)}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def data_uri(data: bytes, kind: str = "image/png") -> str:
    """Bytes as the address of themselves."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
