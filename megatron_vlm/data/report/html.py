"""HTML of the data report: a single file that needs no network. All text from the data is escaped."""

from __future__ import annotations

import base64
import html
import io
from collections import Counter, defaultdict
from collections.abc import Sequence

from megatron_vlm.data.processing.image_io import decode_image
from megatron_vlm.data.report.inspection import SampleView, Span, Suspect

_MAX_LISTED_PER_REASON = 50
_MAX_SPAN_CHARACTERS = 1600
_THUMBNAIL_SIZE = (260, 180)
_MAX_THUMBNAILS = 8

_STYLE = """
:root { color-scheme: light }
body { font: 15px/1.5 system-ui, "Segoe UI", sans-serif; color: #1c1c1c; background: #f4f5f7; margin: 0 }
main { max-width: 1160px; margin: 0 auto; padding: 24px 20px 60px }
h1 { font-size: 24px; margin: 8px 0 2px } h2 { font-size: 18px; margin: 0 0 8px }
section { background: #fff; border: 1px solid #dfe2e6; border-radius: 8px; padding: 18px 22px; margin: 18px 0 }
p { margin: 4px 0 10px } .quiet { color: #555 } img { max-width: 100% }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(124px, 1fr)); gap: 10px; margin: 18px 0 0 }
.card { background: #fff; border: 1px solid #dfe2e6; border-radius: 8px; padding: 10px 14px }
.card b { display: block; font-size: 21px; line-height: 1.3 } .card span { color: #555; font-size: 13px }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: 13.5px; width: 100% }
th { text-align: left; border-bottom: 2px solid #999; padding: 4px 12px 4px 0; white-space: nowrap }
td { border-bottom: 1px solid #e3e5e8; padding: 4px 12px 4px 0; vertical-align: top; overflow-wrap: anywhere }
th.n, td.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
tr.total td { font-weight: 600 } section > img { display: block; margin-top: 16px } table.narrow { width: auto }
details { margin: 6px 0 } summary { cursor: pointer; font-weight: 600 }
.example { border-top: 1px solid #dfe2e6; padding: 14px 0 6px } .example h3 { font-size: 15px; margin: 0 }
figure { display: inline-block; margin: 8px 14px 8px 0; vertical-align: top; max-width: 280px }
figure img { border: 1px solid #ccc; display: block }
figcaption { font-size: 12px; color: #444; overflow-wrap: anywhere }
.text { font: 13px/1.65 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  background: #fafbfc; border: 1px solid #dfe2e6; border-radius: 6px; padding: 10px 12px; margin: 8px 0 }
.answer { background: #bfe6c3; border-radius: 3px } .image { background: #c5dbf5; border-radius: 3px }
.prompt { color: #444 } .key span { padding: 1px 7px; margin-right: 8px }
"""
# The browser fetches nothing and runs no script, even if the data contains some.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def text(value: object) -> str:
    """Text from the data, escaped."""
    return html.escape(str(value).replace("\0", "\ufffd"))


def page(title: str, parts: Sequence[str]) -> bytes:
    """The whole HTML file."""
    content = (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta http-equiv=Content-Security-Policy "
        f'content="{_POLICY}"><title>{text(title)}</title><style>{_STYLE}</style><main>' + "\n".join(parts) + "</main>"
    )
    return content.encode("utf-8", "backslashreplace")


def cards(numbers: Sequence[tuple[str, str]]) -> str:
    """A row of cards with (number, label)."""
    inside = "".join(
        f"<div class=card><b>{text(number)}</b><span>{text(label)}</span></div>" for number, label in numbers
    )
    return f"<div class=cards>{inside}</div>"


def section(heading: str, *parts: str) -> str:
    return f"<section><h2>{text(heading)}</h2>{''.join(parts)}</section>"


