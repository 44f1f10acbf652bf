"""A JSON file from anywhere that must hold an object."""

import json
from pathlib import Path
from typing import Any

_LARGEST = 100 * 2**20


def read_object(path: Path) -> dict[str, Any]:
    """The object in a file. Raises ValueError that says what is wrong in one line, for the caller to put the name of the file to."""
    size = path.stat().st_size if path.exists() else 0
    if size > _LARGEST:
        raise ValueError(f"has {size} bytes, more than any configuration needs")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot be read: {str(error).splitlines()[0][:200]}") from error
    if not isinstance(value, dict):
        raise ValueError("is not a JSON object")
    return value
