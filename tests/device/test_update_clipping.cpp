// Update clipping (StableAdamW): the learning rate of every tensor divided by max(1, RMS of its update), measured in
// the launches of the step, against float64.
#include <cmath>
#include <string>

#include "cases.h"
#include "devices.h"
#include "model.h"

namespace test {
namespace {

using gradfast::Format;
using gradfast::Formats;
using gradfast::kFirstState;
using gradfast::kGradient;
using gradfast::kParameter;
using gradfast::NormKind;
using gradfast::cuda::Stepper;

const std::vector<double> kValues = {0.1, 0.9, 0.99, 1e-3, 0.02, 0.001, 1, 0};

// Every tail of a warp's vectors, chunks and their neighbours, and tensors of several chunks.
const std::vector<std::int64_t> kSizes = {0,   1,    2,    3,    5,    8,    17,   127,   129,  255,
                                          513, 1023, 2049, 4095, 4096, 4097, 8193, 12301, 31000};

// What decides about a rate is how far v lags behind: little after one update, and ever more.
float updates_of(std::size_t tensor) { return static_cast<float>(tensor % 3 * 100); }

// Two steps and one that a NaN skips; some rates are lowered, and some are not.
void check_steps(Model& model, Stepper& stepper) {
  model.clips_updates = true;
  int lowered = 0, kept = 0;
  for (int step = 0; step < 3; ++step) {
    model.fill_gradients();
    const auto last = static_cast<int>(model.tensors()) - 1;
    if (step == 1) model.set_gradient(last, 0, NAN);
    model.step_and_check(stepper, step == 0);
    if (step == 1) continue;
    for (std::size_t t = 0; t < model.tensors(); ++t) {
      lowered += model.expected_rate(t) < 0.9;
      kept += model.expected_rate(t) == 1;
    }
  }
  check(lowered > 0 && kept > 0, std::to_string(lowered) + " rates lowered, " + std::to_string(kept) + " not");
  check(model.skipped_steps == 1, "NaN is skipped");
}

// The tests' devices have one launch, or two, and one more for the sizes of updates that depend on the norm.
void check_launches(const Model& model, const Stepper& stepper, const std::string& device) {
  const int apart = model.clip.max_norm != INFINITY ? 3 : 2;
  if (device.empty()) check(stepper.launches() <= apart, "launches");
#if defined(GRADFAST_SHIM)
  check(stepper.launches() == (device.empty() ? 1 : apart), "launches " + std::to_string(stepper.launches()));
#endif
}

void all_dtypes(const std::string& device) {
  for (const DType dtype : {DType::float64, DType::float32, DType::float16, DType::bfloat16}) {
    for (const int rule : {kAdam, kAmsgrad}) {
      for (const int variant : {0, 1, 2, 3}) {
        const bool misaligned = variant % 2 == 1, clipped = variant >= 2;
        case_name = std::string("update clipping: ") + name_of(rule) + " " + name_of(dtype) +
                    (misaligned ? " misaligned" : "") + (clipped ? " beside max_norm" : "") + device;
        Model model(31 + rule);
        model.add_group(rule, kValues);
        int shift = 0;
        for (std::size_t t = 0; t < kSizes.size(); ++t) {
          Shape shape = vector_of(kSizes[t]);
          if (misaligned) misalign(shape, shift, dtype);
          model.add(shape, dtype, 0, updates_of(t));
        }
        if (clipped) model.clip.max_norm = 200;  // of about 2000: the updates' sizes follow
        model.loss_scale = 8;
        model.largest_gradient = 12;
        Stepper stepper(0);
        check_steps(model, stepper);
        check_launches(model, stepper, device);
      }
    }
  }
}

Formats formats_of(Format parameter, Format gradient, Format state, bool has_copy, Format copy = Format::float32) {
  Formats formats;
  for (Format& format : formats.array) format = state;
  formats.array[kParameter] = parameter;
  formats.array[kGradient] = gradient;
  formats.has_copy = has_copy;
  if (has_copy) formats.array[kFirstState + 2] = copy;
  return formats;
}

const Formats kMasters = formats_of(Format::float32, Format::bfloat16, Format::float32, true, Format::bfloat16);
const Formats kByChance = formats_of(Format::float16_by_chance, Format::float16, Format::bfloat16_by_chance, false);
const Formats kNarrowStates = formats_of(Format::float32, Format::float32, Format::bfloat16, false);

void mixtures(const std::string& device) {
  for (const Formats& formats : {kMasters, kByChance, kNarrowStates}) {
    for (const bool misaligned : {false, true}) {
      Model model(7);
      model.add_group(kAdam, kValues);
      int shift = 0;
      for (std::size_t t = 0; t < kSizes.size(); ++t) {
        Shape shape = vector_of(kSizes[t]);
        if (misaligned) misalign(shape, shift, DType::float32);
        model.add_mixed(shape, formats, 0, updates_of(t));
      }
      model.largest_gradient = 12;
      if (misaligned) model.clip.max_norm = 600;
      Stepper stepper(0);
      check_steps(model, stepper);
      check_launches(model, stepper, device);
    }
  }
}

void layouts(const std::string& device) {
  for (int kind = 0; kind < 5; ++kind) {
    Model model(3);
    model.add_group(kAdam, kValues);
    const auto add = [&](Shape shape, float updates) {
      if (kind < 4) model.add(shape, static_cast<DType>(kind), 0, updates);
      if (kind == 4) model.add_mixed(shape, kMasters, 0, updates);
    };
    add(strided({5, 7}, {7, 1}, {1, 5}, {7, 1}), 200);      // a transposed gradient
    add(vector_of(100), 0);                                 // a dense one between
    add(strided({6, 4}, {9, 2}, {4, 1}, {4, 1}), 200);      // a view with gaps
    add(strided({80, 60}, {60, 1}, {0, 1}, {1, 80}), 200);  // an expanded gradient; more than one chunk
    model.largest_gradient = 12;
    if (kind == 1 || kind == 4) model.clip.max_norm = 100;
    Stepper stepper(0);
    check_steps(model, stepper);
    check_launches(model, stepper, device);
  }
}

// Where the norm is another one, or not every tensor has a rule, or the rule is no Adam.
void other_launches(const std::string&) {
  for (const NormKind kind : {NormKind::one, NormKind::infinity, NormKind::general}) {
    Model model(4);
    model.add_group(kAdam, kValues);
    for (std::size_t t = 0; t < kSizes.size(); ++t) model.add(vector_of(kSizes[t]), DType::float32, 0, updates_of(t));
    model.norm = {kind, kind == NormKind::general ? 3.5 : 2};
    model.largest_gradient = 12;
    if (kind != NormKind::one) model.clip.max_norm = kind == NormKind::infinity ? 6 : 50;
    Stepper stepper(0);
    check_steps(model, stepper);
    check(stepper.launches() == 3, "the norm, the updates' sizes, the step");
  }
  for (const int other : {-1, static_cast<int>(kSgdMomentum), static_cast<int>(kAmsgrad)}) {
    Model model(5);
    model.add_group(kAdam, kValues);
    model.add_group(other, other < 0 ? std::vector<double>{} : std::vector<double>(kValues));
    for (int t = 0; t < 30; ++t) model.add(vector_of(3 + t * 401), DType::float32, t % 2, updates_of(t));
    Stepper stepper(0);
    check_steps(model, stepper);
    check(stepper.launches() == (other < 0 ? 3 : 4), "launches " + std::to_string(stepper.launches()));
  }
}

// Tables in the arguments, in the large arguments, and in device memory.
void tables(const std::string& device) {
  for (const int tensors : {600, 4100}) {
    Model model(9);
    for (int g = 0; g < 2; ++g) model.add_group(kAdam, kValues);
    model.set_lr_on_device(1, 0.07, true);
    for (int t = 0; t < tensors; ++t) model.add(vector_of(1 + t % 4), DType::float32, t % 2, updates_of(t));
    model.largest_gradient = 12;
    model.clip.max_norm = 200;
    Stepper stepper(0);
    check_steps(model, stepper);
    check_launches(model, stepper, device);
  }
}

// Two steps; all bits that came out.
std::vector<std::byte> result(bool in_phases, double max_norm) {
  Model model(21);
  model.add_group(kAdam, kValues);
  for (std::size_t t = 0; t < kSizes.size(); ++t) {
    Shape shape = vector_of(kSizes[t]);
    shape.shift = {1, 2, 1, 3, 0};  // so that the kept copies are unaligned too
    model.add(shape, DType::float32, 0, updates_of(t));
    model.add(vector_of(kSizes[t]), DType::float32, 0, updates_of(t + 1));
  }
  model.clips_updates = true;
  model.largest_gradient = 12;
  model.clip.max_norm = max_norm;
  Stepper stepper(0);
  for (int step = 0; step < 2; ++step) {
    model.fill_gradients();
    model.remember();
    model.run_and_check(stepper, step == 0, in_phases);
  }
  return model.bytes();
}

void phases(const std::string&) {
  for (const double max_norm : {static_cast<double>(INFINITY), 600.0}) {
    check(result(true, max_norm) == result(false, max_norm), "measured and updated apart, the same bits");
  }
}

// As a process does that holds half of every parameter: the sums of squared updates go out, and come back as means.
void means_of_whole_parameters(const std::string&) {
  for (const double max_norm : {static_cast<double>(INFINITY), 600.0}) {
    Model model(23);
    model.add_group(kAdam, kValues);
    for (std::size_t t = 0; t < kSizes.size(); ++t) model.add(vector_of(kSizes[t]), DType::float32, 0, updates_of(t));
    model.clips_updates = true;
    model.largest_gradient = 12;
    model.clip.max_norm = max_norm;
    Stepper stepper(0);
    model.fill_gradients();
    model.remember();
    model.run(stepper, true, gradfast::Phase::measure, nullptr);
    if (max_norm != INFINITY) model.run(stepper, false, gradfast::Phase::measure_updates, nullptr);
    Memory means(kSizes.size() * sizeof(double));
    require(cudaMemcpy(means.host.data(), stepper.update_sums(), means.host.size(), cudaMemcpyDeviceToHost), "sums");
    std::vector<double> sums(kSizes.size());
    for (std::size_t t = 0; t < kSizes.size(); ++t) {
      sums[t] = decode(means.host.data() + t * sizeof(double), DType::float64);
      encode(sums[t] / static_cast<double>(kSizes[t]), means.host.data() + t * sizeof(double), DType::float64);
    }
    means.upload();
    model.problem().update_means = reinterpret_cast<const double*>(means.device);
    model.run(stepper, false, gradfast::Phase::update, nullptr);
    require(cudaDeviceSynchronize(), "the step");
    check(stepper.launches() == 1, "launches " + std::to_string(stepper.launches()));
    model.check_step(stepper);
    for (std::size_t t = 0; t < kSizes.size(); ++t) {
      const double expected = model.expected_update_sum(t);
      check(std::fabs(sums[t] - expected) <= 1e-5 * expected, "sum of squared updates " + std::to_string(t));
    }
  }
}

#if defined(GRADFAST_SHIM)

void same_bits_on_every_grid() {
  for (const double max_norm : {static_cast<double>(INFINITY), 600.0}) {
    const auto expected = result(false, max_norm);
    for (const int multiprocessors : {1, 2, 7}) {
      for (const bool cooperative : {true, false}) {
        const OtherDevice device([&](shim::Device& d) {
          d.multiprocessors = multiprocessors;
          d.cooperative = cooperative;
        });
        check(result(false, max_norm) == expected,
              "the same bits with " + std::to_string(multiprocessors) + " multiprocessors");
      }
    }
  }
}

#endif

}  // namespace

void run_update_clipping_cases() {
  for_each_device([](const std::string& device) {
    const auto run = [&](const char* name, void (*body)(const std::string&)) {
      run_case(std::string("update clipping: ") + name + device, [&] { body(device); });
    };
    run("every dtype, every tail", all_dtypes);
    run("mixtures", mixtures);
    run("layouts", layouts);
    run("other norms and rules", other_launches);
    run("tables of every size", tables);
    run("phases", phases);
    run("means of whole parameters", means_of_whole_parameters);
  });
#if defined(GRADFAST_SHIM)
  run_case("update clipping: the same bits on every grid", same_bits_on_every_grid);
#endif
}

}  // namespace test
