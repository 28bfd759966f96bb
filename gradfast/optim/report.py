"""What a step leaves behind: norms, the clip coefficient, skipped steps."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gradfast.clip.policies import Policy
from gradfast.optim.sharding import Sharding


class StepReport:
    """Mixed into the optimisers: reads the report of the engine's last step."""

    norm_type: float
    _engine: Any
    _sharding: Sharding | None
    _settings: Any
    _skipped_before: int  # by earlier engines of this optimiser
    _clip: Policy | None

    @property
    def grad_norm(self) -> Tensor:
        """Global gradient norm of the last step, before clipping: a 0-d tensor on the device; nothing waits for it."""
        return self._stepped_engine().grad_norm()

    @property
    def clip_coef(self) -> Tensor:
        """Clip coefficient of the last step, `min(1, max_norm / (norm + 1e-6))`: a 0-d tensor on the device."""
        return self._stepped_engine().coefficient()

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped, for a norm that was not finite or by a policy. On CUDA, reading it waits."""
        return self._skipped_before + (0 if self._engine is None else self._engine.skipped_steps())

    @property
    def nonfinite_parameter(self) -> str | None:
        """Name of the first parameter whose gradient was not finite in the last step, or `None`. On CUDA, waits."""
        engine = self._stepped_engine()
        return (engine.nonfinite_parameter() if self._sharding is None else self._sharding.first_nonfinite()) or None

    def found_infinite(self) -> Tensor | None:
        """Return whether the last step's norm was not finite: 0-d float32 on the device, 1 or 0; nothing waits for it.

        `None` if no parameter had a gradient. This is what a GradScaler calls `found_inf`.
        """
        engine = self._stepped_engine()
        return engine.found_infinite() if self._sharding is None else self._sharding.found_infinite()

    def grad_norms(self) -> dict[str, Tensor]:
        """Return each parameter's gradient norm in the last step, before clipping, by name: 0-d tensors.

        They come from the same pass as the global norm. Parameters without a gradient are left out. Names are those
        that the optimiser was given as `(name, parameter)` pairs, else `param_groups[i]['params'][j]`. Of a DTensor it
        is the norm of the whole gradient, the same on all ranks; one rank may ask alone.
        """
        engine = self._stepped_engine()
        if self._sharding is not None:
            return self._sharding.grad_norms(self.norm_type, engine.grad_norm().dtype, self._settings.loss_scale)
        return dict(engine.grad_norms())

    def _stepped_engine(self) -> Any:
        if self._engine is None:
            raise RuntimeError("there is no gradient norm before the first step()")
        return self._engine

    def _explain_skip(self) -> str:
        report = self._engine.report()
        if report.decider >= 0 and self._clip is not None:
            policy = self._clip.decider(report.decider)
            return f"the gradient norm is {report.norm:.6g}, above {report.limit:.6g}, the limit of {policy!r}"
        name = self.nonfinite_parameter
        norm = self._engine.grad_norm().item()
        return f"the gradient norm is {norm}, first non-finite gradient in {name!r}"
