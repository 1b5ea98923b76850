"""The one optimizer class: a torch.optim.Optimizer for every name, width and placement."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from optfactory.backends.capture import refuse_capture
from optfactory.backends.running import is_only_for_state, run_step
from optfactory.checkpoints import layouts, reading, swap, writing
from optfactory.checkpoints.carry import carried_over
from optfactory.checkpoints.own import FORMAT_VERSION
from optfactory.config.group_rules import WHOLE_FIELDS
from optfactory.config.schema import OptimizerConfig
from optfactory.config.validation import config_error
from optfactory.errors import ConfigError
from optfactory.group_config import (
    annotations_of,
    check_groups,
    group_config,
    group_place,
    has_16_bit,
)
from optfactory.group_schema import OPTIMIZER_KEY, contradictions, schema_of
from optfactory.groups.grouping import group_parameters
from optfactory.groups.parameters import (
    Params,
    check_parameters,
    name_all_or_none,
    read_group,
)
from optfactory.memory import placement
from optfactory.reminders import Reminders
from optfactory.sharding.dtensors import is_dtensor
from optfactory.step import gradients
from optfactory.step.flattened import Built
from optfactory.step.interrupts import Uninterrupted
from optfactory.step.plan import StepPlan
from optfactory.step.report import MemoryReport, report
from optfactory.step.settings import Settings
from optfactory.step.slots import make_slots, refuse_changed_storage


class Optimizer2State(Optimizer):
    """The optimizer of every name; what it computes and how it keeps state, its config says.

    Build it with `optfactory.build_optimizer`. It behaves as the optimizers of torch.optim do:
    schedulers, closures, `add_param_group`, hooks and `state_dict` work as usual. State of a
    parameter is kept under PyTorch's names: `step`, `exp_avg`, `exp_avg_sq`, or for 8-bit state
    `exp_avg_q8` (codes, uint8) and `exp_avg_absmax` (scales, float32).

    Parameters may be DTensors (FSDP2, tensor parallel): each process has the state of its parts in
    `state`, and all of them compute the bits that one process would.

    >>> import torch
    >>> from optfactory import build_optimizer
    >>> weight = torch.nn.Parameter(torch.ones(64, 64))
    >>> optimizer = build_optimizer("adamw8bit", [weight])
    >>> weight.sum().backward()
    >>> optimizer.step()
    >>> sorted(optimizer.state[weight])
    ['exp_avg_absmax', 'exp_avg_q8', 'exp_avg_sq_absmax', 'exp_avg_sq_q8', 'step']

    Args:
        params: a Module, tensors, (name, tensor) pairs, or param-group dicts whose own
            hyperparameters override the config's.
        config: a resolved config.
        lr: the learning rate as a tensor that schedules change in place, instead of the config's.

    Raises:
        ConfigError: parameters or a group's hyperparameters are refused.
    """

    # Not pickled: both are made anew.
    _plan: StepPlan | None = None
    _settings: Settings | None = None
    _reminders: Reminders | None = None
    _built: Built | None = None

    def __init__(
        self, params: Params, config: OptimizerConfig, *, lr: Tensor | None = None
    ) -> None:
        self.config = config
        grouping = group_parameters(params, config, lr)
        name_all_or_none(grouping.groups)
        check_groups(grouping, config)
        super().__init__(grouping.groups, self._hyperparameters(config))
        if grouping.warning:
            warnings.warn(grouping.warning, stacklevel=3)
        self._built = Built(self.param_groups)
        self._reminders = Reminders(self.param_groups, grouping.models)
        self._follow_settings()

    # ---- param groups ------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; hyperparameters it does not state come from the config.

        Rules for param groups are for building the optimizer: they do not split this group.

        Raises:
            ConfigError: a hyperparameter or parameter is refused; the optimizer is unchanged.
        """
        index = len(self.param_groups)
        group = read_group(param_group, index)
        check_parameters([group], self.param_groups)
        place = group_place(group, index, self.config)
        # Those of the constructor, which it has checked, may come from several rules.
        rounds = self._built is None or has_16_bit(self.param_groups)
        config = group_config(group, self.config, place, rounds=rounds)
        wrong = contradictions(group, place) if self._built else []
        if wrong:
            raise config_error(f"optimizer '{self.config.name}'", wrong)
        carried = annotations_of(group, config)
        group = {**self._hyperparameters(config), **_live_lr(group), **carried}
        fields = group.keys() | {"params"}
        name_all_or_none([*self.param_groups, group])
        if "param_names" in group:
            # torch reads names from pairs, and the key only behind the first group.
            group["params"] = list(zip(group.pop("param_names"), group["params"], strict=True))
        super().add_param_group(group)
        added = self.param_groups[-1]
        for key in self.defaults.keys() - fields:  # of another family, which torch filled in
            del added[key]
        if self._reminders:
            self._reminders.of_lost_updates([added])

    def _hyperparameters(self, config: OptimizerConfig) -> dict[str, Any]:
        """A group's hyperparameters as plain values; its `name` stays free for users' labels."""
        values = config.model_dump(exclude={"name", *WHOLE_FIELDS})
        marks = {OPTIMIZER_KEY: config.name, "format_version": FORMAT_VERSION}
        return {**values, **marks}

    # ---- stepping ----------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: recomputes the loss and its gradients.

        Returns:
            The closure's value, or None without one.

        Raises:
            ConfigError: a gradient cannot be used (sparse, wrong dtype), or a hyperparameter was
                changed to one that cannot; nothing was changed.
            StateError: a state tensor is missing or does not fit; nothing was changed.
            KernelCompileError: a kernel cannot be compiled; nothing was changed.
        """
        loss = None
        if closure is not None:
            gradients.refuse_scaled_closure(self)
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    # torch.compile must not trace into tables of pointers; torch's lazy decorator, unlike
    # torch.compiler.disable, does not load the compiler. What is made here outlives a block of
    # torch.inference_mode, and must be of ordinary tensors, as state must.
    @_disable_dynamo
    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def _update(self) -> None:
        plan = self._current_plan()
        refuse_capture(plan.slots, plan.devices)
        if self._reminders:
            self._reminders.before_first_step(plan, self.param_groups)
        is_fresh = plan.live.follow(self.state, self.param_groups)
        if is_fresh and is_only_for_state(plan, self.param_groups):
            return
        if not run_step(self, plan) and self._reminders:
            self._reminders.after_idle_step(plan)

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def init_states(self) -> None:
        """Allocate the state of every trainable parameter now instead of at the first step."""
        self._current_plan().live.follow(self.state, self.param_groups)

    def memory_report(self) -> MemoryReport:
        """Bits, bytes and place of every parameter's state; it need not be allocated yet.

        Of sharded parameters, a row has the bytes on this rank and those of the whole.
        """
        return report(self._current_plan().slots)

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def replace_parameter(self, old: Tensor, new: Tensor) -> None:
        """Train another tensor in a parameter's place, which takes over its state row by row.

        Rows that both have keep their state, 8-bit codes and scales as they are; further ones
        start afresh. What other tools keep beside the state stays where the shape does.

        >>> import torch
        >>> from optfactory import build_optimizer
        >>> table = torch.nn.Embedding(1000, 64)
        >>> optimizer = build_optimizer("adamw8bit", table)
        >>> larger = torch.nn.Parameter(torch.cat([table.weight.detach(), torch.zeros(24, 64)]))
        >>> optimizer.replace_parameter(table.weight, larger)
        >>> table.weight = larger

        Args:
            old: a parameter of this optimizer.
            new: the tensor to train on; `old` itself where its data was replaced by more rows.

        Raises:
            ConfigError: the tensors differ in more than their first dimension, or cannot be
                optimized; nothing was changed.
        """
        slot = next((s for s in self._current_plan().slots if s.parameter is old), None)
        if slot is None:
            raise ConfigError("replace_parameter: the old tensor is no parameter of this optimizer")
        if slot.layout.piece is not None or is_dtensor(new):
            raise ConfigError(
                f"replace_parameter: {slot.name} is sharded, and its rows cannot be carried over; "
                "resize the model before it is sharded, and load its checkpoint there"
            )
        if new is not old:
            check_parameters([{"params": [new], "param_names": [slot.name]}], self.param_groups)
        self._synchronize()
        state = carried_over(slot, new)
        place = [id(p) for p in slot.group["params"]].index(id(old))
        with Uninterrupted():
            self.state.pop(old, None)
            slot.group["params"][place] = new
            if state:
                self.state[new] = state
            self._plan = None

    def _follow_settings(self) -> bool:
        """Whether hyperparameters changed, which are good; see `Settings.check`."""
        self._settings = self._settings or Settings(self.config)
        old = self._plan.slots if self._plan else []
        return self._settings.check(
            self.param_groups,
            lambda before: refuse_changed_storage(old, self.param_groups, before),
        )

    def _schema_of(self, group: Mapping[str, Any]) -> type[OptimizerConfig]:
        return schema_of(group, self.config)

    def _current_plan(self) -> StepPlan:
        changed = self._follow_settings()
        if self._plan is None or changed or not self._plan.is_of(self.param_groups):
            if self._built:
                self._built.refuse_flattened(self.param_groups, self._schema_of)
            old = self._plan.slots if self._plan else []
            self._plan = StepPlan(make_slots(self.param_groups, self.state, self._schema_of, old))
        return self._plan

    # ---- checkpoints -------------------------------------------------------------------------

    @_disable_dynamo
    @torch.inference_mode(False)
    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.Optimizer.state_dict; waits for state that is on its way to the host.

        States are the live tensors, those of paged state other tensors of the same memory.
        Hyperparameters are copies in plain Python, so that a schedule does not change what was
        saved. What wrappers keep in `optimizer.state` is there as well; empty entries are not.
        State of sharded parameters is given as DTensors of the same memory.

        Raises:
            StateError: there is state of a tensor that is in no param group.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        self._synchronize()
        state_dict = writing.pack(self.param_groups, self.state, self._current_plan().slots)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    @torch.inference_mode(False)
    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a checkpoint of `state_dict()`, bit for bit as if never interrupted.

        State of another width or block size, and state dicts of the same algorithm in torch.optim,
        bitsandbytes and torchao, are converted. Hyperparameters that a schedule may have changed
        (lr, betas, eps, weight_decay, ...) come from the checkpoint; width, block size and
        placement (optim_bits, block_size, is_paged) from this optimizer's config. What wrappers
        kept beside the states is copied too.

        Parameters are matched by their place. Names that are new here say that a model was renamed;
        a name that is known here at another place is refused, for states would be mixed up.

        Tensors of the checkpoint may be whole or DTensors, whatever the parameters are. Where these
        are sharded and something must be converted or sharded anew, whole tensors are gathered one
        by one, so that all processes must call this.

        All is made aside and then taken over at once, so that meanwhile there is twice the state.

        Raises:
            StateError: the checkpoint is of another family, is damaged or does not match the
                parameters; the optimizer is unchanged, as after any other error or Ctrl-C.
        """
        # torch's loader casts state to the parameter's dtype, which would destroy 8-bit codes, so
        # this one stands on its own and runs torch's hooks itself.
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, dict(state_dict))
            state_dict = state_dict if changed is None else changed
        saved_groups, saved_state = reading.parts(state_dict)
        layout = layouts.recognize(saved_groups, saved_state)
        groups = reading.read_groups(saved_groups, self.param_groups, self.config, layout)
        slots = self._current_plan().slots
        state = swap.new_state(*reading.read_states(saved_state, saved_groups, slots, layout))
        self._synchronize()
        swap.take_over(self.__dict__, state, groups, slots)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    @torch.inference_mode(False)
    @torch.no_grad()
    def export_state_dict(self, layout: str) -> dict[str, Any]:
        """A copy of the state as another library's optimizer loads it.

        Args:
            layout: ``torch`` (float32 state, for the class of torch.optim with this algorithm) or
                ``bitsandbytes`` (8- or 32-bit as the state is here) or ``torchao`` (8-bit, fp8,
                4-bit or 32-bit as the state is here).

        Raises:
            ConfigError: that library would go on differently; lists the hyperparameters. Or it is
                torchao, and not there.
        """
        self._synchronize()
        states = [(s, self.state.get(s.parameter, {})) for s in self._current_plan().slots]
        return layouts.export(layout, self.param_groups, states, self.config)

    def _synchronize(self) -> None:
        """Wait until pinned state is whole: a step leaves while it is still copied to the host."""
        slots = self._current_plan().slots
        for device in {s.parameter.device for s in slots if s.layout.where == placement.PINNED}:
            torch.cuda.synchronize(device)

    def __getstate__(self) -> dict[str, Any]:
        self._synchronize()
        state = writing.shareable(self.state, self._current_plan().slots)
        own = {"config": self.config, "_plan": None, "state": defaultdict(dict, state)}
        return {**super().__getstate__(), **own}

    @torch.inference_mode(False)
    @torch.no_grad()
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Copies and unpickled tensors are ordinary memory; paged state goes back to its file.
        for slot in self._current_plan().slots:
            step = slot.state.get("step")
            if isinstance(step, Tensor) and step.dtype == torch.float32:  # pickled by release 0.1
                slot.state["step"] = step.double()
            moved = slot.layout.tensors.keys() & slot.state.keys()
            if moved and slot.layout.where != placement.RESIDENT:
                fresh = slot.allocate()
                for key in moved:
                    fresh[key].copy_(slot.state[key])
                self.state[slot.parameter] = slot.state = {**slot.state, **fresh}


def _live_lr(group: Mapping[str, Any]) -> dict[str, Tensor]:
    """A group's lr where it is a tensor: schedules may change it in place, so it stays one."""
    lr = group.get("lr")
    return {"lr": lr} if isinstance(lr, Tensor) else {}
