"""The page of an experiment: `report.html`, one file that opens from a disk without a server or a network.

    contents   Table, Plot, Lanes, HeatMap, Text and their parts: what an experiment hands over
    estimates  figures with their intervals
    numerals   how a number is written: digits from its interval, one precision per column
    drawing    Plot -> SVG that follows the page's colours
    lanes      Lanes -> the same
    heatmap    HeatMap -> the same
    page       write_report, with the template page.html.j2

matplotlib and jinja2 are imported when a page is written, so importing this package costs nothing.
"""

from jaxfw.report.contents import Bar, Cell, Curve, HeatMap, Interval, Lanes, Plot, Section, Table, Text
from jaxfw.report.estimates import ratio_interval
from jaxfw.report.page import write_report

__all__ = [
    "Bar", "Cell", "Curve", "HeatMap", "Interval", "Lanes", "Plot", "Section", "Table", "Text", "ratio_interval",
    "write_report",
]  # fmt: skip
