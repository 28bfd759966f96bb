// Tensors whose arrays have different formats: every rule on every mixture, over sizes that cross every tail; and
// rounding by chance, bit by bit.
#include <array>
#include <cmath>
#include <cstring>
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

constexpr Format kFloat = Format::float32, kHalf = Format::float16, kBrain = Format::bfloat16;
constexpr Format kHalfByChance = Format::float16_by_chance, kBrainByChance = Format::bfloat16_by_chance;

struct Mixture {
  const char* name;
  Format parameter, gradient, state;
  bool has_copy;
  Format copy = kFloat;

  Formats formats(int rule) const {
    Formats formats;
    for (Format& format : formats.array) format = state;
    formats.array[kParameter] = parameter;
    formats.array[kGradient] = gradient;
    formats.has_copy = has_copy;
    if (has_copy) formats.array[kFirstState + state_count(rule)] = copy;
    return formats;
  }
};

const std::array<Mixture, 7> kMixtures = {{
    {"bf16 with masters", kFloat, kBrain, kFloat, true, kBrain},
    {"fp16 with masters, fp32 gradients", kFloat, kFloat, kFloat, true, kHalf},
    {"fp16 with masters, bf16 states", kFloat, kHalf, kBrainByChance, true, kHalf},
    {"bf16 by chance", kBrainByChance, kBrain, kFloat, false},
    {"fp16 by chance, bf16 states", kHalfByChance, kHalf, kBrainByChance, false},
    {"fp32, bf16 states", kFloat, kFloat, kBrainByChance, false},
    {"bf16, fp32 gradients", kBrain, kFloat, kBrain, false},
}};

std::vector<double> values_of(int rule) {
  switch (rule) {
    case kSgd:
    case kSgdMomentum:
      return {0.1, 0.9, 0.25, 1, 0.01, 0.001, 0};
    case kLion:
      return {0.01, 0.9, 0.99, 0.02, 0.001, 0};
    default:
      return {0.01, 0.9, 0.99, 1e-3, 0.02, 0.001, 1, 0};
  }
}

const std::vector<std::int64_t> kSizes = {0, 1, 3, 4, 5, 127, 128, 131, 4096, 4099, 9001};

Model model_of(const Mixture& mixture, int rule, bool misaligned) {
  Model model(23 + rule);
  const int group = model.add_group(rule, values_of(rule));
  int shift = 0;
  for (const std::int64_t size : kSizes) {
    Shape shape = vector_of(size);
    if (misaligned) misalign(shape, shift, DType::float32);
    model.add_mixed(shape, mixture.formats(rule), group, static_cast<float>(shift % 4));
  }
  model.clip.max_norm = 1;
  return model;
}

void all_rules_and_mixtures() {
  for (const Mixture& mixture : kMixtures) {
    for (const int rule : {kSgd, kSgdMomentum, kAdam, kAmsgrad, kLion}) {
      for (const bool misaligned : {false, true}) {
        case_name = std::string(name_of(rule)) + ", " + mixture.name + (misaligned ? ", misaligned" : "");
        Model model = model_of(mixture, rule, misaligned);
        Stepper stepper(0);
        model.step_and_check(stepper, true);
        model.fill_gradients();
        model.step_and_check(stepper, false);
      }
    }
  }
}

void layouts() {
  for (const Mixture& mixture : kMixtures) {
    Model model(3);
    const int group = model.add_group(kAdam, values_of(kAdam));
    const auto add = [&](std::vector<std::int64_t> sizes, std::vector<std::int64_t> parameter,
                         std::vector<std::int64_t> gradient, std::vector<std::int64_t> rest) {
      Shape shape{std::move(sizes)};
      shape.strides.fill(rest);
      shape.strides[kParameter] = parameter;
      shape.strides[kGradient] = gradient;
      shape.needs_layout = true;
      model.add_mixed(shape, mixture.formats(kAdam), group);
    };
    add({5, 7}, {7, 1}, {1, 5}, {7, 1});  // a transposed gradient
    model.add_mixed(vector_of(100), mixture.formats(kAdam), group);
    add({6, 4}, {9, 2}, {4, 1}, {4, 1});      // a view with gaps
    add({80, 60}, {60, 1}, {0, 1}, {1, 80});  // an expanded gradient; more than one chunk
    model.clip.max_norm = 1;
    Stepper stepper(0);
    model.step_and_check(stepper, true);
  }
}

