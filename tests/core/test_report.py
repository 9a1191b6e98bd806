"""What pages draw: names beside points that can be read, figures that are not known among numbers."""

from __future__ import annotations

import random

from llmworks.core.plots import LABEL_SIZE, place_labels
from llmworks.core.report import MISSING, ReportBuilder


def overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return min(one[2], other[2]) > max(one[0], other[0]) and min(one[3], other[3]) > max(one[1], other[1])


def test_names_of_points_that_lie_together_can_be_read() -> None:
    """Pairs of points in one place, and points in a column a line apart: no label lies on another."""
    points = [(f"name-{number}", 100.0 + 90 * (number // 2), 50.0) for number in range(8)] + [
        (f"row-{number}", 300.0, 120.0 + 9 * number) for number in range(6)
    ]
    random.Random(1).shuffle(points)
    boxes = [
        (x + dx, y + dy - LABEL_SIZE / 2, x + dx + 0.56 * LABEL_SIZE * len(text), y + dy + LABEL_SIZE / 2)
        for (text, x, y), (dx, dy) in zip(points, place_labels(points), strict=True)
    ]
    assert not any(overlap(one, other) for number, one in enumerate(boxes) for other in boxes[number + 1 :])


def test_a_figure_that_is_not_known_stands_among_numbers() -> None:
    report = ReportBuilder()
    report.title = "t"
    report.add_table("All", ("name", "speed"), [("a", 1.5), ("b", MISSING)])
    page = report.to_html()
    assert "<th class=n>speed</th>" in page
    assert f"<td class=n>{MISSING}</td>" in page
    assert "<th>name</th>" in page
