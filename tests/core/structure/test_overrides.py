"""Block shapes of single layers, as people write them."""

from __future__ import annotations

from typing import Any

import pytest

from hf_sparse.core.structure.overrides import parse_block_overrides


def test_json_and_what_it_stands_for() -> None:
    assert parse_block_overrides(None) == {}
    assert parse_block_overrides('{"a": [8, -1]}') == parse_block_overrides({"a": [8, -1]}) == {"a": (8, -1)}


@pytest.mark.parametrize("given", ["[1]", {"a": [8]}, {"a": 8}, {"a": [0, 1]}, {"a": [True, 1]}, {"a": ["8", 1]}])
def test_other_forms_are_refused(given: Any) -> None:
    with pytest.raises(ValueError, match=r"block_overrides=.* must map regular expressions to \[height, width\]"):
        parse_block_overrides(given)


def test_what_is_neither_json_nor_a_regular_expression() -> None:
    with pytest.raises(ValueError, match="block_overrides='a: 1' is not JSON"):
        parse_block_overrides("a: 1")
    with pytest.raises(ValueError, match=r"block_overrides='\(' is not a regular expression"):
        parse_block_overrides({"(": [1, 1]})
