"""Pages: a template of this folder's ``templates`` filled, all with one style sheet."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

from nemo_ampo.text import printable


def render_template(name: str, context: Mapping[str, Any]) -> str:
    """A page as text; ``drawn`` marks what is markup already, all else is escaped.

    Args:
        name: a file of ``templates``.
        context: every name that it uses; one more or less is an error.
    """
    import jinja2
    from markupsafe import Markup

    folder = resources.files("nemo_ampo.report").joinpath("templates")
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(lambda file: folder.joinpath(file).read_text("utf-8")),
    )
    environment.filters["drawn"] = Markup
    return printable(environment.get_template(name).render(**context))
