"""Quantization maps: how 8-bit optimizer state represents numbers in [-1, 1].

A map lists the 256 values that the codes 0 to 255 stand for, in ascending order. The "dynamic"
maps (Dettmers et al. 2022, arXiv:2110.02861) cut each decade into equal cells. They are stored as
tables, bit-identical to bitsandbytes' and torchao's, because a recomputation differs in last bits.

A block of values x shares one float32 scale. With y = x / scale (IEEE division), the code of x is
that of the nearest map value: the boundary between neighbours is their float32 mid-point, and a
value on a boundary takes the even code.
"""

from __future__ import annotations

import math
import struct
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

# The upper 16 bits of the float32 patterns of 2^-23 and of 1. No boundary of a usable map lies
# below 2^-23, so smaller numbers share the first key.
_LOWEST_KEY = 104 << 7
_HIGHEST_KEY = 127 << 7

# More than what rounding to float32 can make of numbers up to 256 on the lines of a map.
LINE_MARGIN = 2.0**-14


def _float32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def _next_float32(value: float) -> float:
    (pattern,) = struct.unpack("<I", struct.pack("<f", value))
    return float(struct.unpack("<f", struct.pack("<I", pattern + 1))[0])


class Line(NamedTuple):
    """Codes of magnitudes from `first` on: floor(slope * |y| + offset), at most `last`."""

    first: float
    slope: float
    offset: float
    last: int


