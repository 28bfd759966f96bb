"""Checks of the signal on its way: what explodes, vanishes, dies, saturates or overflows."""

from __future__ import annotations

import math
from collections.abc import Iterator

from gradfast.monitor.doctor.finding import DROP_BAD, ERROR, WARNING, Finding, some, trend
from gradfast.monitor.doctor.probe import Measurement, Passage
from gradfast.nn.graph import Structure

# A trend is one from this factor on between the first layer and the last, if a straight line explains most of it.
# Healthy models stay far below: forward, resnet50 changes by 1.05 and a 20-layer kaiming MLP by less than 10. Backward,
# batch norm makes resnet50's gradients grow by 150 towards the input, harmlessly, and deeper ones by more.
FORWARD, BACKWARD, BACKWARD_WITH_NORMS = 1e3, 1e4, 1e8
STRAIGHT = 0.6
HALF_MAX = 65504.0


def nonfinite(found: Measurement, structure: Structure) -> Iterator[Finding]:
    """The first layer that puts out NaN or infinity, forward, or else backward."""
    for number, passage in enumerate(found.passages):
        if passage.bad:
            title = f"{label(passage)} is the first to put out NaN or infinity"
            evidence = f"{passage.bad:.2%} of its outputs; before it {trail(found.passages[:number])}"
            yield Finding("nonfinite", ERROR, title, evidence, _mend_nonfinite(passage), [passage.name])
            return
    if not math.isfinite(found.loss):
        evidence = f"the loss is {found.loss} while every layer's output is finite; {trail(found.passages)}"
        mend = "loss = F.nll_loss(F.log_softmax(output, 1), targets)   # not log(softmax(x)); else look at the targets"
        yield Finding("nonfinite", ERROR, "the loss is not finite", evidence, mend)
        return
    for number, passage in enumerate(found.backward):
        if passage.grad_bad:
            title = f"going backward, the gradient of {label(passage)}'s output is the first with NaN or infinity"
            evidence = f"{passage.grad_bad:.2%} of it; before it {trail(found.backward[:number], backward=True)}"
            mend = "x = x.clamp(min=1e-12)   # before the sqrt, log, division or norm after that layer: its slope at 0"
            yield Finding("nonfinite", ERROR, title, evidence, mend, [passage.name])
            return


def forward(found: Measurement, structure: Structure) -> Iterator[Finding]:
    layers = [passage for passage in found.of_kind("layer") if math.isfinite(passage.in_rms)]
    sizes = [passage.in_rms for passage in layers] + [passage.out_rms for passage in layers[-1:]]
    line = trend(sizes)
    if line is None or line.fit < STRAIGHT or 1 / FORWARD < line.total < FORWARD:
        return
    explodes = line.total > 1
    what, word = ("explodes", "grows") if explodes else ("vanishes", "shrinks")
    evidence = (
        f"the rms of the layers' inputs goes from {sizes[0]:.3g} at {layers[0].name} to {sizes[-1]:.3g} after "
        f"{layers[-1].name}, a factor {line.step:.3g} a layer over {len(layers)} layers"
    )
    open_ended = [branch for branch in structure.branches if not branch.ends_normalised and not branch.norms]
    if explodes and len(open_ended) >= 3:
        title = f"{len(open_ended)} residual branches add up without normalisation or scaling: the signal grows"
        mend = 'gradfast.nn.init_model(model, "fixup")   # or a norm in every branch'
        yield Finding("residual-scaling", ERROR, title, evidence, mend, [branch.layers[-1] for branch in open_ended])
        return
    title = f"the signal {word} from layer to layer"
    yield Finding(f"forward-{what}", ERROR, title, evidence, _mend_trend(found), [layers[-1 if explodes else 0].name])


def backward(found: Measurement, structure: Structure) -> Iterator[Finding]:
    layers = [passage for passage in found.of_kind("layer") if passage.grad_norm and math.isfinite(passage.grad_norm)]
    sizes = [passage.grad_norm or 0.0 for passage in reversed(layers)]  # from the loss towards the input
    line = trend(sizes)
    limit = BACKWARD_WITH_NORMS if found.of_kind("norm") else BACKWARD
    if line is None or line.fit < STRAIGHT or 1 / BACKWARD < line.total < limit:
        return
    what, word = ("explodes", "grows") if line.total > 1 else ("vanishes", "shrinks")
    evidence = (
        f"the norm of d loss / d output goes from {sizes[0]:.3g} at {layers[-1].name} to {sizes[-1]:.3g} at "
        f"{layers[0].name}, a factor {line.step:.3g} a layer over {len(layers)} layers"
    )
    title = f"the gradient {word} on its way back"
    yield Finding(f"backward-{what}", ERROR, title, evidence, _mend_trend(found), [layers[0].name])


