"""The second moments of a batch's neurons, which all processes keep of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_

import torch
from torch import Tensor

from optfactory.matrix.neurons import mean_squares, row_factors, second_moment
from optfactory.sharding.team import Team
from optfactory.state.layout import NEURONS_KEY
from optfactory.step.owners import owners_of, spread_of, stack_for
from optfactory.step.slots import Slot


class Neurons:
    """Scales the rows of the matrices that this process has made orthogonal.

    Args:
        slots: the parameters of the batch; all have the same decay rate.
        team: the processes that have made its matrices; None if this one has made all.
        device: where they are.
    """

    def __init__(self, slots: Sequence[Slot], team: Team | None, device: torch.device) -> None:
        self._team, self._beta = team, slots[0].group["neuron_beta"]
        self._rows = stack_for(slots[0]).rows
        self._counts = [stack_for(slot).count for slot in slots]
        self._moments: list[Tensor | None] = [None] * len(slots)
        self._owned: Tensor | None = None
        if team is not None:
            owners = owners_of(matrix for slot in slots for matrix in spread_of(slot))
            own = [number for number, owner in enumerate(owners) if owner == team.number]
            self._owned = torch.tensor(own, dtype=torch.int64, device=device)

    def follow(self, slots: Sequence[Slot]) -> None:
        """Take the parameters' moments as they are now, before anything is written.

        Raises:
            StateError: one of them is not as it must be.
        """
        moments = [slot.state.get(NEURONS_KEY) for slot in slots]
        if not all(map(is_, moments, self._moments)):
            for slot in slots:
                slot.layout.check(slot.name, slot.state, slot.local.device)
            self._moments = moments

    def scale(self, stack: Tensor, factor: float, found_inf: Tensor | None) -> None:
        """Advance the moments of all neurons, and scale the rows of these matrices in place.

        Args:
            stack: [count, rows, cols].
            factor: of all rows.
            found_inf: not 0 if the step is skipped.
        """
        squares = mean_squares(stack)
        moments = [moment.view(-1, self._rows) for moment in self._moments if moment is not None]
        all_squares = self._of_all(squares)
        moment = second_moment(torch.cat(moments), all_squares, self._beta, found_inf)
        torch._foreach_copy_(moments, list(torch.split(moment, self._counts)))
        own = moment if self._owned is None else moment.index_select(0, self._owned)
        stack.mul_(row_factors(squares, own, stack.shape[2], factor)[:, :, None])

    def _of_all(self, squares: Tensor) -> Tensor:
        """Those of the matrices of all processes. Each adds zeros to what is another's."""
        if self._team is None or self._owned is None:
            return squares
        count = sum(self._counts)
        whole = torch.zeros(count, self._rows, dtype=torch.float32, device=squares.device)
        whole.index_copy_(0, self._owned, squares)
        self._team.add_up(whole)
        return whole
