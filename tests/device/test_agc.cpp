// AGC: every unit's gradient held to a part of the norm of its weights, measured beside the norm in the launches of the
// step. The model's oracle clips unit by unit in float64, and its checks see to it that the gradients' bytes stay.
#include <cmath>
#include <random>
#include <string>

#include "cases.h"
#include "devices.h"
#include "model.h"
#include "plan/units.h"
#include "samples.h"

namespace test {
namespace {

using gradfast::Formats;
using gradfast::Phase;
using gradfast::cuda::Stepper;

// Units of every tail and around a chunk's 4096 elements; units that end in chunks, fill them, cross one border or
// several; whole vectors; nothing at all.
const std::vector<std::vector<std::int64_t>> kSizes = {
    {0},     {1},     {17},      {4096},    {4097},    {12301},   {0, 3},    {3, 0},    {7, 1},    {300, 9},
    {5, 31}, {4, 32}, {400, 33}, {2, 4095}, {3, 4096}, {3, 4097}, {2, 9000}, {1, 8200}, {2, 8192}, {6, 3, 2, 2}};

void add_all(Model& model, int group, DType dtype, bool misaligned) {
  int shift = 0;
  for (const auto& sizes : kSizes) {
    Shape shape{sizes};
    if (misaligned) misalign(shape, shift, dtype);
    model.add(shape, dtype, group, static_cast<float>(shift % 4));
  }
}

// The plan against a count of single elements: of each unit, which pieces, and in how many chunks it lies.
void plans() {
  std::mt19937 random(50);
  const auto up_to = [&](int most) { return static_cast<std::int64_t>(random() % (most + 1)); };
  for (int round = 0; round < 300; ++round) {
    std::vector<std::int64_t> sizes, row_lengths;
    for (int t = 0; t < 5; ++t) {
      const std::int64_t length = up_to(40), rows = up_to(12);
      sizes.push_back(length * rows);
      row_lengths.push_back(random() % 4 == 0 ? 0 : length);
    }
    const gradfast::Plan plan = gradfast::make_plan(sizes, 1 + up_to(50), 64);
    const gradfast::UnitPlan units = gradfast::plan_units(plan.chunks, row_lengths);
    std::int64_t pieces = 0;
    bool good = units.chunks.empty() || units.chunks.size() == plan.chunks.size();
    for (std::size_t c = 0; c < units.chunks.size(); ++c) {
      const gradfast::Chunk& chunk = plan.chunks[c];
      const gradfast::ChunkUnits& here = units.chunks[c];
      const std::int64_t length = row_lengths[chunk.tensor];
      good = good && here.first_piece == pieces;
      std::int64_t offset = chunk.offset;
      for (std::int32_t k = 0; k < here.pieces; ++k, ++pieces) {
        const gradfast::Chunk piece = gradfast::piece_of(chunk, length, k);
        const std::int64_t first = piece.offset / length * length;  // of its unit
        const bool whole = first >= chunk.offset && first + length <= chunk.offset + chunk.length;
        good = good && piece.offset == offset && piece.length > 0 && piece.offset + piece.length <= first + length &&
               here.is_whole(k) == whole;
        if (k == 0) {
          std::int32_t before = 0;
          while (c >= static_cast<std::size_t>(before + 1) && plan.chunks[c - before - 1].tensor == chunk.tensor &&
                 plan.chunks[c - before - 1].offset + plan.chunks[c - before - 1].length > first) {
            ++before;
          }
          good = good && here.before == before;
        }
        if (k == here.pieces - 1) {
          std::int32_t beyond = 0;
          while (c + beyond + 1 < plan.chunks.size() && plan.chunks[c + beyond + 1].tensor == chunk.tensor &&
                 plan.chunks[c + beyond + 1].offset < first + length) {
            ++beyond;
          }
          good = good && here.beyond == beyond && here.begins_crossing() == (beyond > 0 && first >= chunk.offset);
        }
        offset += piece.length;
      }
      good = good && (here.pieces > 0) == (length > 0) && (length == 0 || offset == chunk.offset + chunk.length);
    }
    check(good && units.pieces == pieces, "plan " + std::to_string(round));
  }
}

// Weights and gradients are of about one size. At 0.8 of a unit's weights some units are clipped, and some are not.
Model model_of(std::uint32_t seed, double clipping = 0.8) {
  Model model(seed);
  model.clip.units = {clipping, 1e-3};
  return model;
}

// Three steps of which a NaN skips the second: in the last tensor's last unit, or in the first that crosses chunks.
void check_steps(Model& model, Stepper& stepper, int with_nan = 5) {
  int clipped = 0, kept = 0;
  for (int step = 0; step < 3; ++step) {
    model.fill_gradients();
    if (step == 1) model.set_gradient(with_nan, 0, NAN);
    model.step_and_check(stepper, step == 0);
    for (std::size_t t = 0; step != 1 && t < model.tensors(); ++t) {
      for (const double factor : model.expected_unit_factors(t)) ++(factor < 1 ? clipped : kept);
    }
  }
  check(clipped > 0 && kept > 0, std::to_string(clipped) + " units clipped, " + std::to_string(kept) + " not");
  check(model.skipped_steps == 1, "NaN is skipped");
}

void all_rules_and_dtypes(const std::string& device) {
  for (const DType dtype : {DType::float64, DType::float32, DType::float16, DType::bfloat16}) {
    for (int rule = 0; rule < kRuleCount; ++rule) {
      if (rule == kClip) continue;
      const bool misaligned = (rule + static_cast<int>(dtype)) % 2 != 0;
      case_name = std::string("AGC: ") + name_of(rule) + " " + name_of(dtype) + device;
      Model model = model_of(51 + rule);
      model.add_group(rule, values_of(rule));
      add_all(model, 0, dtype, misaligned);
      model.clip.max_norm = 20;
      model.loss_scale = 8;
      model.largest_gradient = 8;
      Stepper stepper(0);
      check_steps(model, stepper);
      if (device.empty()) check(stepper.launches() == 1, "one launch");
    }
  }
}

void mixtures(const std::string&) {
  for (const Formats& formats : {kMasters, kHalves}) {
    for (const bool misaligned : {false, true}) {
      Model model = model_of(61);
      model.add_group(kAdam, kAdamValues);
      int shift = 0;
      for (const auto& sizes : kSizes) {
        Shape shape{sizes};
        if (misaligned) misalign(shape, shift, DType::float32);
        model.add_mixed(shape, formats, 0, 100);
      }
      model.clip.max_norm = 20;
      Stepper stepper(0);
      check_steps(model, stepper);
    }
  }
}

void layouts(const std::string&) {
  for (int kind = 0; kind < 5; ++kind) {
    Model model = model_of(62);
    model.add_group(kAdam, kAdamValues);
    const auto add = [&](Shape shape) {
      if (kind < 4) model.add(shape, static_cast<DType>(kind), 0, 200);
      if (kind == 4) model.add_mixed(shape, kMasters, 0, 200);
    };
    add(strided({80, 60}, {60, 1}, {1, 80}, {60, 1}));   // a transposed gradient; more than one chunk
    add(strided({80, 60}, {1, 80}, {1, 80}, {60, 1}));   // transposed weights and gradients
    add(Shape{{10, 10}});                                // a dense one between
    add(strided({5, 7}, {7, 1}, {9, 1}, {7, 1}));        // a view with gaps
    add(strided({3, 5000}, {1, 3}, {0, 1}, {5000, 1}));  // an expanded gradient; units that cross chunks
    Stepper stepper(0);
    check_steps(model, stepper, 3);
  }
}

// Some tensors left alone, and a limit of a group, a limit of each tensor, or single elements clamped beside it.
void beside_other_clipping(const std::string&) {
  for (const bool of_elements : {false, true}) {
    Model model = model_of(63);
    model.add_group(kAdam, kAdamValues);
    model.add_group(kSgdMomentum, kSgdValues);
    add_all(model, 0, DType::float32, false);
    add_all(model, 1, DType::float32, true);
    for (std::size_t t = 0; t < model.tensors(); t += 3) model.problem().slots[t].row_length = 0;
    if (of_elements) model.clip.element_limit = 0.7;
    model.clip.max_norm = 20;
    Stepper stepper(0);
    check_steps(model, stepper, 17);
  }
}

void each_tensor_by_itself(const std::string&) {
  Model model = model_of(64);
  model.add_group(kAdam, kAdamValues);
  add_all(model, 0, DType::float32, false);
  model.clip.policies.policies[0].kind = 4;  // ParameterNorm
  model.clip.policies.policies[0].values[0] = 5;
  model.clip.policies.count = 1;
  Stepper stepper(0);
  for (int step = 0; step < 2; ++step) {
    model.fill_gradients();
    model.remember();
    model.tensor_coefficients.clear();
    int held = 0;
    for (std::size_t t = 0; t < model.tensors(); ++t) {
      const double factor = std::fmin(1, 5 / (std::sqrt(model.expected_sum(t)) + 1e-6));
      model.tensor_coefficients.push_back(factor);
      held += factor < 1;
    }
    check(held > 0, "tensors held to what AGC left above the limit");
    model.run_and_check(stepper, step == 0, false);
  }
}

void limits_of_groups(const std::string&) {
  Model model = model_of(65);
  for (int group = 0; group < 2; ++group) model.add_group(kAdam, kAdamValues);
  add_all(model, 0, DType::float32, false);
  const std::size_t first = model.tensors();
  add_all(model, 1, DType::float32, false);
  model.problem().groups[1].max_norm = 9;
  Stepper stepper(0);
  model.fill_gradients();
  model.remember();
  double sum = 0;
  for (std::size_t t = first; t < model.tensors(); ++t) sum += model.expected_sum(t);
  check(std::sqrt(sum) > 10, "the group is above its limit");
  model.tensor_coefficients.assign(model.tensors(), 1);
  for (std::size_t t = first; t < model.tensors(); ++t) model.tensor_coefficients[t] = 9 / (std::sqrt(sum) + 1e-6);
  model.run_and_check(stepper, true, false);
}

// The gradients themselves, with the weights beside them: a policy as a function.
void gradient_functions(const std::string&) {
  for (const DType dtype : {DType::float32, DType::bfloat16}) {
    Model model = model_of(66);
    model.add_group(kClip, {0});
    for (const auto& sizes : kSizes) model.add(Shape{sizes}, dtype, 0);
    Stepper stepper(0);
    model.step_and_check(stepper, true);
    model.step_and_check(stepper, false);
  }
}

// Infinite gradients: as NaN, whether their unit lies in one chunk or crosses several.
void infinities(const std::string&) {
  for (const int tensor : {9, 15, 5}) {
    Model model = model_of(67);
    model.add_group(kSgdMomentum, kSgdValues);
    add_all(model, 0, DType::float32, false);
    Stepper stepper(0);
    model.fill_gradients();
    model.set_gradient(tensor, 1, HUGE_VAL);
    model.remember();
    const auto before = model.bytes();
    model.run(stepper, true, Phase::both, nullptr);
    require(cudaDeviceSynchronize(), "the step");
    const auto report = model.report(stepper);
    check(report.skipped == 1 && !std::isfinite(report.norm), "skipped");
    check(report.first_nonfinite == tensor, "first_nonfinite " + std::to_string(report.first_nonfinite));
    check(model.bytes() == before, "nothing changed");
  }
}

void tables(const std::string&) {
  for (const int tensors : {600, 4100}) {
    Model model = model_of(68);
    for (int g = 0; g < 2; ++g) model.add_group(kAdam, kAdamValues);
    for (int t = 0; t < tensors; ++t) model.add(Shape{{1 + t % 3, 1 + t % 4}}, DType::float32, t % 2);
    model.clip.max_norm = 1;
    Stepper stepper(0);
    check_steps(model, stepper);
  }
}

// Two steps; all bits that came out.
std::vector<std::byte> result(bool in_phases, double clipping) {
  Model model = model_of(69, clipping);
  model.add_group(kAdam, kAdamValues);
  add_all(model, 0, DType::float32, false);
  add_all(model, 0, DType::float32, true);
  model.clip.max_norm = 20;
  Stepper stepper(0);
  for (int step = 0; step < 2; ++step) {
    model.fill_gradients();
    model.remember();
    model.run_and_check(stepper, step == 0, in_phases);
  }
  return model.bytes();
}

void phases(const std::string&) {
  check(result(true, 0.8) == result(false, 0.8), "measured and updated apart, the same bits");
  check(result(false, 0.8) != result(false, 1e9), "units are clipped");
}

#if defined(GRADFAST_SHIM)

void same_bits_on_every_grid() {
  const auto expected = result(false, 0.8);
  for (const int multiprocessors : {1, 2, 7}) {
    for (const bool cooperative : {true, false}) {
      const OtherDevice device([&](shim::Device& d) {
        d.multiprocessors = multiprocessors;
        d.cooperative = cooperative;
      });
      check(result(false, 0.8) == expected,
            "the same bits with " + std::to_string(multiprocessors) + " multiprocessors");
    }
  }
}

#endif

}  // namespace

void run_agc_cases() {
  run_case("AGC: where the pieces of units lie", plans);
  for_each_device([](const std::string& device) {
    const auto run = [&](const char* name, void (*body)(const std::string&)) {
      run_case(std::string("AGC: ") + name + device, [&] { body(device); });
    };
    run("every rule and dtype, every tail", all_rules_and_dtypes);
    run("mixtures", mixtures);
    run("layouts", layouts);
    run("beside clipped elements, and tensors left alone", beside_other_clipping);
    run("each tensor by itself behind it", each_tensor_by_itself);
    run("limits of groups", limits_of_groups);
    run("gradient functions", gradient_functions);
    run("infinities", infinities);
    run("tables of every size", tables);
    run("phases", phases);
  });
#if defined(GRADFAST_SHIM)
  run_case("AGC: the same bits on every grid", same_bits_on_every_grid);
#endif
}

}  // namespace test
