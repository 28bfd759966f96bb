"""The norm of a model that lies on several ranks: joins what each of them measured of its own gradients.

A rank knows, of every tensor, the sum of powers `sum |x|^p` over the elements that it holds (or their largest magnitude
for the infinity norm). `Reduction` decides once which ranks these sums are joined over and whose count, and then joins
them at each step with one all-reduce for each process group, of one float64 a tensor. The result is the same on all
ranks to the last bit, and so is every decision taken from it; nothing waits for a device.

Whose sums count:

- a sharded dimension of a device mesh: every rank's, for each holds other elements;
- a replicated one: the first rank's alone, so that copies count once, exactly. Of the others a NaN or an infinity still
  enters, so that a copy that went bad stops all ranks and not only its own;
- a tensor on a part of the mesh (tensor parallel in one, FSDP over all): of the first part;
- a plain tensor beside DTensors is taken to be replicated over their mesh;
- `process_group`: ranks that hold different tensors (pipeline stages, parts of a model): the totals of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


_PLAIN = (Tensor, torch.nn.Parameter)


def is_dtensor(tensor: Any) -> bool:
    """Whether `tensor` is a `torch.distributed.tensor.DTensor`; does not import what nobody used."""
    return type(tensor) not in _PLAIN and hasattr(tensor, "_spec")


def spans_ranks(tensors: Sequence[Tensor]) -> bool:
    """Whether any of `tensors` is a DTensor."""
    return any(is_dtensor(tensor) for tensor in tensors)


def local_tensor(tensor: Any) -> Tensor:
    """Return the elements that this rank holds of a DTensor, and a plain tensor as it is."""
    if not is_dtensor(tensor):
        return tensor
    local = tensor._local_tensor
    # What a collective has not yet delivered is a wrapper too, which can be waited for (on its stream, not here).
    return local.wait() if hasattr(local, "wait") else local


def whole_tensor(tensor: Any) -> Tensor:
    """Return all of a DTensor, gathered, and a plain tensor as it is."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def is_partial(tensor: Any) -> bool:
    """Whether it is a DTensor of which each rank holds an addend (or the like) of every element."""
    return is_dtensor(tensor) and any(placement.is_partial() for placement in tensor._spec.placements)


def reduce_partial(tensors: Sequence[Any]) -> list[Tensor]:
    """Return the tensors with the partial DTensors among them reduced, one collective for each of these."""
    reduced = []
    complete = None  # placements seen to be so: neighbours mostly share them
    for tensor in tensors:
        if is_dtensor(tensor) and tensor._spec.placements != complete:
            if is_partial(tensor):
                from torch.distributed.tensor import Replicate

                placements = [Replicate() if placement.is_partial() else placement for placement in tensor.placements]
                tensor = tensor.redistribute(placements=placements)
            complete = tensor._spec.placements
        reduced.append(tensor)
    return reduced


def finish(sums: Tensor, norm_type: float) -> Tensor:
    """Return norms from sums of powers."""
    if norm_type in (1.0, float("inf")):
        return sums
    return sums.sqrt() if norm_type == 2.0 else sums ** (1.0 / norm_type)


class Reduction:
    """Joins the ranks' sums of powers of a list of tensors, the same list in the same order on all ranks of a mesh.

    Args:
        tensors: parameters or gradients, DTensors or plain.
        names: what an error calls them.
        process_group: ranks that hold other tensors, whose totals are added to this one's.
        replicated: for each plain tensor whether all ranks hold a copy of it, to be counted once. `None` is the rule:
            beside DTensors it is a copy, and in a `process_group` it is not.

    Raises:
        ValueError: a tensor's mesh has not this rank in it, holds ranks of `process_group`, or a placement is partial.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        names: Sequence[str],
        process_group: ProcessGroup | None = None,
        replicated: Sequence[bool | None] | None = None,
    ) -> None:
        copies = replicated if replicated is not None else [None] * len(tensors)
        layouts = _layouts(tensors, names)
        self.spans = _spans(layouts, names, copies)
        self.across = None
        if process_group is not None:
            _check_disjoint(process_group, layouts, names)
            # What a span has joined already counts once in it.
            plain_copies = [bool(copy) and not self.spans for copy in copies]
            self.across = _Across(process_group, plain_copies)
        self.sums: Tensor | None = None
        self.added: Tensor | None = None

    @property
    def device_type(self) -> str:
        """Where the sums of a rank that holds no tensor at all should be: where the others' are."""
        return "cpu" if self.across is None else self.across.ranks.usual_device_type()

    def join(self, sums: Tensor, infinity: bool, added: Tensor | None = None) -> Tensor:
        """Return the total over all tensors and ranks, a 0-d float64 tensor on the device of `sums`.

        Args:
            sums: float64, one a tensor: sums of powers, zero for a tensor without a gradient.
            infinity: they are largest magnitudes instead, and so is the result.
            added: further sums, one a tensor, joined in the same all-reduce (a second one beside largest magnitudes);
                `self.added` has them afterwards, of whole tensors.
        """
        if added is None or infinity:
            self.sums = self._join_spans(sums, infinity)  # of whole tensors from here on
            self.added = None if added is None else self._join_spans(added, False)
        else:
            self.sums, self.added = self._join_spans(torch.stack([sums, added]), False).unbind()
        if self.across is not None:
            return self.across.join(self.sums, infinity)
        return _total(self.sums, infinity)

    def join_added(self, added: Tensor) -> None:
        """Join sums, one a tensor, into `self.added` alone."""
        self.added = self._join_spans(added, False)

    def _join_spans(self, sums: Tensor, infinity: bool) -> Tensor:
        """Join sums of each tensor, in the last dimension, over the ranks that hold parts of it."""
        for span in self.spans:
            if span.index is None:
                sums = span.join(sums, infinity)
            else:
                index = span.index = span.index.to(sums.device)
                sums = sums.index_copy(-1, index, span.join(sums.index_select(-1, index), infinity))
        return sums

    def first_nonfinite(self, names: Sequence[str]) -> str:
        """Name a tensor whose sum was not finite at the last `join`, or say on which rank it is; "" if none. Waits."""
        if self.sums is not None:
            bad = (~torch.isfinite(self.sums)).nonzero()
            if len(bad):
                return names[int(bad[0])]
        rank = None if self.across is None else self.across.first_nonfinite()
        return "" if rank is None else f"a parameter of rank {rank}"


