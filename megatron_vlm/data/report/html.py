"""The page of megatron-vlm data-report: one HTML file that needs no network. All text of the data is escaped."""

from __future__ import annotations

import base64
import html
import io
from collections import Counter, defaultdict
from collections.abc import Sequence

from megatron_vlm.data.processing.image_io import decode_image
from megatron_vlm.data.report.inspection import SampleView, Span, Suspect

_LISTED_OF_A_REASON = 50
_LONGEST_SPAN = 1600
_THUMBNAIL = (260, 180)
_MOST_THUMBNAILS = 8

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
# Nothing is fetched and nothing is run, whatever the data says.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def text(words: object) -> str:
    """Words of the data, escaped."""
    return html.escape(str(words).replace("\0", "\ufffd"))


def page(title: str, parts: Sequence[str]) -> bytes:
    """The file."""
    content = (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta http-equiv=Content-Security-Policy "
        f'content="{_POLICY}"><title>{text(title)}</title><style>{_STYLE}</style><main>' + "\n".join(parts) + "</main>"
    )
    return content.encode("utf-8", "backslashreplace")


def cards(numbers: Sequence[tuple[str, str]]) -> str:
    """(number, what it counts) side by side."""
    inside = "".join(
        f"<div class=card><b>{text(number)}</b><span>{text(what)}</span></div>" for number, what in numbers
    )
    return f"<div class=cards>{inside}</div>"


def section(heading: str, *parts: str) -> str:
    return f"<section><h2>{text(heading)}</h2>{''.join(parts)}</section>"


def picture(png: bytes, about: str) -> str:
    return f'<img alt="{text(about)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def table(header: Sequence[str], rows: Sequence[Sequence[str]], words: int, total: bool = False) -> str:
    """A table of texts; the first `words` columns are words, the others numbers, set to the right. One of numbers alone
    takes no more room than it needs, and the last row may be a total.
    """

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = ("" if place < words else " class=n" for place in range(len(cells)))
        return "".join(f"<{tag}{kind}>{text(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))

    last = len(rows) - 1 if total else -1
    body = "".join(f"<tr{' class=total' if n == last else ''}>{line(row, 'td')}</tr>" for n, row in enumerate(rows))
    kind = "" if words else " class=narrow"
    return f"<div class=wide><table{kind}><tr>{line(header, 'th')}</tr>{body}</table></div>"


def suspects(found: Sequence[Suspect], listing: str) -> str:
    """How many of each reason, and the first of each."""
    if not found:
        return "<p>None.</p>"
    counts = Counter(suspect.reason for suspect in found)
    of_reason: dict[str, list[Suspect]] = defaultdict(list)
    for suspect in found:
        of_reason[suspect.reason].append(suspect)
    parts = [f"<p>{len(found):,} entries; all are listed in {text(listing)}.</p>"]
    for reason, count in counts.most_common():
        shown = of_reason[reason][:_LISTED_OF_A_REASON]
        rows = [(suspect.sample_id[:80], suspect.source, suspect.message[:400]) for suspect in shown]
        more = f", the first {len(shown)}" if count > len(shown) else ""
        inside = table(("sample", "of", "what"), rows, words=3)
        parts.append(f"<details><summary>{text(reason)}: {count:,}{more}</summary>{inside}</details>")
    return "".join(parts)


KEY = (
    "<p class=key><span class=answer>learned</span><span class=image>image positions</span>"
    "<span class=prompt>read only</span></p>"
)


def example(view: SampleView) -> str:
    """A sample as the model reads it, with its images."""
    labels = int((view.encoded.labels != -100).sum())
    about = f"{len(view.encoded.ids):,} tokens, {labels:,} learned, {sum(image.tiles for image in view.images)} tiles"
    figures = "".join(_thumbnail(view, place) for place in range(min(len(view.images), _MOST_THUMBNAILS)))
    if len(view.images) > _MOST_THUMBNAILS:
        figures += f"<p class=quiet>and {len(view.images) - _MOST_THUMBNAILS} more images</p>"
    spans = "".join(f"<span class={span.kind}>{_span(span)}</span>" for span in view.spans)
    return (
        f"<div class=example><h3>{text(view.sample.id[:120])}</h3><p class=quiet>{text(view.sample.file)}: {about}</p>"
        f"{figures}<div class=text>{spans}</div></div>"
    )


def _span(span: Span) -> str:
    if span.kind == "image":
        return f"[image, {span.stop - span.start:,} positions]"
    if len(span.text) > _LONGEST_SPAN:
        half, left_out = _LONGEST_SPAN // 2, len(span.text) - _LONGEST_SPAN
        return f"{text(span.text[:half])} [… {left_out:,} characters …] {text(span.text[-half:])}"
    return text(span.text)


def _thumbnail(view: SampleView, place: int) -> str:
    image = view.images[place]
    small = decode_image(view.sample.read_image(place))
    small.thumbnail(_THUMBNAIL)
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=85)
    data = base64.b64encode(stream.getvalue()).decode()
    grid = f"{image.grid[0]} × {image.grid[1]} and the base view" if image.grid[0] else "base view alone"
    about = f"{image.size[0]:,} × {image.size[1]:,} pixels; {grid}, {image.positions:,} positions"
    return (
        f'<figure><img alt="" src="data:image/jpeg;base64,{data}">'
        f"<figcaption>{text(image.name)}<br>{text(about)}</figcaption></figure>"
    )
