"""What follows a layer, and which layers form residual branches: read from the model's traced graph.

torch.fx traces without running anything. Where a part of a model cannot be traced (control flow on values, as in many
language models), its children are tried one by one, so that the blocks inside are still understood.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import add, iadd
from typing import Any

import torch
from torch import fx, nn

from gradfast.nn.gains import FUNCTIONS, METHODS, activation_name
from gradfast.nn.layers import is_layer, is_norm

_ADDS = (add, iadd, torch.add)
_MOST_LAYERS = 8  # of one residual branch: a longer way between two ends of an addition is a U-net or a pyramid


@dataclass
class Branch:
    """One residual branch: what is computed beside a shortcut and added to it.

    Attributes:
        layers: names of its weight layers, in order of use.
        norms: names of its normalisation layers, in order of use.
        last: name of the module nearest to the addition that is a weight or normalisation layer.
        ends_normalised: whether a norm stands between the last weight layer and the addition.
        stream_normalised: whether the sum goes through a norm and nowhere else, and the branch has none (post-norm).
    """

    layers: list[str]
    norms: list[str] = field(default_factory=list)
    last: str = ""
    ends_normalised: bool = False
    stream_normalised: bool = False


@dataclass
class Structure:
    """What is known of a model's graph.

    Attributes:
        after: weight layer -> name of the activation that its output meets, or "linear" where it meets another weight
            layer, attention or the end first. Layers in parts that could not be traced are absent.
        branches: the residual branches, in order of use.
        normalised: weight layers whose output goes through a norm before any activation or other weight layer.
    """

    after: dict[str, str] = field(default_factory=dict)
    branches: list[Branch] = field(default_factory=list)
    normalised: set[str] = field(default_factory=set)


def read_structure(model: nn.Module) -> Structure:
    """Trace a model, or those of its parts that can be traced, and read its structure."""
    structure = Structure()
    for prefix, graph, modules in _traced(model):
        reader = _Reader(prefix, graph, modules)
        structure.after |= reader.activations()
        structure.branches += reader.branches()
        structure.normalised |= reader.normalised()
    for name, module in model.named_modules():  # one module to torch.fx, two branches inside
        if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            structure.branches += _transformer_branches(name, module)
            activation = getattr(module.activation, "__name__", "relu")
            structure.after |= {f"{name}.linear1": activation, f"{name}.linear2": "linear"}
    return structure


class _Tracer(fx.Tracer):
    """A tracer to which a module that cannot be traced is one opaque node."""

    def __init__(self) -> None:
        super().__init__()
        self.opaque: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return super().is_leaf_module(m, module_qualified_name) or is_norm(m) or is_layer(m)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before = len(self.graph.nodes)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:  # whatever a forward does with what is not a tensor
            for node in reversed(list(self.graph.nodes)[before:]):
                self.graph.erase_node(node)
            name = self.path_of_module(m)
            self.opaque.append(name)
            return self.create_proxy("call_module", name, args, kwargs)


def _traced(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, fx.Graph, dict[str, nn.Module]]]:
    children = dict(module.named_children())
    if not children or is_layer(module):
        return
    tracer = _Tracer()
    try:
        graph = tracer.trace(module)
    except Exception:
        untraced = list(children)
    else:
        yield prefix, graph, dict(module.named_modules())
        untraced = tracer.opaque
    for name in untraced:
        yield from _traced(module.get_submodule(name), f"{prefix}{name}.")


def _transformer_branches(name: str, module: Any) -> list[Branch]:
    pieces = [[f"{name}.self_attn"], [f"{name}.linear1", f"{name}.linear2"]]
    if isinstance(module, nn.TransformerDecoderLayer):
        pieces.insert(1, [f"{name}.multihead_attn"])
    norms = [f"{name}.norm{number + 1}" for number in range(len(pieces))]
    post = not module.norm_first
    return [
        Branch(layers, [] if post else [norm], layers[-1], stream_normalised=post)
        for layers, norm in zip(pieces, norms, strict=True)
    ]


class _Reader:
    """One traced graph."""

    def __init__(self, prefix: str, graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
        self.prefix, self.graph, self.modules = prefix, graph, modules
        self.order = {node: position for position, node in enumerate(graph.nodes)}
        self.ancestors: dict[fx.Node, set[fx.Node]] = {}
        for node in graph.nodes:
            self.ancestors[node] = {node}.union(*(self.ancestors[parent] for parent in node.all_input_nodes))

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.modules.get(str(node.target)) if node.op == "call_module" else None

    def is_layer(self, node: fx.Node) -> bool:
        return bool(self.layers(node))

    def layers(self, node: fx.Node) -> list[str]:
        """Names of the weight layers that a node runs: one, or all inside a module that could not be traced."""
        module = self.module(node)
        if module is None:
            return []
        inside = [name for name, part in module.named_modules() if is_layer(part)]
        return [f"{self.prefix}{node.target}{'.' if name else ''}{name}" for name in inside]

    def is_norm(self, node: fx.Node) -> bool:
        module = self.module(node)
        return module is not None and is_norm(module)

    def name(self, node: fx.Node) -> str:
        return self.prefix + str(node.target)

    # ---------------------------------------------------------------- what follows a layer

    def activation(self, node: fx.Node) -> str | None:
        """The activation that a node computes, or None."""
        module = self.module(node)
        if module is not None:
            return activation_name(module)
        if node.op == "call_function":
            return FUNCTIONS.get(node.target)  # type: ignore[arg-type]
        return METHODS.get(str(node.target)) if node.op == "call_method" else None

    def activations(self) -> dict[str, str]:
        nodes = [node for node in self.graph.nodes if self.is_layer(node)]
        return {self.layers(node)[-1]: self.first_activation(node) for node in nodes}

    def first_activation(self, layer: fx.Node) -> str:
        """Breadth first through norms, dropout, pooling and sums, up to the nearest activation or weight layer."""
        waiting, seen = deque(layer.users), set(layer.users)
        while waiting:
            node = waiting.popleft()
            found = self.activation(node)
            if found is not None:
                return found
            if self.is_layer(node) or node.op == "output" or "attention" in str(node.target):
                return "linear"
            fresh = [user for user in node.users if user not in seen]
            waiting.extend(fresh)
            seen.update(fresh)
        return "linear"

    def normalised(self) -> set[str]:
        """Names of the layers whose output meets a norm before an activation or another layer."""
        nodes = [node for node in self.graph.nodes if self.is_layer(node)]
        return {self.layers(node)[-1] for node in nodes if self.meets_norm(node)}

    def meets_norm(self, layer: fx.Node) -> bool:
        waiting, seen = deque(layer.users), set(layer.users)
        while waiting:
            node = waiting.popleft()
            if self.is_norm(node):
                return True
            if self.activation(node) is None and not self.is_layer(node):
                fresh = [user for user in node.users if user not in seen]
                waiting.extend(fresh)
                seen.update(fresh)
        return False

    # ---------------------------------------------------------------- residual branches

    def branches(self) -> list[Branch]:
        found = []
        for node in self.graph.nodes:
            added = node.target in _ADDS or (node.op == "call_method" and node.target in ("add", "add_"))
            ends = [argument for argument in node.args if isinstance(argument, fx.Node)]
            if added and len(ends) == 2:
                branch = self.branch(node, *ends)
                if branch is not None:
                    found.append(branch)
        return found

    def branch(self, sum_node: fx.Node, left: fx.Node, right: fx.Node) -> Branch | None:
        common = self.ancestors[left] & self.ancestors[right]
        if not common:
            return None
        fork = max(common, key=self.order.__getitem__)
        if fork.op == "get_attr":  # both ends come from the same parameter
            return None
        sides = [self.between(fork, end) for end in (left, right)]
        layers = [[node for node in side if self.is_layer(node)] for side in sides]
        if len(layers[0]) == len(layers[1]):
            return None
        longer = 0 if len(layers[0]) > len(layers[1]) else 1
        if len(layers[longer]) > _MOST_LAYERS:
            return None
        end = (left, right)[longer]
        last, last_layer = self.nearest(end, (self.is_layer, self.is_norm)), self.nearest(end, (self.is_layer,))
        users = list(sum_node.users)
        # In order of use, with the layer nearest to the sum last: a gate beside it (squeeze-excitation) comes before.
        inner = [node for node in layers[longer] if node is not last_layer]
        norms = [self.name(node) for node in sides[longer] if self.is_norm(node)]
        return Branch(
            layers=[name for node in (*inner, last_layer) for name in self.layers(node)],
            norms=norms,
            last=self.name(last) if self.is_norm(last) else self.layers(last)[-1],
            ends_normalised=self.is_norm(last),
            stream_normalised=not norms and len(users) == 1 and self.is_norm(users[0]),
        )

    def between(self, fork: fx.Node, end: fx.Node) -> list[fx.Node]:
        """The nodes on the ways from a fork to an end, the end included, in order of use."""
        inner = [node for node in self.ancestors[end] if node is not fork and fork in self.ancestors[node]]
        return sorted(inner, key=self.order.__getitem__)

    def nearest(self, end: fx.Node, wanted: tuple[Any, ...]) -> fx.Node:
        """The node nearest above an end, itself included, that is one of the wanted; there is one."""
        waiting, seen = deque([end]), {end}
        while waiting:
            node = waiting.popleft()
            if any(test(node) for test in wanted):
                return node
            fresh = [parent for parent in node.all_input_nodes if parent not in seen]
            waiting.extend(fresh)
            seen.update(fresh)
        raise AssertionError("a residual branch holds a weight layer")