class _Layout:
    """How one DTensor lies on the ranks."""

    def __init__(self, tensor: Any, name: str) -> None:
        self.mesh = tensor.device_mesh
        self.ranks = _ranks_of(self.mesh)
        self.root_ranks = _ranks_of(_root(self.mesh))
        self.first_copy = True  # in its own mesh
        coordinate = self.mesh.get_coordinate()
        for dimension, placement in enumerate(tensor.placements):
            if placement.is_partial():
                raise ValueError(
                    f"gradfast: {name!r} has the placement {placement} on dimension {dimension} of {self.mesh}: its "
                    "elements are not known before they are reduced; redistribute it to Shard or Replicate first"
                )
            if placement.is_replicate():
                self.first_copy &= coordinate is not None and coordinate[dimension] == 0
        self.here = coordinate is not None

    def counts_in(self, span: frozenset[int]) -> bool:
        """Whether this rank's elements enter a sum over the ranks of `span`: in one copy of the tensor alone."""
        # Slices of one mesh hold copies of the tensor; the slice with the first rank counts.
        return self.here and self.first_copy and min(self.root_ranks & span, default=-1) in self.ranks


class _Span:
    """A set of ranks, and the tensors whose sums are joined over all of it."""

    def __init__(self, ranks: frozenset[int], mesh: Any, members: list[int], counted: list[bool], count: int) -> None:
        self.ranks = ranks
        self.groups = [Ranks(group) for group in groups_of(ranks, mesh, torch.distributed.get_world_size())]
        self.index = None if len(members) == count else torch.tensor(members)
        self.counted = None if all(counted) else torch.tensor(counted)

    def join(self, sums: Tensor, infinity: bool) -> Tensor:
        if infinity:
            # The maximum of a collective may drop a NaN: it travels as a flag.
            sent = torch.cat([torch.nan_to_num(sums, nan=torch.inf, posinf=torch.inf), torch.isnan(sums).double()])
            largest, was_nan = self._reduce(sent, "MAX").chunk(2)
            return torch.where(was_nan > 0, torch.nan, largest)
        if self.counted is not None:
            self.counted = self.counted.to(sums.device)
            sums = torch.where(self.counted | ~torch.isfinite(sums), sums, 0.0)
        else:
            sums = sums.clone()
        return self._reduce(sums, "SUM")

    def _reduce(self, values: Tensor, operation: str) -> Tensor:
        for group in self.groups:
            values = group.all_reduce(values, operation)
        return values