def no_gradient(found: Measurement, structure: Structure) -> Iterator[Finding]:
    if found.without_gradient:
        names = found.without_gradient
        yield Finding(
            "no-gradient",
            WARNING,
            f"no gradient reaches {some(names)}",
            f"{len(names)} trainable parameters had .grad None after backward",
            "take detach(), no_grad() or argmax() out of the way to the loss, or freeze them: requires_grad_(False)",
            names,
        )
    if found.grad_norm == 0.0 and math.isfinite(found.loss):
        evidence = f"the loss is {found.loss:.4g}, and the gradient of every parameter is exactly 0"
        yield Finding("no-gradient", ERROR, "nothing would be learnt", evidence, _mend_trend(found))


def dead_relus(found: Measurement, structure: Structure) -> Iterator[Finding]:
    dead = [p for p in found.passages if p.dead is not None and p.dead > 0.75]
    if dead:
        worst = max(dead, key=lambda passage: passage.dead or 0.0)
        yield Finding(
            "dead-relu",
            ERROR if (worst.dead or 0) > 0.98 else WARNING,
            f"most relu units never fire: {some([label(p) for p in dead])}",
            f"{worst.dead:.1%} of the units after {label(worst)} are 0 for the whole batch; their inputs have rms "
            f"{worst.in_rms:.3g}",
            'gradfast.nn.replace_activation(model, "leaky_relu", init="kaiming")   # and biases that start at 0',
            [p.name for p in dead],
        )


def saturated(found: Measurement, structure: Structure) -> Iterator[Finding]:
    flat = [p for p in found.passages if p.saturated is not None and p.saturated > 0.5]
    if flat:
        worst = max(flat, key=lambda passage: passage.saturated or 0.0)
        yield Finding(
            "saturated",
            ERROR if (worst.saturated or 0) > 0.9 else WARNING,
            f"{worst.activation} units are saturated: {some([label(p) for p in flat])}",
            f"{worst.saturated:.1%} of the outputs of {label(worst)} lie in the flat ends; their inputs have rms "
            f"{worst.in_rms:.3g}, where about 1 is healthy",
            'gradfast.nn.init_model(model, "xavier")   # or a norm before each',
            [p.name for p in flat],
        )


def half_precision(found: Measurement, structure: Structure) -> Iterator[Finding]:
    large = sorted(
        (p for p in found.passages if p.out_max > HALF_MAX / 4 and not p.wide_range), key=lambda p: -p.out_max
    )
    if large and not large[0].bad:
        worst = large[0]
        over = worst.out_max > HALF_MAX
        yield Finding(
            "fp16-overflow",
            ERROR if over else WARNING,
            f"float16 {'overflows' if over else 'would nearly overflow'} at {label(worst)}",
            f"its largest output is {worst.out_max:.3g}; float16 ends at {HALF_MAX:.0f}",
            "with torch.autocast(device, torch.bfloat16): ...   # or find what makes it that large",
            [p.name for p in large],
        )


# -------------------------------------------------------------------- words


def label(passage: Passage) -> str:
    name = passage.name or "the model itself"
    return f"{name} ({passage.activation})" if passage.activation else name


def trail(passages: list[Passage], backward: bool = False) -> str:
    """The last sizes on the way to a bad layer."""
    sizes = [(label(p), p.grad_norm if backward else p.out_rms) for p in passages if p.kind != "other"][-4:]
    if not sizes:
        return "there is nothing"
    what = "the gradients' norms were" if backward else "the rms of the outputs was"
    return f"{what} " + ", ".join(f"{size:.3g} at {name}" for name, size in sizes if size is not None)


def _mend_nonfinite(passage: Passage) -> str:
    if not math.isfinite(passage.in_rms):
        return DROP_BAD
    if passage.in_rms > 1e3:
        return 'gradfast.nn.init_model(model, "kaiming")   # the values were too large already; or a norm before it'
    return "x = x.clamp(min=1e-12)   # before the sqrt, log or division in that layer that leaves its domain"


def _mend_trend(found: Measurement) -> str:
    kinds = {passage.activation for passage in found.of_kind("activation")}
    if "sigmoid" in kinds and "relu" not in kinds:
        return 'gradfast.nn.replace_activation(model, "relu", init="kaiming")   # sigmoid passes on a quarter at most'
    if kinds == {"tanh"}:
        return 'gradfast.nn.init_model(model, "xavier")   # tanh wants a gain of 5/3'
    return 'gradfast.nn.init_model(model, "kaiming")   # or a norm after every layer'
