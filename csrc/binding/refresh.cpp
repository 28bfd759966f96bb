// The steady state: a step after which nothing about the parameters, gradients and states is new but their addresses.
// The loop here is most of what a step costs on the host, nearly all of it spent waiting for cache lines of torch's
// tensors, storages and version counters: some twenty a parameter for AdamW. So they are fetched ahead, and each is
// touched in one pass.
#include <array>

#include "binding/members.h"
#include "binding/slots.h"

namespace gradfast {
namespace {

// How many members ahead of the loop their lines are fetched: in stages, as what leads to a line must be there before.
constexpr std::size_t kTensors = 8, kBehindTensors = 5, kGradients = 3, kStorages = 1;

void prefetch(const at::Tensor& tensor) {
  const char* inner = reinterpret_cast<const char*>(tensor.unsafeGetTensorImpl());
  for (std::size_t line = 0; line < sizeof(c10::TensorImpl); line += 64) __builtin_prefetch(inner + line);
}

const at::Tensor& gradient_of(const Member& member) { return member.whole.unsafeGetTensorImpl()->grad(); }

void prefetch_tensors(const Member& member) {
  prefetch(member.parameter());
  for (std::size_t a = 0; a < member.arrays.size(); ++a) {
    if (a != kGradient) member.watches[a].prefetch(member.arrays[a]);
  }
  member.step_watch.prefetch(member.step);
}

void prefetch_behind_tensors(const Member& member) {
  for (std::size_t a = 0; a < member.arrays.size(); ++a) {
    if (a != kGradient) Watch::prefetch_version(member.arrays[a]);
  }
  Watch::prefetch_version(member.step);
}

void prefetch_storage(const at::Tensor& gradient) {
  __builtin_prefetch(gradient.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl());
}

}  // namespace

bool Members::refresh(const pybind11::dict& state, const std::vector<GroupSettings>& groups) {
  refreshed_ = false;
  if (!same_rules(groups) || !state_view_.matches(state.ptr())) return false;
  const auto ahead = [this](std::size_t i, auto&& fetch) {
    if (i < members_.size() && members_[i].slot != nullptr) fetch(members_[i]);
  };
  // Where the gradients of the next members are: torch is asked once for each, as that costs a call through two tables.
  std::array<const at::Tensor*, kGradients + 1> gradients{};
  const auto find_gradient = [&](std::size_t i) {
    if (i >= members_.size()) return;
    const at::Tensor& gradient = gradient_of(members_[i]);
    gradients[i % gradients.size()] = &gradient;
    prefetch(gradient);
  };
  for (std::size_t i = 0; i < kGradients; ++i) find_gradient(i);
  for (std::size_t i = 0; i < members_.size(); ++i) {
    ahead(i + kTensors, prefetch_tensors);
    ahead(i + kBehindTensors, prefetch_behind_tensors);
    find_gradient(i + kGradients);
    if (i + kStorages < members_.size()) prefetch_storage(*gradients[(i + kStorages) % gradients.size()]);
    Member& member = members_[i];
    const at::Tensor& gradient = *gradients[i % gradients.size()];
    if (gradient.defined() != member.active) return false;
    if (!member.active) continue;
    if (member.slot == nullptr || !refresh_member(member, gradient)) return false;
  }
  refreshed_ = true;
  return true;
}

bool Members::refresh_member(Member& member, const at::Tensor& gradient) {
  const at::Tensor& parameter = member.parameter();
  if (parameter.numel() != member.elements || !parameter.is_non_overlapping_and_dense()) return false;
  if (member.row_length > 0 && (row_length_of(parameter) != member.row_length || !has_rows_in_order(parameter))) {
    return false;
  }
  if (member.has_master && member.version != version_of(parameter)) return false;
  if (!same_order(gradient, parameter) || !member.kinds[kGradient].describes(gradient)) return false;
  member.slot->arrays[kGradient] = member.kinds[kGradient].address(gradient);
  for (std::size_t a = 0; a < member.arrays.size(); ++a) {
    if (a == kGradient) continue;
    const at::Tensor& array = member.arrays[a];
    Watch& watch = member.watches[a];
    if (array.is_same(parameter) || !watch.is_unchanged(array)) {
      if (!member.kinds[a].describes(array) || !same_order(array, parameter)) return false;
      member.slot->arrays[a] = member.kinds[a].address(array);
      watch = Watch(array);
    }
    watch.bump_version(array);
  }
  if (member.has_master) member.version = version_of(parameter);
  if (member.step.is_same(member.updates) || member.step_watch.is_unchanged(member.step)) return true;
  if (member.step.numel() != 1 || !member.step_kind.describes(member.step)) return false;
  member.slot->step = static_cast<float*>(member.step_kind.address(member.step));
  member.step_watch = Watch(member.step);
  return true;
}

void Members::set_slot(std::size_t index, Slot* slot) {
  Member& member = members_[index];
  bool plain = slot->layout < 0 && member.arrays[kGradient].is_same(member.whole.grad());
  for (std::size_t a = 0; a < member.arrays.size(); ++a) {
    member.kinds[a] = ArrayKind(member.arrays[a]);
    plain &= slot->arrays[a] == member.arrays[a].data_ptr() || slot->elements == 0;
  }
  member.slot = plain ? slot : nullptr;
  member.elements = member.parameter().numel();
  member.row_length = slot->row_length;
  member.step_kind = ArrayKind(member.step);
  for (std::size_t a = 0; a < member.arrays.size(); ++a) member.watches[a] = Watch();
  member.step_watch = Watch();
}

void Members::hold_gradients() {
  for (Member& member : members_) {
    if (member.active && member.slot != nullptr) member.arrays[kGradient] = member.whole.grad();
  }
  holds_gradients_ = true;
}

void Members::finish_step() {
  if (refreshed_ && !holds_gradients_) return;
  for (Member& member : members_) {
    if (!member.active) continue;
    for (std::size_t a = 0; a < member.arrays.size(); ++a) {
      if (a != kGradient && !refreshed_) bump_version(member.arrays[a]);
    }
    if (member.sharded) bump_version(member.whole);
    if (member.has_master) member.version = version_of(member.parameter());
    if (member.arrays[kGradient].defined()) member.arrays[kGradient].reset();
  }
  holds_gradients_ = false;
}

}  // namespace gradfast