@dataclass(frozen=True)
class QuantizationMap:
    """An ascending table of 256 float32 values; its index is the code.

    Attributes:
        name: identifies the map in checkpoints.
        values: the 256 values, exactly representable in float32.
    """

    name: str
    values: tuple[float, ...]

    @property
    def signed(self) -> bool:
        """Whether the map has negative values."""
        return self.values[0] < 0

    @property
    def zero_code(self) -> int:
        """The code of 0."""
        return self.values.index(0.0)

    @cached_property
    def midpoints(self) -> tuple[float, ...]:
        """The 255 decision boundaries: float32 mid-points of neighbouring values."""
        pairs = zip(self.values, self.values[1:], strict=False)
        return tuple(_float32(_float32(low + high) * 0.5) for low, high in pairs)

    def nearest_code(self, y: float) -> int:
        """The code of the map value nearest to a float32 number; ties go to the even code."""
        code = bisect_left(self.midpoints, y)
        on_boundary = code < 255 and self.midpoints[code] == y
        return code + 1 if on_boundary and code % 2 else code

    @cached_property
    def keys(self) -> tuple[int, ...]:
        """The look-up table with which kernels find the nearest code without a search.

        The upper 16 bits of the float32 pattern of |y| (clamped to [2^-23, 1]) form a key; the
        entries for y >= 0 come first, those for y < 0 behind them. No interval of numbers with the
        same key holds more than one decision boundary, so that an entry can pack the code at the
        interval's lower end (upper 16 bits) with how far below the next code that end lies: adding
        the pattern's lower 16 bits carries into the code exactly behind the boundary. For negative
        y the lower bits are inverted, so that they too ascend with y.

        Raises:
            ValueError: two boundaries share an interval, i.e. the map is too fine for this table.
        """
        keys = range(_LOWEST_KEY, _HIGHEST_KEY + 1)
        return tuple(self._key_entry(key << 16, sign) for sign in (1, -1) for key in keys)

    def all_keys(self, floors: bool) -> list[int]:
        """`keys` for all upper halves of float32 patterns, as CPUs look them up without clamping.

        Entry 32768 + (pattern >> 16) belongs to a pattern that is seen as a signed number: those
        of negative numbers come first. Magnitudes outside of [2^-23, 1] take the code of its ends.

        Args:
            floors: in an unsigned map, magnitudes below the smallest value take its code.
        """
        half = len(self.keys) // 2
        positive, negative = list(self.keys[:half]), list(self.keys[half:])
        if not self.signed:
            if floors:
                (smallest,) = struct.unpack("<I", struct.pack("<f", self.values[1]))
                below = (smallest >> 16) - _LOWEST_KEY
                positive[:below] = [1 << 16] * below
            negative = positive
        above = 0x7FFF - _HIGHEST_KEY
        rows = []
        for entries, inverted in ((negative, 0xFFFF if self.signed else 0), (positive, 0)):
            codes = [(entry + inverted) >> 16 for entry in (entries[0], entries[-1])]
            least, most = (code << 16 for code in codes)
            rows += [*[least] * _LOWEST_KEY, *entries, *[most] * above]
        return rows

    def lines(self, floors: bool) -> list[Line]:
        """Straight lines that tell most codes by arithmetic, for processors with slow gathers.

        The values of a decade are equally spaced, so that the code's distance from that of zero is
        floor(slope * |y| + offset), but where that is nearly a whole number: there, `keys` decide.
        One line each for 0, for the decades and for 1. Offsets are greater by LINE_MARGIN, so that
        nearly whole is what lies less than twice that above a whole number.

        Args:
            floors: in an unsigned map, magnitudes below the smallest value take its code.
        """
        if self.name == "dynamic_symmetric":
            # Its negative codes are no mirror image: whole everywhere, so that `keys` decide.
            return [Line(0.0, 0.0, LINE_MARGIN, 0)]
        values = self.values[self.zero_code :]
        finest = 1 if self.signed else 2
        sizes = [1, *(finest << decade for decade in range(7)), 1]
        lines, start = [], 0
        for size in sizes:
            last = start + size - 1
            first = self._first_of(start)
            slope = (size - 1) / (values[last] - values[start]) if size > 1 else 0.0
            offset = start + 0.5 - values[start] * slope + LINE_MARGIN
            lines.append(Line(first, slope, offset, last))
            start += size
        if floors and not self.signed:
            lines[0] = Line(0.0, 0.0, 1.5, 1)
        return lines

    def _first_of(self, index: int) -> float:
        """The least magnitude whose code is that many above that of zero."""
        if index == 0:
            return 0.0
        code = self.zero_code + index
        boundary = self.midpoints[code - 1]
        return boundary if self.nearest_code(boundary) == code else _next_float32(boundary)

    def line_tables(self, floors: bool) -> tuple[list[int], list[float], list[Line]]:
        """`lines` as kernels look them up: by exponent, no two lines begin within one.

        Returns:
            For each exponent, at the remainder of its biased value by 32, the line at its lower end
            and the magnitude at which the next line begins (infinite if none does); all lines.
        """
        lines = self.lines(floors)
        firsts = [line.first for line in lines]
        numbers, splits = [0] * 32, [math.inf] * 32
        for exponent in range(_LOWEST_KEY >> 7, (_HIGHEST_KEY >> 7) + 1):
            low = 2.0 ** (exponent - 127)
            numbers[exponent % 32] = bisect_right(firsts, low) - 1
            begins = [first for first in firsts if low < first < 2 * low]
            if len(begins) > 1:
                raise ValueError(
                    f"map '{self.name}' is too fine: lines share the exponent of {low}"
                )
            splits[exponent % 32] = begins[0] if begins else math.inf
        return numbers, splits, lines

    def _key_entry(self, first_pattern: int, sign: int) -> int:
        def code_at(low: int) -> int:
            pattern = first_pattern + (low if sign > 0 else 0xFFFF - low)
            return self.nearest_code(sign * struct.unpack("<f", struct.pack("<I", pattern))[0])

        first, last = code_at(0), code_at(0xFFFF)
        if last - first > 1:
            raise ValueError(f"map '{self.name}' is too fine: codes {first}..{last} share a key")
        if last == first:
            return first << 16
        low, high = 0, 0xFFFF
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if code_at(middle) == first else (low, middle)
        return (first << 16) | (0xFFFF - low)


