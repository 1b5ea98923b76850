"""Generated pages: up to date, complete, and their formulas say what the rule texts say."""

from __future__ import annotations

import ast

import pytest

from docs.generate.fields import common_rows, own_rows
from docs.generate.mathematics import latex, symbol
from docs.generate.pages import FOLDER, expected_pages, stale_pages, write_pages
from optfactory import list_optimizers
from optfactory.config.schema import family_class
from optfactory.registry import get_optimizer_info
from optfactory.rules.resources import data_dir

# Which optimizers for matrices run behind their own text (optfactory/rules/parts.py).
OF_NO_FAMILY = {"direct.cuh"}


def test_pages_are_up_to_date() -> None:
    assert stale_pages() == [], "run: python -m docs.generate --write"


def test_what_is_out_of_date_is_found_and_mended(tmp_path) -> None:
    assert "names.md: missing" in stale_pages(tmp_path)
    written = write_pages(tmp_path)
    assert set(written) == set(expected_pages())
    page = tmp_path / "optimizers" / "adamw.md"
    good = page.read_text(encoding="utf-8")
    page.write_text(good.replace("0.999", "0.99"), encoding="utf-8")
    (tmp_path / "optimizers" / "gone.md").write_text(good, encoding="utf-8")
    (tmp_path / "by_hand.md").write_text("# Mine\n", encoding="utf-8")
    assert sorted(stale_pages(tmp_path)) == [
        "optimizers/adamw.md: differs from the code",
        "optimizers/gone.md: of no family",
    ]
    assert sorted(write_pages(tmp_path)) == ["optimizers/adamw.md", "optimizers/gone.md"]
    assert stale_pages(tmp_path) == []
    assert (tmp_path / "by_hand.md").is_file()


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("a - (b - c)", r"A - \left(B - C\right)"),
        ("a - b - c", "A - B - C"),
        ("a + (b + c)", "A + B + C"),
        ("(a + b) * c", r"\left(A + B\right)\, C"),
        ("a * (b * c)", r"A\, B\, C"),
        ("-(a + b) * c", r"\left(-\left(A + B\right)\right)\, C"),
        ("a / (b / c)", r"\frac{A}{\frac{B}{C}}"),
        ("a / b * c", r"\frac{A}{B}\, C"),
        ("fma(a + b, c, -a)", r"\left(A + B\right)\, C + -A"),
        ("fma(a, b, c) * c", r"\left(A\, B + C\right)\, C"),
        ("sqrt(a + b) - abs(c)", r"\sqrt{A + B} - \lvert C \rvert"),
        ("sign(max(a, 0.5))", r"\operatorname{sign}\left(\max\left(A, 0.5\right)\right)"),
        (
            "where(a > 0, where(b != c, a, 1), 1)",
            r"\begin{cases} A & \text{if } A > 0,\ B \ne C \\ 1 & \text{else} \end{cases}",
        ),
        (
            "where(a > 0, where(b <= c, a, 2), 1)",
            r"\begin{cases} \begin{cases} A & \text{if } B \le C \\ 2 & \text{else} \end{cases}"
            r" & \text{if } A > 0 \\ 1 & \text{else} \end{cases}",
        ),
    ],
)
def test_expressions_as_latex(text: str, written: str) -> None:
    found = latex(ast.parse(text, mode="eval").body)
    for letter in "abc":
        found = found.replace(symbol(letter), letter.upper())
    assert found == written


def test_names_are_papers_letters_or_stay_as_they_are() -> None:
    names = ["beta1", "one_minus_beta2", "eps_hat", "exp_avg_sq", "alpha", "p_norm"]
    assert [symbol(name) for name in names] == [
        r"\beta_1",
        r"(1 - \beta_2)",
        r"\hat{\varepsilon}",
        r"\text{exp_avg_sq}",
        r"\alpha",
        r"\lVert p \rVert",
    ]


def test_every_rule_text_is_on_a_page() -> None:
    pages = "".join(expected_pages().values())
    folders = ("rules", "trust_ratios")
    texts = {path for folder in folders for path in (data_dir("kernels") / folder).glob("*.cuh")}
    assert {path.name for path in texts if f"/{path.name}](" not in pages} == OF_NO_FAMILY


def test_every_name_and_every_field_is_on_a_page() -> None:
    pages = expected_pages()
    common = {row[0] for row in common_rows()}
    for name in list_optimizers():
        info = get_optimizer_info(name)
        assert f'<a id="{name}"></a>' in pages[f"optimizers/{info.family}.md"]
        assert f"(optimizers/{info.family}.md#{name})" in pages["names.md"]
        own = {row[0] for row in own_rows(info.family)}
        fields = family_class(info.config_class).model_fields.keys() - {"name"}
        assert {f"`{key}`" for key in fields} <= own | common


def test_pages_are_where_the_site_looks_for_them() -> None:
    assert FOLDER.parent.name == "pages"
    assert (FOLDER / "names.md").is_file()
