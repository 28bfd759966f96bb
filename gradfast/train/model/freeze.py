"""A backbone that is left as it is, for some epochs or all of them, while the classifier learns."""

from __future__ import annotations

from torch import nn

from gradfast.errors import UserError
from gradfast.nn.layers import is_norm
from gradfast.train.model.clipping import classifier_names


def head_names(model: nn.Module) -> set[str]:
    """Names of the parameters that are not the backbone's: of a classifier its last linear layer, of a detector all but
    ``backbone.body``.

    Raises:
        UserError: the model ends in no linear layer.
    """
    names = {name for name, _ in model.named_parameters()}
    if any(name.startswith("backbone.body.") for name in names):
        return {name for name in names if not name.startswith("backbone.body.")}
    head = set(classifier_names(model))
    if not head:
        raise UserError(
            f"--freeze-backbone: {type(model).__name__} has no linear layer that would be its classifier; leave it out"
        )
    return head


class FrozenBackbone:
    """Takes a model's backbone out of training for the first epochs; with "all", at once and for good.

    A frozen parameter gets no gradient, so that backward ends at the classifier and neither momentum nor decay moves
    anything; a frozen norm is in evaluation mode, so that its statistics stay as well. Dropout goes on.

    Args:
        epochs: how many epochs the backbone is frozen for, or "all". An optimiser that is built after takes what is
            trainable then: with a number everything, with "all" the head alone.
    """

    def __init__(self, model: nn.Module, epochs: int | str) -> None:
        self.epochs = epochs
        head = head_names(model)
        self._others = [p for name, p in model.named_parameters() if name not in head and p.requires_grad]
        own = {id(p) for name, p in model.named_parameters() if name in head}
        self._norms = [
            module
            for module in model.modules()
            if is_norm(module) and not any(id(p) in own for p in module.parameters(recurse=False))
        ]
        if epochs == "all":
            self.begin_epoch(0)

    def holds(self, epoch: int) -> bool:
        """Whether the backbone is frozen in an epoch, counted from 0."""
        return self.epochs == "all" or epoch < int(self.epochs)

    def begin_epoch(self, epoch: int) -> None:
        """Freeze or free for this epoch; called after ``model.train()``, which would wake the norms."""
        frozen = self.holds(epoch)
        for parameter in self._others:
            parameter.requires_grad_(not frozen)
        if frozen:
            for norm in self._norms:
                norm.eval()