// All mixtures and plain tensors in one model: a launch a dtype or all mixtures, and a launch for each of their rules.
void mixtures_share_their_launches() {
  for (const NormKind kind : {NormKind::two, NormKind::infinity, NormKind::general}) {
    Model model(6);
    for (const int rule : {kSgdMomentum, kAdam}) model.add_group(rule, values_of(rule));
    for (int t = 0; t < 28; ++t) {
      const int group = t / 7 % 2;
      const int rule = group == 0 ? kSgdMomentum : kAdam;
      model.add_mixed(vector_of(50 + t * 131), kMixtures[t % 7].formats(rule), group, 1);
    }
    model.add(vector_of(500), DType::float32, 0);
    model.add(vector_of(500), DType::bfloat16, 0);
    model.norm = {kind, kind == NormKind::general ? 3.5 : 2};
    model.clip.max_norm = 1;
    model.loss_scale = 8;
    Stepper stepper(0);
    model.step_and_check(stepper, true);
    check(stepper.launches() == 3 + 4, "launches");
    model.set_gradient(3, 7, NAN);
    model.step_and_check(stepper, false);  // nothing changes
    model.fill_gradients();
    model.step_and_check(stepper, false);
  }
  Model model = model_of(kMixtures[0], kAdam, false);
  Stepper stepper(0);
  model.step_and_check(stepper, true);
  if (stepper.launches() != 1) check(stepper.launches() == 2, "one launch, or two without cooperation");
}

// Philox4x32-10 on the vectors that its authors published with it.
void generator() {
  const auto equal = [](const gradfast::RandomWords& a, const std::array<std::uint32_t, 4>& b) {
    return std::memcmp(a.word, b.data(), sizeof a.word) == 0;
  };
  check(equal(gradfast::philox({{0, 0, 0, 0}}, 0), {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}), "zeros");
  const std::uint32_t ones = 0xffffffff;
  check(equal(gradfast::philox({{ones, ones, ones, ones}}, ~std::uint64_t{0}),
              {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}),
        "ones");
  check(equal(gradfast::philox({{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}}, 0x299f31d0a4093822),
              {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}),
        "pi");
}

// Where the arithmetic is exact (p = 0, lr = 1: the result is -g), the stored bits are those of the element's own word,
// whatever the grid, the chunk, and whether it was one of a quad or a straggler.
void bits_by_chance() {
  for (const Format format : {kBrainByChance, kHalfByChance}) {
    for (const float updates : {0.0f, 3.0f}) {
      Model model(2);
      model.add_group(kSgd, {1, 0, 0, 0, 0, 0, 0});
      Formats formats;
      formats.array[kParameter] = format;
      for (const std::int64_t size : {3, 9001}) model.add_mixed(vector_of(size), formats, 0, updates);
      model.problem().rounding_seed = 0x123456789abcdef0;
      model.zero_parameters();
      Stepper stepper(0);
      model.step_and_check(stepper, true);
      for (std::size_t t = 0; t < model.tensors(); ++t) {
        int wrong = 0;
        const gradfast::RoundingKey key{0x123456789abcdef0, static_cast<std::uint32_t>(updates),
                                        static_cast<std::uint32_t>(t)};
        for (std::int64_t e = 0; e < (t == 0 ? 3 : 9001); ++e) {
          const auto exact = static_cast<float>(-model.stored(static_cast<int>(t), kGradient, e));
          const std::uint32_t random = gradfast::random_word(key, e, 0) & 0xffffu;
          std::uint16_t bits = gradfast::narrow_by_chance<gradfast::BFloat16>(exact, random).bits;
          if (format == kHalfByChance) bits = gradfast::narrow_by_chance<gradfast::Half>(exact, random).bits;
          wrong += decode(&bits, dtype_of(format)) != model.stored(static_cast<int>(t), kParameter, e);
        }
        check(wrong == 0, std::to_string(wrong) + " elements rounded otherwise");
      }
    }
  }
}

}  // namespace

void run_mixed_cases() {
  run_case("the random generator", generator);
  for_each_device([](const std::string& device) {
    run_case("every rule and mixture" + device, all_rules_and_mixtures);
    run_case("mixtures in one model" + device, mixtures_share_their_launches);
    run_case("bits by chance" + device, bits_by_chance);
  });
  run_case("layouts of mixtures", layouts);
}

}  // namespace test
