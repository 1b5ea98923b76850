"""The table of all names, and the page of the hyperparameters that all have."""

from __future__ import annotations

from docs.generate.facts import checkpoints, devices, loss_against_32_bits, stored, takes_pieces
from docs.generate.fields import common_rows
from docs.generate.markdown import page, table
from optfactory.registry import get_optimizer_info, list_optimizers

_HEADER = [
    *("name", "family", "bits", "bytes a parameter", "paged", "devices", "engines"),
    *("loss", "checkpoints"),
]
_NOTES = """\
- *bytes a parameter*: of state, for a matrix of 4096 x 4096, scales included.
- *devices*: CPU (native kernels), CUDA (kernels that were compiled and emulated, not yet run on a
  card), others (torch operations).
- *engines*: all names train under DDP, FSDP2, HSDP, tensor parallelism and ZeroRedundancyOptimizer;
  some under FSDP1, too.
- *loss*: by how much the loss of 2000 steps differs from that of 32 bits
  ([the task](../how-to/widths.md#what-they-cost)).
- *checkpoints*: whose state dicts are read and written, beside those of the family's other names.

Every name is compared with a float64 reference of its paper, in every dtype, with every option, on
every backend; its page says with what else."""


def names_page() -> str:
    """The table of all names."""
    names = list_optimizers()
    return page(
        "All names",
        f"{len(names)} names; [how they are made](../explanation/names.md#how-names-are-made), and "
        "[what each means](../explanation/names.md#the-rules).",
        '<div class="names-table" markdown>',
        table(_HEADER, map(_row, names)),
        "</div>",
        "## The columns",
        _NOTES,
    )


def _row(name: str) -> list[str]:
    info = get_optimizer_info(name)
    kept = stored(info)
    off = loss_against_32_bits(info, kept.width)
    return [
        f"[`{name}`](optimizers/{info.family}.md#{name})",
        info.family,
        kept.width.removesuffix("bit"),
        f"{kept.bytes_per_parameter:.2f}",
        "yes" if info.is_paged else "no",
        ", ".join(devices(info)),
        "all" if takes_pieces(info) else "all but FSDP1",
        "" if off is None else f"{off:+.2f} %",
        ", ".join(peer.removeprefix("torch.optim.") for peer in checkpoints(info)),
    ]


def hyperparameters_page() -> str:
    """The fields that every optimizer has."""
    return page(
        "Hyperparameters of all optimizers",
        "Each family has these beside its own; where its default is another, its page says so. "
        "[Options](options.md) says what they are for.",
        table(["key", "values", "default", "what it is"], common_rows()),
    )
