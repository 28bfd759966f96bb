"""timm: gradfast's optimisers by name in `timm.optim.create_optimizer_v2`, and so in timm's train script."""

from __future__ import annotations

from timm.optim import OptimInfo
from timm.optim._optim_factory import default_registry

from gradfast.optim import SGD, Adam, AdamW, Lion


def register() -> list[str]:
    """Add `gradfastsgd`, `gradfastadam`, `gradfastadamw` and `gradfastlion` to timm's factory.

        gradfast.integrations.timm.register()
        optimizer = timm.optim.create_optimizer_v2(model, opt="gradfastadamw", lr=1e-3, max_norm=1.0)

    For timm's train script: `--opt gradfastadamw --opt-kwargs max_norm=1.0`, and no `--clip-grad`, which would clip
    (and with AMP unscale) in passes of its own before. `gradfastsgd` uses Nesterov momentum, as timm's `sgd` does.

    The names have no underscore, since timm takes what stands before one for the name of a wrapper (`lookahead_`).

    Returns:
        The names.
    """
    infos = [
        OptimInfo(
            name="gradfastsgd",
            opt_class=SGD,
            description="SGD with Nesterov momentum, clips inside the step",
            has_eps=False,
            has_momentum=True,
            defaults={"nesterov": True},
        ),
        OptimInfo(name="gradfastadam", opt_class=Adam, description="Adam, clips inside the step", has_betas=True),
        OptimInfo(name="gradfastadamw", opt_class=AdamW, description="AdamW, clips inside the step", has_betas=True),
        OptimInfo(
            name="gradfastlion",
            opt_class=Lion,
            description="Lion, clips inside the step",
            has_eps=False,
            has_betas=True,
        ),
    ]
    known = set(default_registry.list_optimizers())
    for info in infos:
        if info.name not in known:
            default_registry.register(info)
    return [info.name for info in infos]
