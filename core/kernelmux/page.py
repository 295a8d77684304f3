"""A template of a package as one HTML page that needs nothing beside itself; every text in it is escaped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any


def render_page(package: str, name: str, filters: Mapping[str, Callable[..., Any]], **values: Any) -> str:
    """The template `name` of a package with these values; what it names and is not given is an error."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= filters
    return environment.from_string(files(package).joinpath(name).read_text("utf-8")).render(**values)
