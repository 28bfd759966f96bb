// The steady state: a step after which nothing about the parameters, gradients and states is new but their addresses.
// The loop here is most of what a step costs on the host: some 40 ns a parameter for SGD with momentum, most of them
// spent waiting for the cache lines of torch's tensors and storages.
#include "binding/members.h"
#include "binding/slots.h"

namespace gradfast {
namespace {

// How many members ahead of the loop their tensors are fetched into the cache.
constexpr std::size_t kAhead = 3;

void prefetch(const Member& member) {
  for (const at::Tensor& array : member.arrays) {
    const char* inner = reinterpret_cast<const char*>(array.unsafeGetTensorImpl());
    for (std::size_t line = 0; line < sizeof(c10::TensorImpl); line += 64) __builtin_prefetch(inner + line);
  }
}

}  // namespace

bool Members::refresh(const pybind11::dict& state, const std::vector<GroupSettings>& groups) {
  if (!same_rules(groups) || !state_view_.matches(state.ptr())) return false;
  for (std::size_t i = 0; i < members_.size(); ++i) {
    if (i + kAhead < members_.size()) prefetch(members_[i + kAhead]);
    Member& member = members_[i];
    const at::Tensor& gradient = member.whole.unsafeGetTensorImpl()->grad();
    if (gradient.defined() != member.active) return false;
    if (!member.active) continue;
    if (member.slot == nullptr || !refresh_member(member, gradient)) return false;
  }
  return true;
}

bool Members::refresh_member(Member& member, const at::Tensor& gradient) {
  const at::Tensor& parameter = member.parameter();
  if (parameter.numel() != member.elements || !parameter.is_non_overlapping_and_dense()) return false;
  if (member.has_master && member.version != version_of(parameter)) return false;
  if (!same_order(gradient, parameter) || !member.kinds[kGradient].describes(gradient)) return false;
  member.slot->arrays[kGradient] = member.kinds[kGradient].address(gradient);
  for (std::size_t a = 0; a < member.arrays.size(); ++a) {
    if (a == kGradient) continue;
    const at::Tensor& array = member.arrays[a];
    if (!member.kinds[a].describes(array) || !same_order(array, parameter)) return false;
    member.slot->arrays[a] = member.kinds[a].address(array);
  }
  if (member.step.is_same(member.updates)) return true;
  if (member.step.numel() != 1 || !member.step_kind.describes(member.step)) return false;
  member.slot->step = static_cast<float*>(member.step_kind.address(member.step));
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
  member.step_kind = ArrayKind(member.step);
}

void Members::hold_gradients() {
  for (Member& member : members_) {
    if (member.active && member.slot != nullptr) member.arrays[kGradient] = member.whole.grad();
  }
}

void Members::finish_step() {
  for (Member& member : members_) {
    if (!member.active) continue;
    for (std::size_t a = 0; a < member.arrays.size(); ++a) {
      if (a != kGradient) bump_version(member.arrays[a]);
    }
    if (member.sharded) bump_version(member.whole);
    if (member.has_master) member.version = version_of(member.parameter());
    if (member.arrays[kGradient].defined()) member.arrays[kGradient].reset();
  }
}

}  // namespace gradfast
