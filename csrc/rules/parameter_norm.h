// Clips each parameter's gradient by a norm of its own:  g_i <- g_i * min(1, max_norm / (|g_i| + 1e-6)).
#pragma once

#include "rules/policy.h"

namespace gradfast {

struct ParameterNorm {
  static constexpr const char* kName = "parameter_norm";
  static constexpr int kValues = 1;  // max_norm
  static constexpr bool kEachTensor = true;
  static constexpr int state_size(int) { return 0; }

  static GF_HOST_DEVICE Verdict judge(const Policy&, const double*, double) { return {}; }
  static GF_HOST_DEVICE void advance(const Policy&, double*, double, const Verdict&) {}

  static GF_HOST_DEVICE double tensor_coefficient(const Policy& policy, const double*, int, double norm) {
    return clip_coefficient(policy.values[0], norm);
  }
  static GF_HOST_DEVICE void advance_tensor(const Policy&, double*, int, double) {}
};

}  // namespace gradfast
