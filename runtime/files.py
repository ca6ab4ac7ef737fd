"""Reading small files with errors that name the file."""

import json
from pathlib import Path
from typing import Any

import yaml

from .errors import TritiumError


def read_text(path: Path) -> str:
    """A UTF-8 file's text. Raises TritiumError if it is missing or something else."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise TritiumError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise TritiumError(f"{path}: not UTF-8 text") from None
    except OSError as error:
        raise TritiumError(f"{path}: cannot be read ({error.strerror})") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises TritiumError if it is missing, malformed or something else."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except RecursionError:
        raise TritiumError(f"{path}: nested too deeply") from None
    except json.JSONDecodeError as error:
        raise TritiumError(f"{path}: not valid JSON (line {error.lineno}: {error.msg})") from None
    except ValueError as error:  # a number of thousands of digits
        raise TritiumError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise TritiumError(f"{path}: must hold a JSON object, got {type(value).__name__}")
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file. Raises TritiumError if it is missing, malformed or something else."""
    text = read_text(path)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise TritiumError(f"{path}: not valid YAML{f' (line {mark.line + 1})' if mark else ''}") from None
    except ValueError as error:  # a date that is none
        raise TritiumError(f"{path}: not valid YAML ({error})") from None
    if not isinstance(value, dict):
        raise TritiumError(f"{path}: must hold keys and values, got {type(value).__name__}")
    return value
