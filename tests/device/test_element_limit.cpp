// Clipping by value: every element is clamped as it is read, for the norm and for the rule, and no gradient is written.
// The model's oracle clamps in float64, and its checks see to it that the gradients' bytes stay.
#include <cmath>
#include <string>

#include "cases.h"
#include "devices.h"
#include "model.h"
#include "samples.h"

namespace test {
namespace {

using gradfast::Formats;
using gradfast::NormKind;
using gradfast::cuda::Stepper;

// Every tail of a warp's vectors, chunks and their neighbours, and tensors of several chunks.
const std::vector<std::int64_t> kSizes = {0, 1, 2, 3, 5, 8, 17, 127, 129, 513, 1023, 4095, 4096, 4097, 8193, 12301};

// Three steps of which a NaN skips the second; in the first an infinite element becomes the limit.
void check_steps(Model& model, Stepper& stepper) {
  model.clip.element_limit = 0.4;
  model.clip.max_norm = 1;
  model.loss_scale = 8;
  model.largest_gradient = 12;  // two elements in three are clamped
  for (int step = 0; step < 3; ++step) {
    model.fill_gradients();
    const auto last = static_cast<int>(model.tensors()) - 1;
    if (step == 0) model.set_gradient(last, 0, -HUGE_VAL);
    if (step == 1) model.set_gradient(last, 0, NAN);
    model.step_and_check(stepper, step == 0);
    check(std::isfinite(model.report(stepper).norm) == (step != 1), "the infinite element became the limit");
  }
  check(model.skipped_steps == 1, "NaN is skipped");
}

void all_rules_and_dtypes(const std::string& device) {
  for (const DType dtype : {DType::float64, DType::float32, DType::float16, DType::bfloat16}) {
    for (int rule = 0; rule < kRuleCount; ++rule) {
      if (rule == kClip) continue;  // has no gradient that could stay: see gradient_functions in test_launch.cpp
      for (const bool misaligned : {false, true}) {
        case_name = std::string("clipping by value: ") + name_of(rule) + " " + name_of(dtype) +
                    (misaligned ? " misaligned" : "") + device;
        Model model(41 + rule);
        model.add_group(rule, values_of(rule));
        int shift = 0;
        for (const std::int64_t size : kSizes) {
          Shape shape = vector_of(size);
          if (misaligned) misalign(shape, shift, dtype);
          model.add(shape, dtype, 0, static_cast<float>(shift % 4));
        }
        Stepper stepper(0);
        check_steps(model, stepper);
        if (device.empty()) check(stepper.launches() == 1, "one launch");
      }
    }
  }
}

void norms(const std::string&) {
  for (const NormKind kind : {NormKind::one, NormKind::infinity, NormKind::general}) {
    for (const DType dtype : {DType::float64, DType::float32, DType::float16, DType::bfloat16}) {
      Model model(42);
      model.add_group(kSgdMomentum, kSgdValues);
      for (const std::int64_t size : kSizes) model.add(vector_of(size), dtype, 0);
      model.norm = {kind, kind == NormKind::general ? 3.5 : 2};
      Stepper stepper(0);
      check_steps(model, stepper);
    }
  }
}

void mixtures(const std::string&) {
  for (const Formats& formats : {kMasters, kHalves}) {
    for (const bool clips_updates : {false, true}) {
      for (const bool misaligned : {false, true}) {
        Model model(43);
        model.add_group(kAdam, kAdamValues);
        int shift = 0;
        for (const std::int64_t size : kSizes) {
          Shape shape = vector_of(size);
          if (misaligned) misalign(shape, shift, DType::float32);
          model.add_mixed(shape, formats, 0, 100);
        }
        model.clips_updates = clips_updates;
        Stepper stepper(0);
        check_steps(model, stepper);
      }
    }
  }
}

// The size of an update is that of the clamped gradients.
void update_clipping(const std::string&) {
  for (const DType dtype : {DType::float64, DType::float32, DType::float16, DType::bfloat16}) {
    Model model(44);
    model.add_group(kAdam, kAdamValues);
    for (const std::int64_t size : kSizes) model.add(vector_of(size), dtype, 0, 200);
    model.clips_updates = true;
    Stepper stepper(0);
    check_steps(model, stepper);
  }
}

void layouts(const std::string&) {
  for (int kind = 0; kind < 5; ++kind) {
    Model model(45);
    model.add_group(kAdam, kAdamValues);
    const auto add = [&](Shape shape) {
      if (kind < 4) model.add(shape, static_cast<DType>(kind), 0, 200);
      if (kind == 4) model.add_mixed(shape, kMasters, 0, 200);
    };
    add(strided({80, 60}, {60, 1}, {1, 80}, {60, 1}));  // a transposed gradient; more than one chunk
    add(vector_of(100));                                // a dense one between
    add(strided({5, 7}, {7, 1}, {9, 1}, {7, 1}));       // a view with gaps
    model.clips_updates = kind % 2 == 1;
    Stepper stepper(0);
    check_steps(model, stepper);
  }
}

// Measured and updated apart, where the gradients are not kept, and under a limit that no element reaches: the bits of
// a step without any.
std::vector<std::byte> result(bool in_phases, double limit) {
  Model model(46);
  model.add_group(kAdam, kAdamValues);
  for (const std::int64_t size : kSizes) {
    Shape shape = vector_of(size);
    shape.shift = {1, 2, 1, 3, 0};  // so that the kept copies are unaligned too
    model.add(shape, DType::float32, 0);
  }
  model.clip.max_norm = 1;
  model.clip.element_limit = limit;
  Stepper stepper(0);
  model.fill_gradients();
  model.remember();
  model.run_and_check(stepper, true, in_phases);
  return model.bytes();
}

void phases(const std::string&) {
  check(result(true, 0.3) == result(false, 0.3), "measured and updated apart, the same bits");
  check(result(false, 2) == result(false, INFINITY), "a limit out of reach changes no bit");
  check(result(false, 0.3) != result(false, INFINITY), "one within does");
}

}  // namespace

void run_element_limit_cases() {
  for_each_device([](const std::string& device) {
    const auto run = [&](const char* name, void (*body)(const std::string&)) {
      run_case(std::string("clipping by value: ") + name + device, [&] { body(device); });
    };
    run("every rule and dtype, every tail", all_rules_and_dtypes);
    run("norms", norms);
    run("mixtures", mixtures);
    run("update clipping", update_clipping);
    run("layouts", layouts);
    run("phases", phases);
  });
}

}  // namespace test
