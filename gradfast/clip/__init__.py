"""Clipping as functions on gradients: torch.nn.utils' signatures on gradfast's kernels."""

from gradfast.clip.functions import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm

__all__ = ["clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "get_total_norm"]
