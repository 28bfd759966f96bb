"""What keeps a step from blowing up."""

from __future__ import annotations

import dataclasses

from gradfast.train import parse
from gradfast.train.options.field import choice, option


@dataclasses.dataclass(frozen=True)
class GradientsOptions:
    """The settings of the group `gradients`."""

    clip_grad: float | None = option(
        1.0,
        parse.clip_limit,
        "gradients",
        "scale gradients whose global norm is above this down to it, within the optimiser's pass; 0 or off: never",
        "NORM",
    )
    clip_policy: str = choice(
        "norm",
        "gradients",
        "what decides about a step, before --clip-grad is the last limit: norm (that limit alone), zclip (by the "
        "norm's z-score), autoclip (a percentile of earlier norms), agc (each unit by its weights' norm, the "
        "classifier left out), adagc (each parameter by its own earlier norms, at first by --clip-grad), skip-spikes "
        "(leave out steps whose norm stands out), value (each element by --clip-grad, no norm)",
        "norm",
        "value",
        "agc",
        "autoclip",
        "zclip",
        "adagc",
        "skip-spikes",
    )
    on_spike: str = choice(
        "skip",
        "gradients",
        "on a step with a NaN or infinite gradient, one that --clip-policy refuses, or a norm ten times the usual: "
        "skip (the first two are left out, the third is clipped), backoff (halve the rate as well; it recovers over a "
        "hundred good steps), rollback (and go back to a snapshot in memory when 20 in a row were skipped or the loss "
        "has left its course, three times at most); all are told of in events.jsonl. none: no watch",
        "none",
        "skip",
        "backoff",
        "rollback",
    )
    nonfinite: str = choice(
        "skip",
        "gradients",
        "on a NaN or infinite gradient: skip the step and count it, propagate it into the weights as torch does, or "
        "raise an error that names the layer",
        "skip",
        "propagate",
        "raise",
    )
