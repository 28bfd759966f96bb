"""Adapters for frameworks that own the training loop, each imported by its own name only where it is installed.

- `gradfast.integrations.lightning.ClipInStep`: a callback; `gradient_clip_val` is applied inside the step.
- `gradfast.integrations.accelerate.clip_in_step`: the same for an `Accelerator` and its `clip_grad_norm_`.
- `gradfast.integrations.transformers.ClipInStep`: the same for a `Trainer` and its `max_grad_norm`.
- `gradfast.integrations.timm.register`: gradfast's optimisers by name in timm's factory.
"""
