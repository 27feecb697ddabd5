"""Options from a command line (text) and from a table (typed) mean the same."""

from __future__ import annotations

import pytest

from tsdfm_bench.errors import UsageError
from tsdfm_bench.tasks.options import read_options

DEFAULTS = {"stride": 10, "scale": 5.0, "deep": False, "names": ("all",), "path": None}


def test_defaults():
    assert read_options("x", {}, DEFAULTS) == DEFAULTS


def test_text_becomes_the_type_of_the_default():
    given = {"stride": "4", "scale": "2.5", "deep": "true", "names": "a+b", "path": "/x"}
    expected = {"stride": 4, "scale": 2.5, "deep": True, "names": ("a", "b"), "path": "/x"}
    assert read_options("x", given, DEFAULTS) == expected
    assert read_options("x", expected, DEFAULTS) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"strid": 3}, "stride"),
        ({"stride": "four"}, "whole number"),
        ({"stride": 1.5}, "whole number"),
        ({"deep": "perhaps"}, "true or false"),
        ({"scale": "big"}, "a number"),
    ],
)
def test_wrong_options_are_named(given, message):
    with pytest.raises(UsageError, match=message):
        read_options("x", given, DEFAULTS)
