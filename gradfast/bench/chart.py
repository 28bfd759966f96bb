"""bench.png: the ratios as bars, with the middle half of the pairs as whiskers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gradfast.extras import require
from gradfast.files import atomic_write

# Okabe and Ito's palette, which most colour-blind readers tell apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#f0e442")


def draw_chart(report: dict[str, Any], path: Path) -> None:
    """Draw one group of bars a workload, dtype and optimiser, one bar a peer.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    require("matplotlib", "bench", path.name)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    results = report["results"]
    groups = list(dict.fromkeys((result["workload"], result["dtype"], result["optimizer"]) for result in results))
    peers = list(dict.fromkeys(result["peer"] for result in results))
    figure = Figure(figsize=(max(6.0, 1.5 + 1.1 * len(groups)), 4.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(len(peers), 1)
    for position, peer in enumerate(peers):
        of_peer = [result for result in results if result["peer"] == peer]
        at = [
            groups.index((r["workload"], r["dtype"], r["optimizer"])) + (position + 0.5) * width - 0.4 for r in of_peer
        ]
        ratios = [result["ratio"] for result in of_peer]
        median = [ratio["median"] for ratio in ratios]
        spread = [
            [max(ratio["median"] - ratio["low"], 0) for ratio in ratios],
            [max(ratio["high"] - ratio["median"], 0) for ratio in ratios],
        ]
        axes.bar(at, median, width, yerr=spread, label=peer, color=COLOURS[position % len(COLOURS)], capsize=2)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(groups)), ["\n".join(group) for group in groups])
    axes.set_xlim(-0.5, max(len(groups), 1) - 0.5)  # also where the last bar of a group is left out
    axes.set_ylabel("time of gradfast over the peer's")
    axes.set_title(report["environment"]["device_name"])
    axes.grid(axis="y", alpha=0.25)
    if peers:
        figure.legend(loc="outside lower center", ncols=len(peers), fontsize="small")  # over no bar
    with atomic_write(path) as file:
        FigureCanvasAgg(figure).print_png(file)
