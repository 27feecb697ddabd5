"""What was measured and what follows from it: the ground floor, usable alone in a notebook.

Public names are imported on first use, so that `import tsdfm_bench.results` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "store": (
        "CellState CorruptFile PlanConflict RunFolder Samples Scores StoreError UnsafeName canonical_json check_name "
        "json_hash plan_hash read_arrays read_json read_samples read_scores read_table slug write_arrays write_bytes "
        "write_json write_samples write_scores write_table write_text"
    ),
    "stats": "Interval bootstrap holm n_to_separate ratio",
    "columns": "CellColumns FORMS Terms cell_columns read_columns terms write_columns",
    "replicates": "Replicates",
    "frontier": ("Curve Expense Frontier OutOfRange Point at_entropy dominated_area expenses frontiers read_curve"),
    "resampling": "compare_many compare_terms intervals permutation_terms separation",
    "compare": "Change Comparison compare_runs comparison_json comparison_table",
    "style": "Label figure_metadata finish looks new_figure rows_used save_figure styled",
    "plots": "Drawing KINDS NothingToDraw draw",
    "flags": "FLAGS Flag find_flags with_flags",
    "tables": "LonePerplexity MixedColumn Table TableColumn TableRow Value main_table main_tables",
    "render": "FORMATS to_csv to_html to_json to_latex to_markdown to_rich",
    "schema": "COLUMNS SCHEMA_VERSION Column SchemaError empty from_rows read_summary row validate write_summary",
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names.split()}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
