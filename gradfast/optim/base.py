"""The spine of all optimisers of gradfast: one native call a step, and the hooks around it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from gradfast._load import native
from gradfast.clip.policies import GlobalNorm, Policy
from gradfast.optim import states
from gradfast.optim.clipping import CLIP_SETTINGS, apply_clipping, check_clipping, check_l1, group_limits, norm_settings
from gradfast.optim.distributed_checkpoint import wants_states_alone
from gradfast.optim.eager import run_eagerly
from gradfast.optim.options import OptionKeywords, options_of
from gradfast.optim.policy_state import PolicyState
from gradfast.optim.precision import MASTER, Precision
from gradfast.optim.report import StepReport
from gradfast.optim.rule_settings import RuleSettings
from gradfast.optim.scaling import apply_scaling
from gradfast.optim.sharding import Sharding, group_name, group_named, sharding_of, surrounding_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_log = logging.getLogger("gradfast")


class ClippedOptimizer(StepReport, Optimizer):
    """Mixed into a torch optimiser, replaces its step by one native call that also clips.

    The torch class keeps what it is good at: checking hyper-parameters, parameter groups, hooks, `state_dict`. A
    subclass says how a group maps to a rule (`_rule_settings`) and what a parameter's fresh state is (`_fresh_state`).

    Every such optimiser takes, by keyword only:

    Args:
        max_norm: largest global gradient norm that is let through; `None` measures but never clips. The gradients are
            multiplied by `min(1, max_norm / (norm + 1e-6))` as they are read; `p.grad` itself stays as it is.
            A group may have a `max_norm` of its own, `{"params": ..., "max_norm": 0.5}`, for the norm of its gradients
            alone and after all other clipping.
        clip: a clip policy instead of `max_norm`, such as `gradfast.clip.ZClip()`. What it remembers is saved under
            "clip_state" of `state_dict()`.
        norm_type: p of the global norm, at least 1; `inf` for the largest magnitude.
        l1: L1 decay, beside the L2 of `weight_decay`; may differ between groups.
        nonfinite: what to do when the norm is NaN or infinite. "skip": change no parameter, no state and no step count,
            count the step in `skipped_steps` and log the parameter's name. "propagate": go on, as torch does.
            "raise": change nothing and raise, which waits for the device at every step. Under a GradScaler a non-finite
            step is its business, and skipped whatever is said here.
        process_group: the ranks that hold other parameters of the same model, such as the stages of a pipeline: the
            norm is over the gradients of all of them, and each must step. DTensor parameters need none for their mesh.
            Plain parameters of which each of these ranks holds a copy go in a group with `"replicated": True`.
        master_weights, stochastic_rounding, state_dtype, rounding_seed: see `Precision`.
    """

    max_norm: float | None
    norm_type: float
    nonfinite: str
    process_group: ProcessGroup | None = None
    precision = Precision()

    # Tells a GradScaler that the step unscales and skips by itself: see gradfast.optim.scaling.
    _step_supports_amp_scaling = True

    _clip: Policy | None = None
    _policy_state: PolicyState | None = None  # where the policy is more than a limit

    _has_group_limits = False
    _clips_updates = False  # a rule that can divides each parameter's learning rate by its update's size

    # Joins the sums of powers of several processes into one, a 0-d tensor. Called between measuring and updating.
    _join_sums: Callable[[Any], Tensor] | None = None

    def _rule_settings(self, group: dict[str, Any]) -> RuleSettings:
        """Must depend on the group alone: it is asked again only where the group's values are other objects."""
        raise NotImplementedError

    def _fresh_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def _init_clipping(
        self,
        options: OptionKeywords,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
    ) -> None:
        """Check and store what gradfast adds; called after the torch class's own `__init__`."""
        given = options_of(type(self), options)
        max_norm, norm_type = norm_settings(given.clip, given.max_norm, given.norm_type)
        check_clipping(max_norm, norm_type, given.nonfinite)
        if differentiable:
            raise RuntimeError(
                f"gradfast.{type(self).__name__} does not support differentiable=True; use torch.optim's"
            )
        if fused and foreach:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        self.max_norm, self.norm_type, self.nonfinite = max_norm, float(norm_type), given.nonfinite
        self.process_group = given.process_group if given.process_group is not None else surrounding_group()
        self.precision = given.precision
        self._clip = given.clip
        if given.clip is not None and not isinstance(given.clip, GlobalNorm):
            self._policy_state = PolicyState(given.clip, sum(len(group["params"]) for group in self.param_groups))
        # Kept for whoever reads them; there is one implementation, and it is fused.
        self.defaults.update(l1=given.l1, fused=fused)
        for group in self.param_groups:
            group.setdefault("l1", given.l1)
            group["fused"] = fused
            check_l1(group)
        self._init_engine()

    @property
    def clip(self) -> Policy | None:
        """The clip policy that the optimiser was made with."""
        return self._clip

    # ---------------------------------------------------------------- the step

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Do one step: measure the global norm, decide the clip factor, update, in one native call.

        Args:
            closure: re-evaluates the model and returns the loss; called with gradients enabled.

        Raises:
            RuntimeError: `nonfinite="raise"` and a gradient is NaN or infinite.
            NotImplementedError: a gradient is sparse or of a tensor subclass.
            TypeError, ValueError: dtype, shape or device of a gradient or state does not fit its parameter.
        """
        if not self.state and wants_states_alone(self):
            self._make_all_states()
            return None
        arguments: tuple[Any, ...] = (self, closure) if closure is not None else (self,)
        keywords: dict[str, Any] = {}
        before = (*torch_optimizer._global_optimizer_pre_hooks.values(), *self._optimizer_step_pre_hooks.values())
        for hook in before:
            changed = hook(self, arguments, keywords)
            if changed is not None:
                if not (isinstance(changed, tuple) and len(changed) == 2):
                    raise RuntimeError(f"a step pre-hook must return None or (new_args, new_kwargs), but got {changed}")
                arguments, keywords = changed
                closure = keywords.get("closure", arguments[1] if len(arguments) > 1 else None)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._native_step()
        for hook in chain(
            self._optimizer_step_post_hooks.values(), torch_optimizer._global_optimizer_post_hooks.values()
        ):
            hook(self, arguments, keywords)
        return loss

    # torch wraps a step that lacks this mark into record_function and its hooks: microseconds at each step. The hooks
    # are called above, and the engine records its range in C++, where it costs nothing unless a profiler listens.
    step.hooked = True  # type: ignore[attr-defined]
    run_eagerly(step, "gradfast steps in one native call, which reads .grad itself")

    def _native_step(self) -> None:
        engine, settings = self._current_engine(), self._settings
        apply_clipping(settings, self.max_norm, self.norm_type, self.nonfinite)
        under_scaler = apply_scaling(self, settings)
        self.precision.apply(settings)
        if self._policy_state is not None:
            held = self._engine_parameters  # none on a rank that has nothing of the model
            self._policy_state.give_to(settings, held[0].device if held else torch.device("cpu"))
        if self._has_group_limits:
            settings.group_limits = group_limits(self.param_groups, self.max_norm)
        settings.clips_updates = self._clips_updates
        missing = self._measure_and_update(engine, settings)
        if missing:
            self._make_states(missing)
            missing = self._measure_and_update(engine, settings)
            if missing:
                raise RuntimeError(f"gradfast: no usable state for parameter {self._engine_names[missing[0]]!r}")
        if self.nonfinite == "raise" and not under_scaler:
            if engine.last_skipped() and engine.report().decider < 0:
                raise RuntimeError(f"gradfast: {self._explain_skip()}; nothing was changed")
        elif engine.skipped_on_host():
            _log.log(logging.INFO if under_scaler else logging.WARNING, "step skipped: %s", self._explain_skip())

    def _group_settings(self, group: dict[str, Any]) -> RuleSettings:
        return self.precision.settings_of(self._rule_settings(group))

    def _measure_and_update(self, engine: Any, settings: Any) -> list[int]:
        """Do the step, or nothing where a parameter has no state yet: returns those parameters' indices."""
        if self._join_sums is None:
            return engine.step(self.state, settings)
        if self._sharding is not None:
            self._sharding.place_gradients()
        missing = engine.measure(self.state, settings)
        if missing:
            return missing
        total = self._join_sums(engine)
        each = means = None  # of whole parameters, where each has a factor of its own
        if self._sharding is not None:
            if self._clip is not None and self._clip.clips_each_parameter:
                each = self._sharding.reduction.sums
            if settings.clips_updates:
                if engine.measures_updates_apart():
                    engine.measure_updates(total, each)
                    self._sharding.join_updates(engine)
                means = self._sharding.update_means(engine)
        engine.update(total, each, means)
        return missing

    # ---------------------------------------------------------------- the engine

    def _init_engine(self) -> None:
        self._engine: Any = None
        self._sharding: Sharding | None = None
        self._settings = native.StepSettings()
        self._skipped_before = 0

    def _current_engine(self) -> Any:
        """Return the engine for the groups as they are now, and let it read them."""
        engine = self._engine
        if engine is None or not engine.read_groups(self.param_groups, self._group_settings):
            engine = self._make_engine()
            engine.read_groups(self.param_groups, self._group_settings)
        return engine

    def _make_engine(self) -> Any:
        parameters, group_of, names = [], [], []
        for number, group in enumerate(self.param_groups):
            known = group.get("param_names")
            for position, parameter in enumerate(group["params"]):
                parameters.append(parameter)
                group_of.append(number)
                names.append(known[position] if known else f"param_groups[{number}]['params'][{position}]")
        self._forget_engine()
        replicated = [self.param_groups[number].get("replicated") for number in group_of]
        self._sharding = sharding = sharding_of(parameters, names, replicated, self.process_group)
        if sharding is not None:
            self._join_sums = lambda engine: sharding.join(
                engine, self.norm_type, self._settings.clips_updates and not engine.measures_updates_apart()
            )
        limits = group_limits(self.param_groups, self.max_norm)
        self._has_group_limits = any(limit != math.inf for limit in limits)
        if self._has_group_limits and sharding is not None:
            raise NotImplementedError("gradfast: max_norm of a parameter group does not take sharded parameters yet")
        if self._policy_state is not None:
            self._policy_state.grow_to(len(parameters))
            self._policy_state.check_devices(parameters)
        self.precision.adopt(self.state)
        by_units = [] if self._clip is None else self._clip.by_units(names, parameters)
        self._engine = native.Engine(parameters, group_of, names, by_units)
        self._engine_parameters, self._engine_groups, self._engine_names = parameters, group_of, names
        return self._engine

    def _forget_engine(self) -> None:
        """Let the next step make another, for the groups as they are then."""
        self._skipped_before = self.skipped_steps
        self._engine = None

    @torch.no_grad()
    def _make_states(self, missing: list[int]) -> None:
        fresh = []
        for index in missing:
            parameter = self._engine_parameters[index]
            group = self.param_groups[self._engine_groups[index]]
            fresh_state = self.precision.fresh_state(parameter, self._fresh_state(parameter, group))
            if states.complete(self.state[parameter], fresh_state):
                fresh.append(index)
        self._engine.mark_fresh(fresh)

    def _make_all_states(self) -> None:
        """Make the states that a first step would make of the parameters with a gradient, and do nothing else."""
        self._current_engine()
        missing = []
        for index, parameter in enumerate(self._engine_parameters):
            settings = self._group_settings(self.param_groups[self._engine_groups[index]])
            keys = [key for key in settings.states if key != MASTER or self.precision.keeps_master(parameter)]
            if parameter.grad is not None and (keys or settings.counted):
                missing.append(index)
        self._make_states(missing)

    # ---------------------------------------------------------------- groups, copies, checkpoints

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        check_l1(self.param_groups[-1])
        if self._policy_state is not None:
            self._policy_state.grow_to(sum(len(group["params"]) for group in self.param_groups))
        if "_engine" in self.__dict__:
            self._forget_engine()

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with torch's keys: `l1` is among them only where it is not zero.

        `torch.distributed.checkpoint` refuses to load a checkpoint of torch's where a key is missing in it.
        """
        packed = super().state_dict()
        for group in packed.get("param_groups", ()):
            group.pop("replicated", None)  # a matter of this run's ranks
            if not group.get("l1", True):
                del group["l1"]
        if self._policy_state is not None:
            packed["clip_state"] = self._policy_state.state_dict()
        return self.precision.save(packed)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but states that `precision` keeps in fp32 are not cast to the parameter's dtype on the way.

        Clip policies go on from what was saved, or anew where nothing of theirs was.
        """
        loaded: dict[str, Any] = {}
        hooks = [
            self.register_load_state_dict_pre_hook(lambda _, given: loaded.update(given)),  # after the user's hooks
            self.register_load_state_dict_post_hook(lambda _: self.precision.load(self, loaded), prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()
        if self._engine is not None:
            self._engine.forget_fresh()
        if self._policy_state is not None:
            self._policy_state.load_state_dict(loaded.get("clip_state"))

    def __getstate__(self) -> dict[str, Any]:
        kept = {key: getattr(self, key) for key in (*CLIP_SETTINGS, "precision", "_clip", "_policy_state")}
        return {**super().__getstate__(), **kept, "process_group": group_name(self.process_group)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        own_limits = [group.get("max_norm") for group in self.__dict__.get("param_groups", ())]
        own_l1 = [group.get("l1", 0.0) for group in self.__dict__.get("param_groups", ())]
        own_replicated = [group.get("replicated") for group in self.__dict__.get("param_groups", ())]
        super().__setstate__(state)
        if isinstance(self.process_group, str):
            self.process_group = group_named(self.process_group)
        self.defaults.setdefault("l1", 0.0)
        for number, group in enumerate(self.param_groups):  # a checkpoint that says nothing of it leaves it as it was
            group.setdefault("l1", own_l1[number] if number < len(own_l1) else self.defaults["l1"])
            check_l1(group)
        for group, replicated in zip(self.param_groups, own_replicated):
            if replicated is not None:
                group["replicated"] = replicated
        for group, limit in zip(self.param_groups, own_limits, strict=False):
            if limit is not None:
                group.setdefault("max_norm", limit)
        if "_engine" not in self.__dict__:
            self._init_engine()

    def __repr__(self) -> str:
        shown = CLIP_SETTINGS if self._clip is None else (*CLIP_SETTINGS, "clip")
        clipping = ", ".join(f"{key}={getattr(self, key)!r}" for key in shown)
        precision = "" if self.precision.is_default else f"    precision: {self.precision}\n"
        return f"{super().__repr__()[:-1]}    clipping: {clipping}\n{precision})"
