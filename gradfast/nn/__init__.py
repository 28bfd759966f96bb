"""Cures in the model: initialisation, activations and regularisation that keep gradients in range."""

from gradfast.nn.activations import replace_activation
from gradfast.nn.add_norms import add_group_norm, add_spectral_norm
from gradfast.nn.gains import ACTIVATIONS, gain
from gradfast.nn.initialise import METHODS, InitReport, LayerInit, init_model
from gradfast.nn.norms import ScalarAffine, group_count, group_norms, replace_norms
from gradfast.nn.preserve import preserved
from gradfast.nn.pretrained import Loaded, load_pretrained
from gradfast.nn.regularise import add_dropout, add_stochastic_depth, param_groups, weight_penalty
from gradfast.nn.sync_norm import SyncBatchNorm, synchronise_batch_norms

__all__ = [
    "ACTIVATIONS",
    "METHODS",
    "InitReport",
    "LayerInit",
    "Loaded",
    "ScalarAffine",
    "SyncBatchNorm",
    "add_dropout",
    "add_group_norm",
    "add_spectral_norm",
    "add_stochastic_depth",
    "gain",
    "group_count",
    "group_norms",
    "init_model",
    "load_pretrained",
    "param_groups",
    "preserved",
    "replace_activation",
    "replace_norms",
    "synchronise_batch_norms",
    "weight_penalty",
]
