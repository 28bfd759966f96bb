"""The drawings of docs/how-it-works.md, as SVG: the two phases, where gradients are kept, and the ordered sum.

    python docs/site/draw_how.py

Colour is never alone: reads point down and say so, writes point up and say so.
"""

from __future__ import annotations

from pathlib import Path

IMAGES = Path(__file__).parents[1] / "images"
READ, WRITE, CHIP, INK, PALE = "#0072b2", "#d55e00", "#009e73", "#222222", "#eef1f4"


class Drawing:
    """An SVG that grows by shapes."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img" aria-label="{title}" font-family="sans-serif" font-size="14">',
            f"<title>{title}</title>",
            '<rect width="100%" height="100%" rx="8" fill="white"/>',
        ]

    def box(self, x: float, y: float, width: float, height: float, fill: str, stroke: str = INK) -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" fill="{fill}" stroke="{stroke}"/>'
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        anchor: str = "middle",
        colour: str = INK,
        size: int = 14,
        bold: bool = False,
    ) -> None:
        weight = ' font-weight="bold"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{colour}" font-size="{size}"{weight}>{text}</text>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: str = INK, dashed: bool = False) -> None:
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{colour}" stroke-width="2"{dash}/>'
        )

    def arrow(self, x1: float, y1: float, x2: float, y2: float, colour: str = INK) -> None:
        length = ((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5
        dx, dy = 8 * (x2 - x1) / length, 8 * (y2 - y1) / length
        self.line(x1, y1, x2 - dx, y2 - dy, colour)
        corners = [(x2, y2), (x2 - dx - dy / 2, y2 - dy + dx / 2), (x2 - dx + dy / 2, y2 - dy - dx / 2)]
        points = " ".join(f"{x:g},{y:g}" for x, y in corners)
        self.parts.append(f'<polygon points="{points}" fill="{colour}"/>')

    def __str__(self) -> str:
        return "\n".join([*self.parts, "</svg>", ""])


def two_phases() -> Drawing:
    """Each array of a parameter against the phases of a step: who reads and writes it when, in bytes."""
    drawing = Drawing(760, 400, "Bytes moved per fp32 parameter in the two phases of a clipped step")
    phases = [("phase 1", "measure"), ("barrier", "decide"), ("phase 2", "update")]
    left, middle, right = 250, 410, 570
    for x, width, (name, what) in zip((170, 345, 490), (160, 130, 160), phases, strict=True):
        drawing.box(x, 20, width, 300, PALE, PALE)
        drawing.text(x + width / 2, 42, name, bold=True)
        drawing.text(x + width / 2, 60, what)
    drawing.text(700, 42, "bytes", bold=True)
    rows = [
        ("g", "gradient", 4, 4, 0),
        ("p", "parameter", 0, 4, 4),
        ("m", "momentum, exp_avg", 0, 4, 4),
        ("v", "exp_avg_sq", 0, 4, 4),
    ]
    for number, (symbol, name, measured, read, written) in enumerate(rows):
        y = 100 + 58 * number
        drawing.text(22, y, symbol, "start", bold=True, size=18)
        drawing.text(22, y + 17, name + (" (Adam only)" if symbol == "v" else ""), "start", size=11)
        drawing.line(20, y + 28, 740, y + 28, "#cccccc", dashed=symbol == "m")
        if measured:
            drawing.arrow(left - 22, y - 18, left - 22, y + 20, READ)
            drawing.text(left - 12, y + 6, "read 4", "start", READ)
        drawing.arrow(right - 55, y - 18, right - 55, y + 20, READ)
        drawing.text(right - 46, y + 6, "read 4", "start", READ)
        if written:
            drawing.arrow(right + 10, y + 20, right + 10, y - 18, WRITE)
            drawing.text(right + 19, y + 6, "write 4", "start", WRITE)
        drawing.text(700, y + 6, str(measured + read + written), bold=True, size=18)
    drawing.text(middle, 115, "norm = √Σg²")
    drawing.text(middle, 150, "c = min(1, limit", size=13)
    drawing.text(middle, 168, "/ (norm + 1e-6))", size=13)
    drawing.text(middle, 205, "nothing of the")
    drawing.text(middle, 222, "arrays' size moves")
    drawing.text(22, 350, "SGD with momentum, Lion: g + p + m", "start")
    drawing.text(700, 350, "24", bold=True, size=18, colour=WRITE)
    drawing.text(22, 380, "Adam, AdamW: g + p + m + v", "start")
    drawing.text(700, 380, "32", bold=True, size=18, colour=WRITE)
    return drawing


def on_chip() -> Drawing:
    """One block's chunks in the order of reading, and where their gradients are when phase 2 wants them."""
    drawing = Drawing(760, 270, "Where gradients are when the second phase reads them, on a GPU")
    width, count = 52, 12
    kept, cached = 4, 3
    x0, y0 = 110, 80
    drawing.text(22, y0 + 24, "a block's", "start")
    drawing.text(22, y0 + 41, "chunks", "start")
    for number in range(count):
        x = x0 + width * number
        if number < kept:
            fill, word = "#bfe5d8", "kept"
        elif number >= count - cached:
            fill, word = "#cfe3f5", "L2"
        else:
            fill, word = "white", "memory"
        drawing.box(x, y0, width - 4, 44, fill)
        drawing.text(x + width / 2 - 2, y0 + 20, str(number), bold=True)
        drawing.text(x + width / 2 - 2, y0 + 37, word, size=10)
    end = x0 + width * count - 4
    drawing.arrow(x0, 58, end, 58, READ)
    drawing.text(x0, 46, "phase 1 reads every gradient once, first to last: 4 bytes", "start", READ)
    drawing.arrow(end, 150, x0, 150, WRITE)
    drawing.text(end, 172, "phase 2 goes back, last to first", "end", WRITE)
    drawing.text(x0, 205, "kept: copied to shared memory while it was read. Costs 0 bytes more.", "start", CHIP)
    drawing.text(x0, 225, "L2: read last, and so the likeliest to be in the cache still. Costs 0.", "start", READ)
    drawing.text(
        x0, 245, "memory: read a second time. Costs 4. With no such chunk a step moves 20 or 28 bytes.", "start"
    )
    return drawing