class Ranks:
    """A process group, and which devices it reaches."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        # Accelerators first.
        self.device_types = sorted((device.type for device in group._device_types), key=lambda kind: kind == "cpu")

    def all_reduce(self, values: Tensor, operation: str) -> Tensor:
        """All-reduce `values` in place, or a copy of them where the group does not reach their device."""
        moved = values if values.device.type in self.device_types else values.to(self.device_types[0])
        torch.distributed.all_reduce(moved, getattr(torch.distributed.ReduceOp, operation), group=self.group)
        return moved.to(values.device)

    def usual_device_type(self) -> str:
        """Return the kind of device that the group is for: an accelerator, unless gloo serves that, as it can."""
        backends = dict(entry.split(":") for entry in torch.distributed.get_backend_config(self.group).split(","))
        return next((kind for kind in self.device_types if kind != "cpu" and backends.get(kind) != "gloo"), "cpu")


class _Across:
    """Ranks that hold different tensors: each sends its total in its own place, and all add them in one order."""

    def __init__(self, group: ProcessGroup, replicated: Sequence[bool]) -> None:
        self.ranks = Ranks(group)
        self.size, self.rank = group.size(), group.rank()
        copies = self.rank != 0 and any(replicated)
        self.counted = ~torch.tensor(list(replicated), dtype=torch.bool) if copies else None
        self.totals: Tensor | None = None

    def join(self, sums: Tensor, infinity: bool) -> Tensor:
        if self.counted is not None:
            self.counted = self.counted.to(sums.device)
            sums = torch.where(self.counted | ~torch.isfinite(sums), sums, 0.0)
        totals = sums.new_zeros(self.size)
        totals[self.rank] = _total(sums, infinity)
        self.totals = self.ranks.all_reduce(totals, "SUM")
        return _total(self.totals, infinity)

    def first_nonfinite(self) -> int | None:
        if self.totals is None:
            return None
        bad = (~torch.isfinite(self.totals)).nonzero()
        return torch.distributed.get_global_rank(self.ranks.group, int(bad[0])) if len(bad) else None


def _total(sums: Tensor, infinity: bool) -> Tensor:
    if infinity:
        return sums.amax() if len(sums) else sums.new_zeros(())
    return sums.sum()


def _layouts(tensors: Sequence[Any], names: Sequence[str]) -> list[_Layout | None]:
    """Return a layout for each DTensor, made once for those that lie in the same way."""
    known: dict[Any, _Layout] = {}
    layouts: list[_Layout | None] = []
    last: Any = None
    for tensor, name in zip(tensors, names):
        if not is_dtensor(tensor):
            layouts.append(None)
            continue
        spec = tensor._spec
        # Most tensors lie as the one before: comparing placements takes a tenth of the time of hashing them.
        if last is None or spec.mesh is not last.mesh or spec.placements != last.placements:
            key = (id(spec.mesh), spec.placements)
            layout = known.get(key) or known.setdefault(key, _Layout(tensor, name))
            last = spec
        layouts.append(layout)
    return layouts


def _spans(layouts: Sequence[_Layout | None], names: Sequence[str], replicated: Sequence[bool | None]) -> list[_Span]:
    """Give every tensor the largest set of ranks that a mesh with this tensor's ranks covers."""
    # In the order of the tensors, which is the same on all ranks, and so is that of the collectives.
    sets = list(dict.fromkeys(layout.ranks for layout in layouts if layout is not None))
    largest = [ranks for ranks in sets if not any(ranks < other for other in sets)]
    here = torch.distributed.get_rank() if sets else 0
    widest = max(largest, key=len, default=None)
    spans = []
    taken: set[int] = set()
    for ranks in largest:
        members, counted = [], []
        counts = {layout: layout.counts_in(ranks) for layout in set(layouts) if layout is not None}
        for index, layout in enumerate(layouts):
            if index in taken:
                continue
            if layout is None and ranks == widest:
                members.append(index)
                counted.append(here == min(ranks) or replicated[index] is False)
            elif layout is not None and layout.ranks <= ranks:
                members.append(index)
                counted.append(counts[layout])
        taken.update(members)
        if here not in ranks:
            raise ValueError(
                f"gradfast: rank {here} is not in the mesh of {names[members[0]]!r}, whose ranks are {sorted(ranks)}; "
                "give each rank's optimiser the parameters that the rank holds, and process_group= to join the ranks"
            )
        if len(ranks) > 1:
            mesh = next(layout.mesh for layout in layouts if layout is not None and layout.ranks == ranks)
            spans.append(_Span(ranks, mesh, members, counted, len(layouts)))
    return spans


def groups_of(ranks: frozenset[int], mesh: Any, world: int) -> list[ProcessGroup]:
    """Return the process groups to reduce over one after the other: one if some group has all `ranks` of the mesh."""
    if len(ranks) == world:
        return [cast("ProcessGroup", torch.distributed.group.WORLD)]
    if mesh.ndim > 1:
        for flattened in getattr(_root(mesh), "_flatten_mapping", {}).values():
            if _ranks_of(flattened) == ranks:
                return [flattened.get_group()]
    return [mesh.get_group(dimension) for dimension in range(mesh.ndim) if mesh.size(dimension) > 1]


# Of meshes, which work their ranks out anew each time. Equal meshes have equal ranks.
_known_ranks: WeakKeyDictionary[Any, frozenset[int]] = WeakKeyDictionary()


def _ranks_of(mesh: Any) -> frozenset[int]:
    ranks = _known_ranks.get(mesh)
    if ranks is None:
        ranks = _known_ranks[mesh] = frozenset(mesh.mesh.flatten().tolist())
    return ranks


def _root(mesh: Any) -> Any:
    return mesh._get_root_mesh() if hasattr(mesh, "_get_root_mesh") else mesh


def _check_disjoint(group: ProcessGroup, layouts: Sequence[_Layout | None], names: Sequence[str]) -> None:
    ranks = set(torch.distributed.get_process_group_ranks(group)) - {torch.distributed.get_rank()}
    for layout, name in zip(layouts, names):
        if layout is not None and ranks & layout.ranks:
            raise ValueError(
                f"gradfast: process_group= has ranks {sorted(ranks & layout.ranks)} in common with the mesh of "
                f"{name!r}, over which that is joined anyway. Give only a group whose ranks hold other parameters, "
                "such as the stages of a pipeline"
            )
