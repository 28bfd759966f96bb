"""The options that every optimiser of gradfast takes beside those of its torch namesake."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import torch

from gradfast.clip.policies import Policy
from gradfast.optim.precision import Precision

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Init = TypeVar("Init", bound=Callable[..., None])


@dataclass(frozen=True)
class Options:
    """See `ClippedOptimizer` for the meaning of each."""

    max_norm: float | None = None
    clip: Policy | None = None
    norm_type: float = 2.0
    l1: float = 0.0
    nonfinite: str = "skip"
    process_group: ProcessGroup | None = None
    master_weights: bool = False
    stochastic_rounding: bool = False
    state_dtype: torch.dtype | None = None
    rounding_seed: int = 0

    @property
    def precision(self) -> Precision:
        return Precision(self.master_weights, self.stochastic_rounding, self.state_dtype, self.rounding_seed)


class OptionKeywords(TypedDict, total=False):
    """The same as keywords, for type checkers: `**options: Unpack[OptionKeywords]`."""

    max_norm: float | None
    clip: Policy | None
    norm_type: float
    l1: float
    nonfinite: str
    process_group: ProcessGroup | None
    master_weights: bool
    stochastic_rounding: bool
    state_dtype: torch.dtype | None
    rounding_seed: int


def takes_options(init: Init) -> Init:
    """Show the options one by one in the signature of an `__init__` that takes them as `**options`."""
    signature = inspect.signature(init)
    own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    options = [
        inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=each.type)
        for each in fields(Options)
    ]
    init.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    return init


def options_of(owner: type, keywords: Any) -> Options:
    """Return the options among an optimiser's keywords; TypeError for one that there is not, as Python's own."""
    known = {each.name for each in fields(Options)}
    for name in keywords:
        if name not in known:
            raise TypeError(f"{owner.__name__}.__init__() got an unexpected keyword argument {name!r}")
    return Options(**keywords)
