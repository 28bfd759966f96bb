"""From the second step on the engine reads addresses alone: whatever else Python changes in between must be noticed."""

import copy

import pytest
import torch

import gradfast

KINDS = {
    "SGD": (gradfast.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "AdamW": (gradfast.AdamW, torch.optim.AdamW, {"lr": 0.1}),
}


class Pair:
    """An optimiser of gradfast and torch's, on equal float64 parameters, fed the same gradients."""

    def __init__(self, kind, shapes=((4, 3), (5,), (2, 3, 1, 1)), **options):
        ours, theirs, defaults = KINDS[kind]
        self.generator = torch.Generator().manual_seed(0)
        self.ours = [self.randn(shape).requires_grad_() for shape in shapes]
        self.theirs = [p.detach().clone().requires_grad_() for p in self.ours]
        self.fast = ours(self.ours, **{**defaults, **options})
        self.slow = theirs(self.theirs, **{**defaults, **options})

    def randn(self, shape):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def step(self, change_gradient=lambda gradient: gradient):
        for p, q in zip(self.ours, self.theirs, strict=True):
            gradient = self.randn(q.shape)
            p.grad, q.grad = change_gradient(gradient.clone()), gradient
        self.fast.step()
        self.slow.step()

    def check(self):
        for p, q in zip(self.ours, self.theirs, strict=True):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-13, atol=1e-13)


@pytest.fixture(params=KINDS)
def pair(request):
    pair = Pair(request.param)
    for _ in range(3):
        pair.step()
    return pair


def both(pair):
    return ((pair.fast, pair.ours), (pair.slow, pair.theirs))


def change_lr(pair):
    for optimizer, _ in both(pair):
        optimizer.param_groups[0]["lr"] = 0.01


def load_state(pair):
    for optimizer, _ in both(pair):
        loaded = copy.deepcopy(optimizer.state_dict())
        for entries in loaded["state"].values():
            for value in entries.values():
                value.mul_(2)
        optimizer.load_state_dict(loaded)


def exchange_state_tensors(pair):
    for optimizer, parameters in both(pair):
        entries = optimizer.state[parameters[0]]
        for key, value in entries.items():
            entries[key] = value * 2


def swap_state_data(pair):
    for optimizer, parameters in both(pair):
        for value in optimizer.state[parameters[1]].values():
            value.data = value.data * 2


def shrink_state_data_and_fill_it_again(pair):
    """As a tool does that moves the state out of memory in between."""
    for optimizer, parameters in both(pair):
        for value in optimizer.state[parameters[1]].values():
            kept = value.clone()
            value.untyped_storage().resize_(0)
            value.untyped_storage().resize_(kept.nbytes)
            value.copy_(kept)


def change_state_in_place(pair):
    for optimizer, parameters in both(pair):
        for value in optimizer.state[parameters[0]].values():
            value.mul_(2)


def transpose_state_in_place(pair):
    for optimizer, parameters in both(pair):
        for value in optimizer.state[parameters[0]].values():
            if value.dim() == 2:
                kept = value.clone()
                value.as_strided_(value.shape, (1, value.shape[0])).copy_(kept)  # in the same memory


def share_state_until_it_is_written(pair):
    pair.shared = [(torch._lazy_clone(value), value.clone()) for value in pair.fast.state[pair.ours[0]].values()]


def add_to_state(pair):
    for optimizer, parameters in both(pair):
        optimizer.state[parameters[1]]["note"] = "a tool's own"


def swap_parameter_data(pair):
    for _, parameters in both(pair):
        parameters[0].data = torch.ones(4, 3, dtype=torch.float64)


def transpose_parameter_data(pair):
    for _, parameters in both(pair):
        parameters[0].data = parameters[0].data.t().contiguous().t()


def drop_gradient(pair):
    pair.ours[1].requires_grad_(False)
    pair.ours[1].grad = pair.theirs[1].grad = None
    pair.ours.pop(1), pair.theirs.pop(1)


def shift_gradient_storage(pair):
    pair.step(
        lambda gradient: torch.cat([gradient.flatten(), gradient.flatten()])[gradient.numel() :].view_as(gradient)
    )


def transpose_gradient(pair):
    pair.step(lambda gradient: gradient.mT.contiguous().mT if gradient.dim() == 2 else gradient)


def negate_gradient_lazily(pair):
    pair.step(lambda gradient: torch._neg_view(-gradient))


def odd_strides_of_size_one(pair):
    pair.step(lambda g: torch.as_strided(g, g.shape, (3, 1, 7, 9)) if g.dim() == 4 else g)


CHANGES = [
    change_lr,
    load_state,
    exchange_state_tensors,
    swap_state_data,
    shrink_state_data_and_fill_it_again,
    change_state_in_place,
    transpose_state_in_place,
    share_state_until_it_is_written,
    add_to_state,
    swap_parameter_data,
    transpose_parameter_data,
    drop_gradient,
    shift_gradient_storage,
    transpose_gradient,
    negate_gradient_lazily,
    odd_strides_of_size_one,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_between_steps_is_noticed(pair, change):
    change(pair)
    for _ in range(2):
        pair.step()
    pair.check()
    for shared, before in getattr(pair, "shared", ()):
        assert torch.equal(shared, before)


def test_a_learning_rate_tensor_changed_in_place_is_noticed():
    pair = Pair("AdamW", lr=torch.tensor(0.1, dtype=torch.float64))
    pair.step()
    for optimizer, _ in both(pair):
        optimizer.param_groups[0]["lr"].mul_(0.5)
    pair.step()
    pair.check()


def test_a_list_of_betas_changed_in_place_is_noticed():
    pair = Pair("AdamW")
    for optimizer, _ in both(pair):
        optimizer.param_groups[0]["betas"] = [0.9, 0.99]
    pair.step()
    for optimizer, _ in both(pair):
        optimizer.param_groups[0]["betas"][0] = 0.5
    pair.step()
    pair.check()


def test_a_gradient_that_turns_sparse_is_refused_and_changes_nothing(pair):
    before = [p.detach().clone() for p in pair.ours]
    pair.ours[1].grad = pair.ours[1].data.to_sparse()
    with pytest.raises(NotImplementedError, match="sparse"):
        pair.fast.step()
    for p, old in zip(pair.ours, before, strict=True):
        assert torch.equal(p.detach(), old)


def test_versions_of_what_was_written_are_bumped(pair):
    written = [*pair.ours, *(entries["exp_avg"] for entries in pair.fast.state.values() if "exp_avg" in entries)]
    before = [tensor._version for tensor in written]
    gradients = [p.grad._version for p in pair.ours]
    pair.fast.step()
    assert [tensor._version for tensor in written] == [version + 1 for version in before]
    assert [p.grad._version for p in pair.ours] == gradients


def test_gradients_are_not_kept_alive(pair):
    import weakref

    pair.step()
    watched = weakref.ref(pair.ours[0].grad)
    pair.ours[0].grad = None
    assert watched() is None