def ordered_sum() -> Drawing:
    """Chunks of fixed size, taken by any worker in any order, and their sums added in the order of the table."""
    drawing = Drawing(760, 300, "Partial sums are added in the order of the table, whoever made them")
    tensors = [("conv1.weight", 1), ("layer1.weight", 4), ("fc.weight", 2)]
    workers = [0, 1, 1, 0, 1, 0, 0]
    colours, names = ("#cfe3f5", "#fbdcc8"), ("thread A", "thread B")
    width, x, number = 88, 110, 0
    drawing.text(22, 62, "gradients", "start")
    drawing.text(22, 162, "their sums", "start")
    for name, chunks in tensors:
        drawing.text(x, 34, name, "start", size=12)
        for _ in range(chunks):
            drawing.box(x, 42, width - 4, 34, colours[workers[number]])
            drawing.text(x + width / 2 - 2, 64, names[workers[number]], size=12)
            drawing.arrow(x + width / 2 - 2, 80, x + width / 2 - 2, 138)
            drawing.box(x, 142, width - 4, 34, "white")
            drawing.text(x + width / 2 - 2, 164, f"s{number} = Σg²")
            x += width
            number += 1
    drawing.text(22, 104, "in any", "start", size=12)
    drawing.text(22, 120, "order", "start", size=12)
    drawing.arrow(110, 192, 722, 192)
    drawing.text(
        110, 214, "s0 + s1 + s2 + s3 + s4 + s5 + s6, in float64, in one fixed order, by every thread or block", "start"
    )
    drawing.text(
        110, 246, "The table depends on the tensors' sizes alone. So the norm is the same to the last bit", "start"
    )
    drawing.text(
        110, 266, "for any number of threads, and from run to run; and everybody who adds comes to the", "start"
    )
    drawing.text(110, 286, "same decision, so that nobody has to send it to the others.", "start")
    return drawing


DRAWINGS = {"two-phases.svg": two_phases, "on-chip.svg": on_chip, "ordered-sum.svg": ordered_sum}


def main() -> None:
    for name, draw in DRAWINGS.items():
        (IMAGES / name).write_text(str(draw()), encoding="utf-8")


if __name__ == "__main__":
    main()
