// What a step computes: every rule on every dtype, over sizes that cross every tail, against the oracle.
#include <cmath>
#include <string>

#include "cases.h"
#include "devices.h"
#include "model.h"

namespace test {
namespace {

using gradfast::NonFinite;
using gradfast::NormKind;
using gradfast::cuda::Stepper;

constexpr DType kDTypes[] = {DType::float64, DType::float32, DType::float16, DType::bfloat16};

// Hyper-parameters with every term at work.
std::vector<double> values_of(int rule, int variant = 0) {
  const double on = variant % 2;
  switch (rule) {
    case kSgd:
    case kSgdMomentum:
      return {0.1, 0.9, on ? 0 : 0.25, on, 0.01, 0.001, on};
    case kAdam:
    case kAmsgrad:
      return {0.01, 0.9, 0.99, 1e-3, 0.02, 0.001, on, on};
    case kLion:
      return {0.01, 0.9, 0.99, 0.02, 0.001, on};
    default:
      return {0};
  }
}

// 0 to beyond two vectors of every dtype; one warp's batch and its neighbours; one chunk and its neighbours; more.
const std::vector<std::int64_t> kSizes = {0,    1,    2,    3,    4,    5,    7,    8,    9,    15,   16,
                                          17,   31,   33,   127,  128,  129,  255,  257,  511,  512,  513,
                                          1023, 1025, 2049, 4095, 4096, 4097, 4103, 8192, 8193, 12301};

Model model_of(DType dtype, int rule, bool misaligned, int variant = 0) {
  Model model(17 + rule);
  const int group = model.add_group(rule, values_of(rule, variant));
  int shift = 0;
  for (const std::int64_t size : kSizes) {
    Shape shape = vector_of(size);
    if (misaligned) misalign(shape, shift, dtype);
    model.add(shape, dtype, group, static_cast<float>(shift % 4));
  }
  return model;
}

void all_rules_and_dtypes() {
  for (const DType dtype : kDTypes) {
    for (int rule = 0; rule < kRuleCount; ++rule) {
      for (const bool misaligned : {false, true}) {
        case_name = std::string(name_of(rule)) + " " + name_of(dtype) + (misaligned ? " misaligned" : "");
        Model model = model_of(dtype, rule, misaligned, misaligned);
        model.clip.max_norm = 1;
        Stepper stepper(0);
        model.step_and_check(stepper, true);
        model.fill_gradients();
        model.step_and_check(stepper, false);
      }
    }
  }
}

// All arrays of a tensor with the same distance from a boundary, and each alone with another.
void alignments() {
  for (const DType dtype : kDTypes) {
    const int vector = 16 / static_cast<int>(size_of(dtype));
    Model model(5);
    const int group = model.add_group(kAmsgrad, values_of(kAmsgrad));
    for (int shift = 0; shift < vector; ++shift) {
      for (int odd = -1; odd < 5; ++odd) {
        Shape shape = vector_of(3 * vector + 1 + shift + (odd == 2 ? 4096 : 0));
        shape.shift.fill(shift);
        if (odd >= 0) shape.shift[odd] = (shift + 1) % vector;
        model.add(shape, dtype, group);
      }
    }
    model.clip.max_norm = 0.5;
    Stepper stepper(0);
    model.step_and_check(stepper, true);
  }
}

void layouts() {
  for (const DType dtype : kDTypes) {
    for (const int rule : {kSgdMomentum, kAmsgrad}) {
      Model model(3);
      const int group = model.add_group(rule, values_of(rule));
      model.add(strided({5, 7}, {7, 1}, {1, 5}, {7, 1}), dtype, group);     // transposed gradient
      model.add(vector_of(100), dtype, group);                              // a dense one between
      model.add(strided({6, 4}, {9, 2}, {4, 1}, {4, 1}), dtype, group);     // a view with gaps
      model.add(strided({3, 50}, {50, 1}, {0, 1}, {50, 1}), dtype, group);  // an expanded gradient
      model.add(strided({2, 3, 4, 5}, {60, 20, 5, 1}, {60, 1, 15, 3}, {60, 20, 5, 1}), dtype, group);  // channels last
      model.add(strided({2, 2, 2, 2, 2, 2, 2, 2}, {1, 2, 4, 8, 16, 32, 64, 128}, {128, 64, 32, 16, 8, 4, 2, 1},
                        {1, 2, 4, 8, 16, 32, 64, 128}),
                dtype, group);
      model.add(strided({80, 60}, {60, 1}, {1, 80}, {60, 1}), dtype, group);  // more than one chunk
      model.clip.max_norm = 1;
      Stepper stepper(0);
      model.step_and_check(stepper, true);
      model.fill_gradients();
      model.step_and_check(stepper, false);
    }
  }
}

void norms() {
  for (const NormKind kind : {NormKind::one, NormKind::two, NormKind::infinity, NormKind::general}) {
    for (const DType dtype : kDTypes) {
      Model model = model_of(dtype, kSgdMomentum, true);
      model.norm = {kind, kind == NormKind::general ? 3.5 : 2};
      model.clip.max_norm = 0.7;
      Stepper stepper(0);
      model.step_and_check(stepper, true);
      check(stepper.launches() == (kind == NormKind::two ? 1 : 2), "launches");
    }
  }
}

// A float's square overflows above 1e19 and vanishes below 1e-23; float16's own squares above 256.
void extreme_gradients() {
  for (const double size : {1e-30, 1e-22, 1e18, 1e25, 6e4}) {
    for (const DType dtype : kDTypes) {
      if (dtype == DType::float16 && size != 6e4) continue;
      Model model(9);
      model.largest_gradient = size;
      model.add_group(kSgd, {0.1, 0, 0, 0, 0, 0, 0});
      model.add(vector_of(5000), dtype, 0);
      model.fill_gradients();
      model.set_gradient(0, 77, 0);
      model.clip.max_norm = 1;
      Stepper stepper(0);
      model.step_and_check(stepper, true);
    }
  }
}

void nonfinite() {
  for (const double bad : {static_cast<double>(NAN), HUGE_VAL, -HUGE_VAL}) {
    for (const NonFinite policy : {NonFinite::skip, NonFinite::propagate}) {
      for (const std::int64_t element : {0, 4, 4096, 12300}) {
        Model model(4);
        model.add_group(kSgdMomentum, values_of(kSgdMomentum));
        for (const std::int64_t size : {300, 12301, 5000}) model.add(vector_of(size), DType::float32, 0, 2);
        model.clip = {0.5, policy};
        Stepper stepper(0);
        model.step_and_check(stepper, true);
        model.set_gradient(1, element, bad);
        model.step_and_check(stepper, false);  // counters, states and parameters stay, or all become NaN
        check(model.report(stepper).first_nonfinite == 1, "the second tensor is named");
        model.set_gradient(1, element, 0.5);
        if (policy == NonFinite::skip) model.step_and_check(stepper, false);
      }
    }
  }
}

void mixed_precision_scalars() {
  for (const DType dtype : {DType::float16, DType::float32}) {
    Model model = model_of(dtype, kAdam, false);
    model.loss_scale = 1024;
    model.largest_gradient = 100;
    model.fill_gradients();
    model.clip.max_norm = 1;
    Stepper stepper(0);
    model.step_and_check(stepper, true);
    model.found_infinite = true;
    model.step_and_check(stepper, false);
    model.found_infinite = false;
    model.step_and_check(stepper, false);
    check(model.skipped_steps == 1, "one step was skipped");
  }
}

// Groups differ in scalars, tensors in their number of updates: constants are made anew where they must be.
void groups_and_counters() {
  for (const int rule : {kSgdMomentum, kAdam}) {
    Model model(8);
    for (int g = 0; g < 5; ++g) {
      model.add_group(rule, values_of(rule, g));
      model.problem().groups[g].values.value[0] = 0.01 * (g + 1);
    }
    model.set_lr_on_device(1, 0.07, false);
    model.set_lr_on_device(3, 0.003, true);
    for (int t = 0; t < 60; ++t)
      model.add(vector_of(1 + t * 37), DType::float32, (t * 7) % 5, static_cast<float>(t % 3));
    model.clip.max_norm = 2;
    Stepper stepper(0);
    for (int step = 0; step < 3; ++step) model.step_and_check(stepper, step == 0);
    check(stepper.launches() == 1, "one launch");
  }
}

void mixed_dtypes_and_rules() {
  Model model(6);
  for (int rule = 0; rule < 4; ++rule) model.add_group(rule, values_of(rule));
  model.add_group(-1, {});  // measured, not updated
  for (int t = 0; t < 40; ++t) model.add(vector_of(50 + t * 131), kDTypes[t % 4], (t / 4) % 5, 1);
  model.clip.max_norm = 1;
  Stepper stepper(0);
  model.step_and_check(stepper, true);
  check(stepper.launches() == 4 + 16, "a launch a dtype, and a launch a dtype and rule");
  model.fill_gradients();
  model.step_and_check(stepper, false);
}

// A parameter whose first gradient comes later: the counters of the others go on, the skipped steps stay counted.
void late_tensors() {
  Model model(12);
  model.add_group(kAdam, values_of(kAdam));
  model.add(vector_of(1000), DType::float32, 0);
  Stepper stepper(0);
  model.clip.max_norm = 1;
  model.set_gradient(0, 3, NAN);
  model.step_and_check(stepper, true);
  model.fill_gradients();
  model.step_and_check(stepper, false);
  model.add(vector_of(30000), DType::float32, 0);
  model.add(vector_of(3), DType::bfloat16, 0);
  model.step_and_check(stepper, true);
  check(model.report(stepper).skipped_steps == 1, "the skipped step stays counted");
}

void nothing_to_do() {
  {
    Model model;
    Stepper stepper(0);
    model.step_and_check(stepper, true);
    check(model.report(stepper).norm == 0, "the norm of nothing is zero");
  }
  Model model;
  model.add_group(kSgd, values_of(kSgd));
  for (int t = 0; t < 3; ++t) model.add(vector_of(0), DType::float32, 0, 4);
  Stepper stepper(0);
  model.step_and_check(stepper, true);  // the step counters go up all the same
}

}  // namespace

void run_step_cases() {
  for_each_device([](const std::string& device) {
    run_case("every rule and dtype, every tail" + device, all_rules_and_dtypes);
    run_case("layouts" + device, layouts);
  });
  run_case("alignments", alignments);
  run_case("norms", norms);
  run_case("extreme gradients", extreme_gradients);
  run_case("non-finite gradients", nonfinite);
  run_case("loss scale and found_inf", mixed_precision_scalars);
  run_case("groups and step counters", groups_and_counters);
  run_case("mixed dtypes and rules", mixed_dtypes_and_rules);
  run_case("late tensors", late_tensors);
  run_case("nothing to do", nothing_to_do);
}

}  // namespace test
