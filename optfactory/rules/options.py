"""What kernels do beside an optimizer's mathematics: clipping, skipping, rounding, quantizing.

A param group's hyperparameters select a `KernelOptions`; kernels are compiled for it, so that an
option that is off costs nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

# Scalars that every kernel gets beside its rule's own: float32, so that the step comes in two.
COMMON_SCALARS = ("step", "step_high", "seed", "percentile")
_STEPS = 2**24

# The key of a param group that stands for its stream of random numbers; see `noise_after_reset`.
NOISE_KEY = "noise"

# Numbers that seeds may have: all are float32.
SEEDS = 2**24

# Squared gradient norms that percentile clipping remembers (bitsandbytes).
CLIP_HISTORY = 100


@dataclass(frozen=True)
class KernelOptions:
    """How kernels treat gradients, states and parameters around the rule.

    Attributes:
        maximizes: gradients change their sign.
        clips: gradients are scaled by the percentile clipping's factor.
        skips_zeros: elements whose gradient is 0 keep parameter and states.
        nonfinite: elements whose gradient is not finite are updated as the formula says
            (``propagate``), keep everything (``keep``), or lose their states (``reset``).
        rounding: how 16-bit parameters are stored: ``nearest``, ``stochastic`` or ``kahan``; or
            with a float32 master, of which half (``split``) or all (``fp32``) is kept beside them.
        tensor_wise: 8-bit state has one scale for the whole tensor.
        symmetric_map: the signed quantization map reaches -1.
        floors: a positive value of an unsigned state never takes the code of 0.
        bitsandbytes: scales, codes and order of decay are those of bitsandbytes' CUDA kernels.
        random_codes: codes of dynamic maps are rounded at random instead of to the nearest value.
        random_floats: some state is of floats with less than 32 bits, which are always so.
        cuts_blocks: other processes hold parts of the same blocks of 8-bit state, so that scales
            are known to none of them alone.
        cautious: steps are by those elements of the direction whose sign is the gradient's, longer
            by as much as the others are many.
        cautious_decay: decoupled weight decay spares elements whose sign is not the direction's.
    """

    maximizes: bool = False
    clips: bool = False
    skips_zeros: bool = False
    nonfinite: str = "propagate"
    rounding: str = "nearest"
    tensor_wise: bool = False
    symmetric_map: bool = False
    floors: bool = True
    bitsandbytes: bool = False
    random_codes: bool = False
    random_floats: bool = False
    cuts_blocks: bool = False
    cautious: bool = False
    cautious_decay: bool = False

    @property
    def numbers_elements(self) -> bool:
        """Whether what is random about an element depends on its number in the whole tensor."""
        return self.rounding == "stochastic" or self.draws_for_states

    @property
    def draws_for_states(self) -> bool:
        """Whether states are rounded at random."""
        return self.random_codes or self.random_floats

    @property
    def scales_first(self) -> bool:
        """Whether new scales must be known before the update: a pass of its own finds them."""
        return self.tensor_wise or self.cuts_blocks

    @classmethod
    def of(
        cls,
        group: Mapping[str, Any],
        formats: Collection[str],
        rounds: bool,
        cuts_blocks: bool = False,
    ) -> KernelOptions:
        """The options of a param group for parameters of one kind.

        Args:
            formats: of their states; what concerns codes is left at its default where there are
                none, so that one kernel serves.
            rounds: they are 16-bit, so that storing them rounds.
            cuts_blocks: blocks of their state are cut by sharding.
        """
        quantized = has_scales(formats)
        mapped = "map8" in formats
        compatible = group["compat"] == "bitsandbytes"
        resets = compatible and quantized and group["block_wise"]
        skips = group["nonfinite"] == "skip_element"
        return cls(
            maximizes=group["maximize"],
            clips=group["percentile_clipping"] < 100,
            skips_zeros=group["skip_zeros"],
            nonfinite="reset" if resets else "keep" if skips else "propagate",
            rounding=storing_of(group) if rounds else "nearest",
            tensor_wise=quantized and not group["block_wise"],
            symmetric_map=mapped and group["signed_map"] == "symmetric",
            floors=not mapped or (group["second_moment_floor"] and not compatible),
            bitsandbytes=compatible,
            random_codes=mapped and rounds_codes_at_random(group),
            random_floats=not set(formats) <= {"float32", "map8"},
            cuts_blocks=cuts_blocks,
            cautious=group["cautious"],
            cautious_decay=group["cautious_weight_decay"],
        )

    @property
    def map_kind(self) -> str:
        """Which quantization maps 8-bit state has; see `optfactory.state.quantmap.map_for`."""
        return "symmetric" if self.symmetric_map else "table" if self.bitsandbytes else "lines"


DEFAULT_OPTIONS = KernelOptions()


def has_scales(formats: Collection[str]) -> bool:
    """Whether elements of states share scales in blocks."""
    return not set(formats) <= {"float32", "bfloat16"}


def common_scalars(group: Mapping[str, Any], step: Any) -> dict[str, Any]:
    """The values of `COMMON_SCALARS` at a step, a float64 number or tensor."""
    return {
        "step": step % _STEPS,
        "step_high": step // _STEPS,
        "seed": group.get(NOISE_KEY, 0),
        "percentile": group["percentile_clipping"],
    }


def has_masters(group: Mapping[str, Any]) -> bool:
    """Whether a param group says that its 16-bit parameters have float32 masters."""
    return group["master_weights"] in ("split", "fp32")


def storing_of(group: Mapping[str, Any]) -> str:
    """How a param group's 16-bit parameters are stored; see `KernelOptions.rounding`."""
    return str(group["master_weights"] if has_masters(group) else group["param_rounding"])


def rounds_codes_at_random(group: Mapping[str, Any]) -> bool:
    """Whether a param group's 8-bit state is rounded at random."""
    return bool(group["state_rounding"] == "stochastic" and group["compat"] != "bitsandbytes")


def draws_random_numbers(group: Mapping[str, Any]) -> bool:
    """Whether a param group needs a stream of random numbers."""
    bits = {group["optim_bits"], *(group.get("state_bits") or {}).values()}
    codes = 8 in bits and (rounds_codes_at_random(group) or group.get("state_format") == "fp8")
    return codes or bool(bits & {4, 16}) or bool(group["param_rounding"] == "stochastic")


def noise_after_reset(noise: int) -> int:
    """The number of a stream of random numbers that follows one whose state was thrown away.

    Its steps count from 0 again, so that the old stream would repeat itself.
    """
    return (noise * 0x5851F + 0x14057B) % SEEDS
