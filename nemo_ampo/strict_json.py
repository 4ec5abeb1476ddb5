"""JSON that a model wrote as its answer, read so that it can mean one thing only."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from nemo_ampo.text import one_line


def object_in(text: str) -> dict[str, Any]:
    """The JSON object from the first ``{`` of a reply to its last ``}``.

    Raises:
        ValueError: there is none, or it is not one object of JSON: a key given twice, NaN or Infinity, nested too deeply.
            The message continues a sentence about the reply.
    """
    start, end = text.find("{"), text.rfind("}")
    if start < 0 or end < start:
        raise ValueError("it has no JSON object")
    try:
        record = json.loads(text[start : end + 1], object_pairs_hook=_unique, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except _RuleError as error:
        raise ValueError(f"it {error}") from None
    except ValueError as error:  # broken JSON, or an integer of more digits than Python converts
        raise ValueError(f"it is not one JSON object ({error})") from None
    assert isinstance(record, dict), "JSON that starts with a brace is an object"
    return record


class _RuleError(ValueError):
    """JSON that Python reads, but that can be read in two ways."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in record if names.count(name) > 1)
        raise _RuleError(f'gives the key "{one_line(twice, 40)}" twice in one object')
    return record


def _no_number(name: str) -> NoReturn:
    raise _RuleError(f"holds {name}, which is no JSON")
