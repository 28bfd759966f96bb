// Every rule that the backends offer. A new optimiser adds its header and its name here, and both backends have it.
#pragma once

#include "rules/adam.h"
#include "rules/gradient.h"
#include "rules/lion.h"
#include "rules/sgd.h"

namespace gradfast {

template <class... Rule>
struct RuleList {};

using Rules = RuleList<Sgd<false>, Sgd<true>, Adam<false>, Adam<true>, Lion, ClipGradient>;

// Rules that know the size of their update, and so can clip it.
template <class Rule>
concept ClipsUpdates = requires(const typename Rule::template Constants<float>& k) { Rule::squared_update_factor(k); };

// The constants of a rule for gradients that are multiplied with `factor` beside their scale.
template <class Constants>
GF_HOST_DEVICE Constants rescaled(Constants constants, double factor) {
  constants.clip.scale = static_cast<decltype(constants.clip.scale)>(constants.clip.scale * factor);
  return constants;
}

inline constexpr int kMaxStates = 3;
inline constexpr int kMaxHyperparameters = 8;
inline constexpr int kMaxConstantsBytes = 128;

// The hyper-parameters of one parameter group as they travel from Python: the fields of a rule's Hyperparameters.
struct PackedHyperparameters {
  double value[kMaxHyperparameters];
};

template <class Rule>
GF_HOST_DEVICE typename Rule::Hyperparameters unpack(const PackedHyperparameters& packed) {
  static_assert(sizeof(typename Rule::Hyperparameters) <= sizeof packed, "raise kMaxHyperparameters");
  typename Rule::Hyperparameters hyperparameters;
  std::memcpy(&hyperparameters, packed.value, sizeof hyperparameters);
  return hyperparameters;
}

}  // namespace gradfast
