"""One self-contained HTML file about a run: `render_report(Material(...))`.

The page needs no network and no JavaScript to be read; a small script of its own adds sorting, filtering, hiding of
curves, a pair of texts side by side and a slider through the steps of a sequence. Everything generated passes through
`text.visible` and Jinja's autoescape, and a content security policy lets no other script than the page's own run.

    model       what a report is made of
    text        generated text as it can be shown: controls made visible, cuts, word differences
    charts      frontier, steps and cost as inline SVG
    rows        the table and the numbers of each row
    samples     texts side by side, and the steps of a sequence
    page        the whole page
"""

from __future__ import annotations

from tsdfm_bench.results.report.model import Material, Pending, Texts, Trace
from tsdfm_bench.results.report.page import render_report

__all__ = ["Material", "Pending", "Texts", "Trace", "render_report"]