def png_image(png: bytes, alt: str) -> str:
    return f'<img alt="{text(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int, total: bool = False) -> str:
    """A table. The first `text_columns` columns are text, the others are right-aligned numbers.

    A table without text columns is as narrow as its content. `total`: the last row is a total.
    """

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = ("" if column < text_columns else " class=n" for column in range(len(cells)))
        return "".join(f"<{tag}{kind}>{text(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))

    last = len(rows) - 1 if total else -1
    body = "".join(f"<tr{' class=total' if n == last else ''}>{line(row, 'td')}</tr>" for n, row in enumerate(rows))
    kind = "" if text_columns else " class=narrow"
    return f"<div class=wide><table{kind}><tr>{line(header, 'th')}</tr>{body}</table></div>"


def details(summary: str, content: str) -> str:
    """Text from the data that is shown when its summary is clicked."""
    return f"<details><summary>{text(summary)}</summary><div class=text>{text(content)}</div></details>"


def suspects(found: Sequence[Suspect], listing: str) -> str:
    """The number of suspects per reason, and the first ones of each."""
    if not found:
        return "<p>None.</p>"
    counts = Counter(suspect.reason for suspect in found)
    by_reason: dict[str, list[Suspect]] = defaultdict(list)
    for suspect in found:
        by_reason[suspect.reason].append(suspect)
    parts = [f"<p>{len(found):,} findings; all are listed in {text(listing)}.</p>"]
    for reason, count in counts.most_common():
        shown = by_reason[reason][:_MAX_LISTED_PER_REASON]
        rows = [(suspect.sample_id[:80], suspect.source, suspect.message[:400]) for suspect in shown]
        more = f", the first {len(shown)} shown" if count > len(shown) else ""
        inside = table(("sample", "source", "message"), rows, text_columns=3)
        parts.append(f"<details><summary>{text(reason)}: {count:,}{more}</summary>{inside}</details>")
    return "".join(parts)


KEY = (
    "<p class=key><span class=answer>supervised</span><span class=image>image tokens</span>"
    "<span class=prompt>no loss</span></p>"
)


def example(view: SampleView) -> str:
    """A sample as the model sees it, with its images."""
    supervised = int((view.encoded.labels != -100).sum())
    tiles = sum(image.tiles for image in view.images)
    about = f"{len(view.encoded.ids):,} tokens, {supervised:,} supervised, {tiles} tiles"
    figures = "".join(_thumbnail(view, index) for index in range(min(len(view.images), _MAX_THUMBNAILS)))
    if len(view.images) > _MAX_THUMBNAILS:
        figures += f"<p class=quiet>and {len(view.images) - _MAX_THUMBNAILS} more images</p>"
    spans = "".join(f"<span class={span.kind}>{_span(span)}</span>" for span in view.spans)
    return (
        f"<div class=example><h3>{text(view.sample.id[:120])}</h3><p class=quiet>{text(view.sample.file)}: {about}</p>"
        f"{figures}<div class=text>{spans}</div></div>"
    )


def _span(span: Span) -> str:
    if span.kind == "image":
        return f"[image, {span.stop - span.start:,} tokens]"
    if len(span.text) > _MAX_SPAN_CHARACTERS:
        half, omitted = _MAX_SPAN_CHARACTERS // 2, len(span.text) - _MAX_SPAN_CHARACTERS
        return f"{text(span.text[:half])} [… {omitted:,} characters …] {text(span.text[-half:])}"
    return text(span.text)


def _thumbnail(view: SampleView, index: int) -> str:
    image = view.images[index]
    small = decode_image(view.sample.read_image(index))
    small.thumbnail(_THUMBNAIL_SIZE)
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=85)
    data = base64.b64encode(stream.getvalue()).decode()
    grid = f"{image.grid[0]} × {image.grid[1]} tiles and the base view" if image.grid[0] else "base view only"
    about = f"{image.size[0]:,} × {image.size[1]:,} pixels; {grid}, {image.num_tokens:,} tokens"
    return (
        f'<figure><img alt="" src="data:image/jpeg;base64,{data}">'
        f"<figcaption>{text(image.name)}<br>{text(about)}</figcaption></figure>"
    )
