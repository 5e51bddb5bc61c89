"""Reads JSON and says in a phrase what is wrong with it."""

from __future__ import annotations

import json
from typing import Any


def parse_json(data: bytes) -> Any:
    """Return what a JSON text in UTF-8 holds.

    Raises:
        ValueError: what is wrong with it, whatever Python's own words are.
    """
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        wrong = f"its byte {error.start} is 0x{data[error.start]:02x}, which is no UTF-8"
        raise ValueError(wrong) from error
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except ValueError as error:  # Python would advise to change a limit of its own
        raise ValueError("it holds a number of thousands of digits") from error
