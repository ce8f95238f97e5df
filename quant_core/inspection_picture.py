"""An inspection as a picture: bytes before and after, a map of the layers, peak memory, and the table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import median

from PIL import Image

from .drawing import SMALL, TEXT, THEMES, Sheet, font, shortened, wrapped
from .errors import SpecError, choices, gib
from .forecast import PeakReport
from .inspection import ComponentReport
from .layer_cells import Palette, draw_legend
from .layer_drawing import draw_maps
from .layer_report import LayerReport, percent

_WIDTH, _MARGIN = 1120, 28  # pixels
_BAR = 13
_HEAD = 19  # size of letters of headings
_BETWEEN = 34  # pixels between parts


def inspection_picture(
    reports: Sequence[ComponentReport],
    layers: Sequence[LayerReport],
    peak: PeakReport | None = None,
    title: str = "",
    theme: str = "dark",
) -> Image.Image:
    """What `inspect_pipeline`, `inspect_layers` and `peak_report` found of a pipeline, under a title.

    Raises:
        SpecError: the theme is neither light nor dark.
    """
    return inspection_sheet(reports, layers, peak, title, theme).image(_MARGIN)


def inspection_sheet(
    reports: Sequence[ComponentReport],
    layers: Sequence[LayerReport],
    peak: PeakReport | None = None,
    title: str = "",
    theme: str = "dark",
) -> Sheet:
    """The same, not drawn yet.

    Raises:
        SpecError: as `inspection_picture` says.
    """
    if theme not in THEMES:
        raise SpecError(f"theme is {theme!r}; use one of: {choices(THEMES)}.")
    sheet = Sheet(_WIDTH, THEMES[theme])
    palette = Palette(layers, sheet.theme)
    left, right = _MARGIN, _WIDTH - _MARGIN
    sheet.text(left, 22, shortened(title or "Inspection", 24, right - left), size=24)
    y = 70.0
    middle = left + 0.58 * (right - left) if peak else right
    below = _draw_bytes(sheet, palette, reports, layers, left, y, middle)
    if peak:
        below = max(below, _draw_peak(sheet, peak, middle + 2 * _MARGIN, y, right))
    y = below + _BETWEEN
    if any(layer.is_quantized for layer in layers):
        sheet.text(left, y, "Linear layers", size=_HEAD)
        y = draw_legend(sheet, palette, layers, left, y + 30, right)
        y = draw_maps(sheet, palette, layers, left, y + 24, right)
    _draw_table(sheet, reports, layers, left, y + _BETWEEN, right)
    return sheet


def _draw_bytes(
    sheet: Sheet,
    palette: Palette,
    reports: Sequence[ComponentReport],
    layers: Sequence[LayerReport],
    left: float,
    y: float,
    right: float,
) -> float:
    stored, full = (sum(getattr(report, key) for report in reports) for key in ("footprint", "bytes_16bit"))
    sheet.text(left, y, f"{gib(full)} in 16 bit, {gib(stored)} stored: {stored / max(full, 1):.1%}", size=_HEAD)
    y += 36
    widest = max((max(report.footprint, report.bytes_16bit) for report in reports), default=0)
    shares = {id(report): _share(report) for report in reports}
    scale = (right - left - _longest(shares.values())) / max(widest, 1)
    for report in reports:
        name = shortened(report.name, TEXT, (right - left) / 2)
        sheet.text(left, y, name)
        rest = f"{report.class_name}{', ' * bool(report.requested)}{report.requested}"
        beside = left + font(TEXT).getlength(name) + 10
        sheet.text(beside, y + 2, shortened(rest, SMALL, right - beside), sheet.theme.faint, SMALL)
        y += 22
        end = left + report.bytes_16bit * scale
        sheet.box((left, y, end, y + _BAR), sheet.theme.line)
        sheet.text(end + 8, y + _BAR / 2, gib(report.bytes_16bit), sheet.theme.faint, SMALL, "lm")
        y += _BAR + 5
        x, end = left, left + report.footprint * scale
        parts: Counter[str] = Counter()
        for layer in layers:
            if layer.component == report.name and layer.is_quantized:
                parts[layer.format] += layer.footprint
        for format_name, size in parts.items():
            sheet.box((x, y, min(x + size * scale, end), y + _BAR), palette.colours[format_name])
            x = min(x + size * scale, end)
        sheet.box((x, y, end, y + _BAR), sheet.theme.faint)
        sheet.text(end + 8, y + _BAR / 2, shares[id(report)], size=SMALL, anchor="lm")
        y += _BAR + 14
    told = "Above in 16 bit, below as stored; grey is what is in no quantized layer."
    sheet.text(left, y, shortened(told, SMALL, right - left), sheet.theme.faint, SMALL)
    return y + 16


def _share(report: ComponentReport) -> str:
    return f"{gib(report.footprint)}, {report.footprint / max(report.bytes_16bit, 1):.1%}"


def _longest(texts: Iterable[str]) -> float:
    """Pixels that the longest of them takes beside a bar."""
    return max(map(font(SMALL).getlength, texts), default=0) + 12


def _draw_peak(sheet: Sheet, peak: PeakReport, left: float, y: float, right: float) -> float:
    size = f" at {peak.width} x {peak.height}" if peak.width and peak.height else " at its default size"
    sheet.text(left, y, f"Peak memory{size}", size=_HEAD)
    y += 36
    rows = [("estimated, all on the device", peak.resident), ("estimated, only the one in use", peak.in_turn)]
    rows += [("estimated, that one streamed", peak.streamed)] if peak.streamed is not None else []
    rows += [("measured in the last run", peak.measured)] if peak.measured is not None else []
    scale = (right - left - _longest(gib(size) for _, size in rows)) / max(max(size for _, size in rows), 1)
    for text, size in rows:
        measured = text.startswith("measured")
        sheet.text(left, y, text, size=SMALL)
        y += 20
        sheet.box((left, y, left + size * scale, y + _BAR), sheet.theme.ink if measured else sheet.theme.faint)
        sheet.text(left + size * scale + 8, y + _BAR / 2, gib(size), size=SMALL, anchor="lm")
        y += _BAR + 14
    if peak.measured is not None and peak.measured_meaning:
        for line in wrapped(f"Measured: {peak.measured_meaning}.", SMALL, right - left):
            sheet.text(left, y, line, sheet.theme.faint, SMALL)
            y += 18
    return y


def _draw_table(
    sheet: Sheet,
    reports: Sequence[ComponentReport],
    layers: Sequence[LayerReport],
    left: float,
    y: float,
    right: float,
) -> float:
    head = ("component", "quantization", "16 bit", "stored", "share", "dtype", "device", "linear layers")
    head += ("median error", "worst error")
    figures = (2, 3, 4, 8, 9)
    rows = [head, *(_row(report, layers) for report in reports)]
    stored, full = (sum(getattr(report, key) for report in reports) for key in ("footprint", "bytes_16bit"))
    rows.append(("total", "", gib(full), gib(stored), f"{stored / max(full, 1):.1%}", "", "", "", "", ""))
    widths = [max(font(SMALL).getlength(row[column]) for row in rows) for column in range(len(head))]
    gap = 18
    while (over := sum(widths) + gap * (len(widths) - 1) - (right - left)) > 0:
        widest = max(range(len(widths)), key=widths.__getitem__)
        widths[widest] -= min(over, 8)
    gap = min(gap + (right - left - sum(widths) - gap * (len(widths) - 1)) / (len(widths) - 1), 2 * gap)
    for number, row in enumerate(rows):
        if number in (1, len(rows) - 1):
            end = left + sum(widths) + gap * (len(widths) - 1)
            sheet.box((left, y - 3, end, y - 2), sheet.theme.line)
            y += 5
        x = left
        for column, (cell, width) in enumerate(zip(row, widths, strict=True)):
            text = shortened(cell, SMALL, width)
            at = (x + width, "ra") if column in figures else (x, "la")
            if text:
                sheet.text(at[0], y, text, None if number else sheet.theme.faint, SMALL, at[1])
            x += width + gap
        y += 22
    y += 6
    for report in reports:
        for reason, count in Counter(report.left_out.values()).items():
            names = [name for name, why in report.left_out.items() if why == reason]
            told = f"{report.name}: {count} left out, {reason}: {', '.join(names[:3])}{', ...' if count > 3 else ''}"
            for line in wrapped(told, SMALL, right - left):
                sheet.text(left, y, line, sheet.theme.faint, SMALL)
                y += 18
    return y


def _row(report: ComponentReport, layers: Sequence[LayerReport]) -> tuple[str, ...]:
    found = [f"{count} {name}" for name, count in sorted(report.formats.items())]
    found += [f"{len(report.left_out)} left out"] if report.left_out else []
    errors = [layer.error for layer in layers if layer.component == report.name and layer.error is not None]
    return (
        report.name,
        report.requested or report.method or "-",
        gib(report.bytes_16bit),
        gib(report.footprint),
        f"{report.footprint / max(report.bytes_16bit, 1):.1%}",
        report.dtype,
        report.device,
        " + ".join(found) or "-",
        percent(median(errors)) if errors else "-",
        percent(max(errors)) if errors else "-",
    )
