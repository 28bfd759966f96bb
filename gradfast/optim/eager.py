"""Keep torch.compile out of a function, at no cost to those who never use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def run_eagerly(function: Function, reason: str) -> Function:
    """Mark a function so that a compiled caller has one graph break at its call, and nothing in it is compiled.

    `torch.compiler.disable` does the same with a wrapper, which costs half a microsecond at every call. These are the
    two marks that it works by: Dynamo reads the first where it meets a call, and the frame evaluator the second where
    Python enters the function. A torch without the second has more graph breaks, and the same results.
    """
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    function._torchdynamo_disable_msg = reason  # type: ignore[attr-defined]
    try:
        from torch._C._dynamo import eval_frame

        skip = eval_frame._FrameAction.SKIP
        eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, skip))
    except (ImportError, AttributeError, TypeError):
        pass
    return function
