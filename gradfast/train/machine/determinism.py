"""Deterministic algorithms alone, for the time of a run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from gradfast.errors import UserError
from gradfast.extras import first_line

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # cuBLAS reads it when its first handle is made


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Within the block, if `wanted`, torch uses deterministic algorithms alone, and cuDNN does not try several.

    Raises:
        UserError: an operation has no deterministic algorithm on this device.
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn
    cudnn_before, workspace = (cudnn.deterministic, cudnn.benchmark), os.environ.get(_WORKSPACE)
    try:
        os.environ.setdefault(_WORKSPACE, ":4096:8")
        torch.use_deterministic_algorithms(True)
        cudnn.deterministic, cudnn.benchmark = True, False
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise UserError(f"--deterministic: {first_line(error)}; take another model, or leave it out") from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark = cudnn_before
        if workspace is None:
            os.environ.pop(_WORKSPACE, None)