# fmt: off
_POSITIVE = (
    0.0, 5.50000038e-07, 3.25000019e-06, 7.7499999e-06, 2.12499981e-05, 4.37499984e-05,
    6.62500024e-05, 8.87499991e-05, 0.000156250011, 0.000268750038, 0.000381250022, 0.000493750034,
    0.000606250076, 0.00071875006, 0.000831249985, 0.000943750085, 0.00128124992, 0.00184375001,
    0.00240624999, 0.00296874996, 0.00353124971, 0.00409374991, 0.00465624966, 0.00521875033,
    0.00578125007, 0.00634374982, 0.00690625003, 0.00746874977, 0.00803124998, 0.00859375019,
    0.00915624946, 0.00971874967, 0.0114062503, 0.0142187504, 0.0170312505, 0.0198437516,
    0.0226562507, 0.0254687499, 0.028281251, 0.0310937501, 0.0339062512, 0.0367187522, 0.0395312496,
    0.0423437469, 0.0451562516, 0.047968749, 0.05078125, 0.053593751, 0.0564062484, 0.0592187531,
    0.0620312504, 0.0648437515, 0.0676562563, 0.0704687461, 0.0732812509, 0.0760937482, 0.078906253,
    0.0817187577, 0.0845312476, 0.0873437524, 0.0901562497, 0.0929687545, 0.0957812592,
    0.0985937491, 0.107031256, 0.12109375, 0.135156244, 0.149218753, 0.163281247, 0.177343756,
    0.19140625, 0.205468744, 0.219531253, 0.233593747, 0.247656241, 0.26171875, 0.275781274,
    0.289843738, 0.303906262, 0.317968726, 0.33203125, 0.346093744, 0.360156238, 0.374218762,
    0.388281226, 0.40234375, 0.416406244, 0.430468738, 0.444531262, 0.458593726, 0.47265625,
    0.486718714, 0.500781238, 0.514843702, 0.528906226, 0.54296875, 0.557031274, 0.571093798,
    0.585156262, 0.599218726, 0.61328125, 0.627343774, 0.641406298, 0.655468762, 0.669531226,
    0.68359375, 0.697656274, 0.711718798, 0.725781262, 0.739843726, 0.75390625, 0.767968774,
    0.782031238, 0.796093762, 0.810156226, 0.82421875, 0.838281274, 0.852343738, 0.866406262,
    0.880468726, 0.89453125, 0.908593774, 0.922656238, 0.936718762, 0.950781226, 0.96484375,
    0.978906274, 0.992968738, 1.0,
)
_UNSIGNED = (
    0.0, 3.2500003e-07, 7.7499999e-07, 2.12499981e-06, 4.37499966e-06, 6.62499997e-06,
    8.87499937e-06, 1.56249989e-05, 2.68750009e-05, 3.81249993e-05, 4.93749976e-05, 6.06250032e-05,
    7.18750016e-05, 8.31249927e-05, 9.43749983e-05, 0.000128125001, 0.000184375007, 0.000240625013,
    0.00029687502, 0.000353124982, 0.000409375032, 0.000465625024, 0.000521875045, 0.000578125007,
    0.000634375028, 0.000690625049, 0.000746875012, 0.000803125091, 0.000859375054, 0.000915625016,
    0.000971875037, 0.00114062498, 0.00142187497, 0.00170312496, 0.00198437506, 0.00226562493,
    0.00254687481, 0.00282812491, 0.00310937478, 0.00339062512, 0.00367187499, 0.00395312486,
    0.0042343745, 0.00451562507, 0.00479687471, 0.00507812481, 0.00535937492, 0.00564062456,
    0.00592187513, 0.00620312477, 0.00648437487, 0.00676562544, 0.00704687461, 0.00732812518,
    0.00760937436, 0.00789062493, 0.00817187503, 0.0084531242, 0.00873437524, 0.00901562441,
    0.00929687452, 0.00957812555, 0.00985937472, 0.010703126, 0.0121093756, 0.0135156242,
    0.0149218757, 0.0163281243, 0.0177343767, 0.0191406254, 0.020546874, 0.0219531264, 0.0233593751,
    0.0247656237, 0.0261718761, 0.0275781285, 0.0289843734, 0.0303906258, 0.0317968726, 0.033203125,
    0.0346093737, 0.036015626, 0.0374218784, 0.0388281234, 0.0402343757, 0.0416406244, 0.0430468731,
    0.0444531254, 0.0458593741, 0.0472656265, 0.0486718714, 0.0500781238, 0.0514843725,
    0.0528906249, 0.0542968772, 0.0557031296, 0.057109382, 0.0585156269, 0.0599218719, 0.0613281243,
    0.0627343804, 0.0641406327, 0.0655468777, 0.0669531226, 0.068359375, 0.0697656274, 0.0711718798,
    0.0725781247, 0.0739843771, 0.0753906295, 0.0767968819, 0.0782031268, 0.0796093792,
    0.0810156241, 0.0824218765, 0.0838281289, 0.0852343738, 0.0866406262, 0.0880468711,
    0.0894531235, 0.0908593759, 0.0922656283, 0.0936718807, 0.0950781256, 0.096484378, 0.0978906304,
    0.0992968753, 0.103515625, 0.110546872, 0.117578126, 0.124609374, 0.131640613, 0.138671875,
    0.145703137, 0.152734369, 0.159765631, 0.166796863, 0.173828125, 0.180859387, 0.187890619,
    0.194921881, 0.201953113, 0.208984375, 0.216015637, 0.223046869, 0.230078131, 0.237109363,
    0.244140625, 0.251171857, 0.258203119, 0.265234381, 0.272265613, 0.279296875, 0.286328137,
    0.293359369, 0.300390601, 0.307421863, 0.314453125, 0.321484387, 0.328515619, 0.335546851,
    0.342578113, 0.349609375, 0.356640637, 0.363671869, 0.370703101, 0.377734363, 0.384765625,
    0.391796887, 0.398828119, 0.405859351, 0.412890613, 0.419921875, 0.426953137, 0.433984369,
    0.441015601, 0.448046863, 0.455078125, 0.462109387, 0.469140619, 0.476171851, 0.483203113,
    0.490234375, 0.497265607, 0.504296899, 0.511328101, 0.518359363, 0.525390625, 0.532421827,
    0.539453149, 0.546484351, 0.553515673, 0.560546875, 0.567578137, 0.574609399, 0.581640601,
    0.588671923, 0.595703125, 0.602734387, 0.609765649, 0.616796851, 0.623828173, 0.630859375,
    0.637890637, 0.644921899, 0.651953101, 0.658984423, 0.666015625, 0.673046887, 0.680078149,
    0.687109351, 0.694140673, 0.701171875, 0.708203137, 0.715234399, 0.722265601, 0.729296923,
    0.736328125, 0.743359387, 0.750390649, 0.757421851, 0.764453173, 0.771484375, 0.778515577,
    0.785546899, 0.792578101, 0.799609423, 0.806640625, 0.813671827, 0.820703149, 0.827734351,
    0.834765673, 0.841796875, 0.848828077, 0.855859399, 0.862890601, 0.869921923, 0.876953125,
    0.883984327, 0.891015649, 0.898046851, 0.905078173, 0.912109375, 0.919140577, 0.926171899,
    0.933203101, 0.940234423, 0.947265625, 0.954296827, 0.961328149, 0.968359351, 0.975390673,
    0.982421875, 0.989453077, 0.996484399, 1.0,
)
# fmt: on

SIGNED = QuantizationMap(
    "dynamic_signed",
    tuple(map(_float32, (*(-value for value in reversed(_POSITIVE[1:-1])), *_POSITIVE))),
)
UNSIGNED = QuantizationMap("dynamic_unsigned", tuple(map(_float32, _UNSIGNED)))


# bitsandbytes' map with -1 in the place of the negative value nearest to 0: the other negative
# values move up by one, so that 0 keeps its code.
SYMMETRIC = QuantizationMap(
    "dynamic_symmetric", (-1.0, *SIGNED.values[: SIGNED.zero_code - 1], *SIGNED.values[127:])
)


def map_for(signed: bool, symmetric: bool = False) -> QuantizationMap:
    """The map of a state: signed for first moments, unsigned for second moments."""
    if not signed:
        return UNSIGNED
    return SYMMETRIC if symmetric else SIGNED
