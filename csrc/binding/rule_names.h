// Rules and norms by the names and numbers that Python uses.
#pragma once

#include <c10/util/Exception.h>

#include <cmath>
#include <string>

#include "rules/norm.h"
#include "rules/rules.h"

namespace gradfast {

struct RuleInfo {
  const char* name;
  int states;
  int hyperparameters;
};

template <class... Rule>
RuleInfo rule_info(RuleList<Rule...>, int index) {
  static constexpr RuleInfo infos[] = {
      {Rule::kName, Rule::kStates, static_cast<int>(sizeof(typename Rule::Hyperparameters) / sizeof(double))}...};
  return infos[index];
}

template <class... Rule>
constexpr int number_of_rules(RuleList<Rule...>) {
  return sizeof...(Rule);
}

inline int rule_index(const std::string& name) {
  for (int index = 0; index < number_of_rules(Rules{}); ++index) {
    if (name == rule_info(Rules{}, index).name) return index;
  }
  TORCH_CHECK_VALUE(false, "gradfast: no rule is called '", name, "'");
}

inline Norm norm_of(double p) {
  TORCH_CHECK_VALUE(p >= 1, "gradfast: norm_type must be at least 1 (or inf), got ", p);
  if (p == 1) return {NormKind::one, p};
  if (p == 2) return {NormKind::two, p};
  if (std::isinf(p)) return {NormKind::infinity, p};
  return {NormKind::general, p};
}

}  // namespace gradfast
