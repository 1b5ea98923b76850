"""The page of one family: its step, hyperparameters, names, devices, checkpoints and sources."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import dedent

from docs.generate.facts import (
    ROOT,
    checkpoints,
    loss_against_32_bits,
    names_of,
    stored,
    takes_pieces,
)
from docs.generate.fields import own_rows
from docs.generate.markdown import excerpt, math, page, table, with_papers
from docs.generate.mathematics import aligned, formula, symbol
from docs.generate.selections import Selection, selections
from optfactory.config.names import WIDTHS
from optfactory.config.schema import OptimizerConfig
from optfactory.registry import OptimizerInfo, get_optimizer_info, list_optimizers
from optfactory.rules.language import RuleText, read_trust_ratio_text, read_update_text

_UP = "../../../../"  # from the page to the root of the repository


def optimizer_page(family: str) -> str:
    """The page of a family."""
    info = get_optimizer_info(family)
    return page(
        family,
        with_papers(_module_docstring(info.base)),
        with_papers(inspect.cleandoc(info.base.__doc__ or "")),
        _step(family),
        _hyperparameters(family),
        _names(family),
        _where(family),
        _checkpoints(info),
        _comparisons(info),
        _sources(family, info),
    )


def _module_docstring(schema: type[OptimizerConfig]) -> str:
    return inspect.cleandoc(sys.modules[schema.__module__].__doc__ or "")


def _step(family: str) -> str:
    found = selections(family)
    parts = ["## The step", _reading(found[0])]
    parts += _texts("### With {}", [(s, read_update_text(s.rule)) for s in found])
    parts += ["The parameter then is", math(_skeleton(found))]
    ratios = [(s, read_trust_ratio_text(s.rule)) for s in found if s.rule.trust_ratio]
    if ratios:
        parts += ["### Trust ratio", *_texts("#### With {}", ratios)]
    scalars = inspect.getsource(get_optimizer_info(family).base.scalars)
    parts += [
        "### Numbers of a step",
        "What depends on the step and on hyperparameters alone is computed once a step, in "
        "float64:",
        excerpt("python", dedent(scalars)),
    ]
    return "\n\n".join(filter(None, parts))


def _reading(default: Selection) -> str:
    states = ", ".join(f"`{spec.name}`" for spec in default.rule.states) or "none"
    whole = " Then u is made orthogonal ([how](../../how-to/muon.md))."
    return (
        "Rendered from the rule text that all backends run. g is the gradient, p the parameter, "
        f"u the direction; kept of each element: {states}.{whole if default.rule.transform else ''}"
    )


def _texts(heading: str, found: list[tuple[Selection, RuleText]]) -> Iterator[str]:
    """Each text once, below the fewest settings that select it; none for the default."""
    first: dict[Path, tuple[Selection, RuleText]] = {}
    for selection, text in sorted(found, key=lambda item: len(item[0].settings)):
        first.setdefault(text.path, (selection, text))
    for selection, text in first.values():
        if selection.settings:
            yield heading.format(selection.title)
        yield _comments(text)
        yield math(formula(text))


def _comments(text: RuleText) -> str:
    """What a rule text says of itself."""
    if not text.path.is_file():
        return ""
    lines = text.path.read_text(encoding="utf-8").splitlines()
    told = [line.removeprefix("//").strip() for line in lines if line.startswith("//")]
    return with_papers(" ".join(told))


def _skeleton(found: Sequence[Selection]) -> str:
    scaled = any(s.rule.trust_ratio and s.rule.ratio_of != "g" for s in found)
    ratio = rf"{symbol('ratio')}\, " if scaled else ""
    return aligned([rf"p &\leftarrow {symbol('decay')}\, p - {symbol('step_size')}\, {ratio}u"])


def _hyperparameters(family: str) -> str:
    rows = own_rows(family)
    return (
        "## Hyperparameters\n\n"
        + table(["key", "values", "default", "what it is"], rows)
        + "\n\nAnd [those of all optimizers](../hyperparameters.md)."
    )


def _names(family: str) -> str:
    rows = []
    for info in sorted(names_of(family, list_optimizers()), key=_order):
        kept = stored(info)
        formats = ", ".join(f"{name}: {form}" for name, form in kept.states.items())
        off = loss_against_32_bits(info, kept.width)
        rows.append(
            [
                f'<a id="{info.name}"></a>`{info.name}`',
                kept.width.removesuffix("bit"),
                f"{kept.bytes_per_parameter:.2f}",
                formats,
                "" if off is None else f"{off:+.2f} %",
                ", ".join(alias for alias in info.aliases if alias != info.name),
            ]
        )
    header = ["name", "bits", "bytes a parameter", "states", "loss", "other spellings"]
    return "\n\n".join(
        [
            "## Names",
            table(header, rows),
            "Bytes are those of a matrix of 4096 x 4096, scales included. Loss is by how much the "
            "final loss of 2000 steps differs from that of 32 bits "
            "([the task](../../how-to/widths.md#what-they-cost)). Spellings go without `_`, "
            "`-` and capitals.",
            _missing(get_optimizer_info(family).base),
        ]
    ).strip()


def _order(info: OptimizerInfo) -> tuple[bool, int]:
    width = info.name.removeprefix("paged_").removeprefix(info.family)
    return info.is_paged, ["", *WIDTHS].index(width)


def _missing(schema: type[OptimizerConfig]) -> str:
    missed = [f"{width}, whose loss is {off} % off" for width, off in schema.too_coarse.items()]
    return f"There is no name of {', '.join(missed)}." if missed else ""


def _where(family: str) -> str:
    infos = names_of(family, list_optimizers())
    flat = [info.name for info in infos if takes_pieces(info)]
    pieces = f"FSDP1 takes {', '.join(f'`{name}`' for name in flat)}." if flat else ""
    return "\n\n".join(
        [
            "## Where it runs",
            "On CPUs by native kernels, on NVIDIA GPUs by CUDA kernels, which so far were compiled "
            "and emulated, not run on a card; elsewhere, and without a compiler, by torch "
            "operations. Paged names run on CPUs and NVIDIA GPUs.",
            f"Under DDP, FSDP2, HSDP, tensor parallelism and ZeroRedundancyOptimizer. "
            f"{pieces or 'FSDP1 is refused: its pieces say nothing of whole tensors.'}",
        ]
    )


def _checkpoints(info: OptimizerInfo) -> str:
    peers = checkpoints(info)
    told = f"State dicts of {', '.join(peers)} are read, and written" if peers else ""
    return "\n\n".join(
        [
            "## Checkpoints",
            f"State goes between all names above{'. ' + told if told else ''} "
            "([how](../../how-to/checkpoints.md)).",
        ]
    )


def _comparisons(info: OptimizerInfo) -> str:
    reference = f"tests/reference/{info.family}.py"
    rows = [f"- every option, dtype and backend with [a float64 reference]({_UP}{reference})"]
    if not (ROOT / reference).is_file():  # of a family that is being added
        rows = ["- nothing yet: it has no float64 reference"]
    if info.base.torch_peer:
        rows.append(f"- steps and state dicts with torch.optim.{info.base.torch_peer.name}")
    others = [peer for peer in checkpoints(info) if not peer.startswith("torch.optim")]
    if others:
        rows.append(f"- state dicts with {' and '.join(others)}")
    rows.append("- after 2000 steps, each width with 32 bits")
    return "## Compared with\n\n" + "\n".join(rows)


def _sources(family: str, info: OptimizerInfo) -> str:
    found = selections(family)
    files = {Path(sys.modules[info.base.__module__].__file__ or "")}
    files |= {read_update_text(s.rule).path for s in found}
    files |= {read_trust_ratio_text(s.rule).path for s in found if s.rule.trust_ratio}
    names = sorted(str(path.relative_to(ROOT)) for path in files)
    return "## Sources\n\n" + "\n".join(f"- [{name}]({_UP}{name})" for name in names)
