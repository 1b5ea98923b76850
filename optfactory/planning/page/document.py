"""The page of a plan: one file that a browser shows without a network."""

from __future__ import annotations

from importlib import resources

from optfactory.planning.figures import PlanFigures
from optfactory.planning.kinds import KINDS
from optfactory.planning.page import bars, sections
from optfactory.planning.page.markup import Markup, element, joined
from optfactory.planning.text import headline, verdict_line

# Nothing may be loaded, whatever names of groups and parameters contain.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def render_page(plan: PlanFigures, model: str = "") -> str:
    """A plan as HTML.

    Args:
        model: what the title calls the model.
    """
    title = f"{plan.config.name} for {model}" if model else plan.config.name
    head = [
        Markup('<meta charset="utf-8">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        element("title", f"Memory plan: {title}"),
        element("style", Markup(_file("page.css") + _looks())),
    ]
    body = [
        element("header", element("h1", title), *_summary(plan)),
        element("main", *_sections(plan)),
        element("script", Markup(_file("page.js"))),
    ]
    page = element("html", element("head", *head), element("body", *body), lang="en")
    return f"<!doctype html>\n{page}\n"


def _summary(plan: PlanFigures) -> list[Markup]:
    lines = [*headline(plan).splitlines(), *filter(None, [verdict_line(plan)])]
    return [*(element("p", line) for line in lines), bars.chosen_bar(plan), bars.legend(plan)]


def _sections(plan: PlanFigures) -> list[Markup]:
    tools = element(
        "p",
        element("label", "Show names with ", element("input", id="filter", type="search")),
        element("output", id="shown", for_="filter"),
        class_="tools",
        hidden=True,
    )
    contents = [
        ("Problems", sections.problems(plan)),
        ("All names", [tools, bars.rows_of_names(plan), bars.refused_names(plan)]),
        ("Memory", sections.memory(plan)),
        ("Ranks", sections.ranks(plan) if plan.mesh else []),
        ("Param groups", sections.groups(plan)),
        ("What is not as small as the config says", sections.wide(plan)),
        ("Config", sections.config(plan)),
    ]
    present = [(title, parts) for title, parts in contents if parts]
    links = [element("a", title, href=f"#{_anchor(title)}") for title, _ in present]
    return [
        element("nav", *links, aria_label="On this page"),
        *(
            element("section", element("h2", title, id=_anchor(title)), joined(parts))
            for title, parts in present
        ),
    ]


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _looks() -> str:
    return "".join(f".k{n}{{background-color:{kind.color}}}" for n, kind in enumerate(KINDS))


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
