// The host's side of a step: which kernels are launched, with what. No device code in here.
#include "stepper.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "schedule.h"

namespace gradfast::cuda {
namespace {

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

// What of the device decides how the work is cut.
struct Device {
  int index, multiprocessors, shared_per_block, shared_per_multiprocessor, shared_reserved;
  bool cooperative, large_arguments;

  explicit Device(int device)
      : index(device),
        multiprocessors(attribute(cudaDevAttrMultiProcessorCount, device)),
        shared_per_block(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)),
        shared_per_multiprocessor(attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device)),
        shared_reserved(attribute(cudaDevAttrReservedSharedMemoryPerBlock, device)),
        cooperative(attribute(cudaDevAttrCooperativeLaunch, device) != 0) {
    int driver = 0;
    check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
    large_arguments = driver >= 12010 && attribute(cudaDevAttrComputeCapabilityMajor, device) >= 7;
  }
};

// One kernel, ready to be launched at every step.
struct Launch {
  Kernel kernel;
  bool cooperative = false;
  int blocks = 1;
  int shared_bytes = sizeof(BlockMemory);
  std::size_t shares = 0;  // where its blocks' shares begin in the table of all launches
  std::int32_t first_tensor = 0, last_tensor = 0;
};

int resident_blocks(const void* kernel, int shared_bytes) {
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, shared_bytes),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  return blocks;
}

int resident_blocks(const Device& device, const Kernel& kernel, int shared_bytes) {
  const int blocks = resident_blocks(kernel.with_small_arguments, shared_bytes);
  if (!device.large_arguments) return blocks;
  return std::min(blocks, resident_blocks(kernel.with_large_arguments, shared_bytes));
}

// Lets a kernel have all the shared memory there is. Always the same value, as the setting is shared by all Steppers.
void allow_all_shared_memory(const Device& device, const Kernel& kernel) {
  for (const void* function : {kernel.with_small_arguments, kernel.with_large_arguments}) {
    if (function == kernel.with_large_arguments && !device.large_arguments) continue;
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block),
          "cudaFuncSetAttribute");
    check(
        cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        "cudaFuncSetAttribute");
  }
}

// Enough blocks to give four warps work, but no more than are resident together.
int blocks_for(std::size_t warps_of_work, int most) {
  return static_cast<int>(std::clamp<std::size_t>((warps_of_work + 3) / 4, 1, std::max(most, 1)));
}

}  // namespace

class Stepper::Implementation {
 public:
  explicit Implementation(int device) : device_(device) {
    const DeviceScope scope(device);
    const AllowAllocation allow;
    fixed_.reserve(sizeof(Fixed));
    const Fixed initial;
    copy_now(fixed_.at(), &initial, sizeof initial);
  }

  void run(const Problem& problem, bool changed, Phase phase, const double* total, cudaStream_t stream) {
    const DeviceScope scope(device_.index);
    const AllowAllocation allow;
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
    stream_ = stream;
    capturing_ = status != cudaStreamCaptureStatusNone;
    launches_ = 0;
    if (changed || !scheduled_ || problem.slots.size() != schedule_.slots.size()) make_launches(problem);
    write_tables(problem);
    const bool measures = phase == Phase::measure || phase == Phase::both;
    const bool updates = phase == Phase::update || phase == Phase::both;
    const bool apart = measures_updates_apart(problem);
    fill_header(problem, measures ? nullptr : total ? total : &report()->sum);
    if (phase == (apart ? Phase::measure_updates : Phase::measure)) arguments_->header.update_sums = update_sums();

    const int squares = apart ? kUpdatesApart : problem.clips_updates ? kMeasureUpdates : 0;
    if (phase == Phase::both && joint_ && problem.norm.kind == NormKind::two &&
        launch(*joint_, kMeasure | kUpdate | kReport | kCount | squares)) {
      return;
    }
    if (measures) measure(problem);
    if (apart && phase != Phase::measure && problem.update_means == nullptr) {
      for (const Launch& each : update_) launch(each, kUpdatesApart);
    }
    if (updates) {
      for (const Launch& each : update_) launch(each, kUpdate | (&each == &update_.back() ? kReport | kCount : 0));
    }
    if (!updates || update_.empty()) launch(report_launch_, kReport | (updates ? kCount : 0));
  }

  Report* report() const { return &fixed_.at<Fixed>()->report; }
  double* partials() const { return workspace_.at<double>(); }
  double* tensor_sums() const { return workspace_.at<double>(schedule_.chunks.size() * sizeof(double)); }
  double* update_sums() const { return tensor_sums() + schedule_.chunks.size() + 3 * schedule_.slots.size(); }
  int launches() const { return launches_; }

 private:
  struct Fixed {  // lives as long as the Stepper, and keeps its contents
    Report report;
    std::uint32_t finished = 0;
  };

  // Phase 1 in launches of its own. The size of an update is measured by the kernels of the rules, and beside it the
  // norm where they know it; none where it depends on the norm.
  void measure(const Problem& problem) {
    const bool have_rules = std::all_of(schedule_.segments.begin(), schedule_.segments.end(),
                                        [](const Segment& segment) { return segment.rule >= 0; });
    const bool beside = problem.clips_updates && !measures_updates_apart(problem);
    const bool together = beside && problem.norm.kind == NormKind::two && have_rules;
    for (const Launch& each : together ? update_ : measure_) {
      launch(each, kMeasure | (together ? kMeasureUpdates : 0));
    }
    if (!beside || together) return;
    for (const Launch& each : update_) launch(each, kMeasureUpdates);
  }

  // Everything that depends on sizes, dtypes, rules and layouts.
  void make_launches(const Problem& problem) {
    scheduled_ = false;
    cut_table_.invalidate();
    tensor_table_.invalidate();
    schedule_ = make_schedule(problem);
    shares_.clear();
    measure_.clear();
    update_.clear();
    for (std::size_t first = 0, last; first < schedule_.segments.size(); first = last) {
      last = first + 1;
      while (last < schedule_.segments.size() &&
             schedule_.segments[last].storage == schedule_.segments[first].storage) {
        ++last;
      }
      add_measure(schedule_.segments[first], schedule_.segments[last - 1]);
    }
    for (const Segment& segment : schedule_.segments) add_update(segment);
    make_joint(problem);
    report_launch_ = {};
    report_launch_.kernel = report_kernels();
    report_launch_.blocks = blocks_for(schedule_.slots.size(), device_.multiprocessors);
    make_tensors(problem);
    const auto pieces = static_cast<std::size_t>(schedule_.units.pieces);
    workspace_.reserve((2 * schedule_.chunks.size() + 4 * schedule_.slots.size() + 3 * pieces + 1) * sizeof(double));
    layouts_ = problem.layouts;
    scheduled_ = true;
  }

  std::size_t add_shares(const std::vector<std::int32_t>& shares) {
    const std::size_t at = shares_.size();
    shares_.insert(shares_.end(), shares.begin(), shares.end());
    return at;
  }

  void add_measure(const Segment& first, const Segment& last) {
    if (first.first_chunk == last.last_chunk) return;
    Launch launch;
    launch.kernel = kernels_of(first.storage).measure;
    const int most = device_.multiprocessors * resident_blocks(device_, launch.kernel, launch.shared_bytes);
    launch.blocks = blocks_for(last.last_chunk - first.first_chunk, most);
    launch.shares = add_shares(share_out(schedule_.chunks, first.first_chunk, last.last_chunk, launch.blocks));
    measure_.push_back(launch);
  }

  void add_update(const Segment& segment) {
    if (segment.rule < 0) return;
    Launch launch;
    launch.kernel = kernels_of(segment.storage).step.at(segment.rule);
    const int most = device_.multiprocessors * resident_blocks(device_, launch.kernel, launch.shared_bytes);
    launch.blocks = blocks_for(segment.last_chunk - segment.first_chunk, most);
    launch.shares = add_shares(share_out(schedule_.chunks, segment.first_chunk, segment.last_chunk, launch.blocks));
    launch.first_tensor = segment.first_tensor;
    launch.last_tensor = segment.last_tensor;
    update_.push_back(launch);
  }

  // The one cooperative launch, where all tensors share a dtype and a rule and the device can do it.
  void make_joint(const Problem& problem) {
    joint_.reset();
    if (!device_.cooperative || schedule_.segments.size() != 1 || update_.size() != 1) return;
    Launch launch = update_.front();
    launch.cooperative = true;
    allow_all_shared_memory(device_, launch.kernel);
    const int per_multiprocessor = resident_blocks(device_, launch.kernel, sizeof(BlockMemory));
    if (per_multiprocessor == 0) return;
    launch.blocks = blocks_for(schedule_.chunks.size(), device_.multiprocessors * per_multiprocessor);
    const std::vector<std::int32_t> shares =
        share_out(schedule_.chunks, 0, static_cast<std::int32_t>(schedule_.chunks.size()), launch.blocks);
    std::vector<int> sizes;  // of the elements of gradients that the main loops read
    for (const std::int32_t s : schedule_.slots) {
      const Slot& slot = problem.slots[s];
      sizes.push_back(slot.layout < 0 && slot.row_length == 0 ? element_size(slot.dtype) : 0);
    }
    const int available = std::min(device_.shared_per_block,
                                   device_.shared_per_multiprocessor / per_multiprocessor - device_.shared_reserved);
    const int base = sizeof(BlockMemory);
    launch.shared_bytes = base + keep_gradients(schedule_.chunks, shares, sizes, available - base);
    if (launch.blocks > device_.multiprocessors * resident_blocks(device_, launch.kernel, launch.shared_bytes)) {
      launch.shared_bytes = base + keep_gradients(schedule_.chunks, shares, sizes, 0);
    }
    launch.shares = add_shares(shares);
    joint_ = launch;
  }

  void make_tensors(const Problem& problem) {
    tensors_.assign(schedule_.slots.size() + 1, TensorEntry{});
    for (std::size_t t = 0; t < schedule_.slots.size(); ++t) {
      const Slot& slot = problem.slots[schedule_.slots[t]];
      tensors_[t].group = slot.group;
      tensors_[t].layout = slot.layout;
      tensors_[t].slot = schedule_.slots[t];
      tensors_[t].number = static_cast<std::int32_t>(slot.number);
      tensors_[t].weights = slot.row_length > 0 ? slot.weights : -1;
      tensors_[t].row_length = slot.row_length;
      tensors_[t].first_chunk = schedule_.first_chunks[t];
      tensors_[t].formats = slot.formats;
    }
    tensors_.back().first_chunk = schedule_.first_chunks.back();
  }

  void write_tables(const Problem& problem) {
    if (!cut_table_.is_written()) write_cut();
    if (take_addresses(problem) || !tensor_table_.is_written()) {
      tensor_table_.invalidate();
      tensor_table_.write(tensors_.data(), tensors_.size() * sizeof(TensorEntry), stream_, capturing_);
    }
    write_changing(problem);
  }

  // Chunks, layouts, the chunks' units and all launches' shares, one behind the other.
  void write_cut() {
    std::vector<std::byte> bytes;
    const auto append = [&bytes](const auto& values) {
      const auto* from = reinterpret_cast<const std::byte*>(values.data());
      bytes.insert(bytes.end(), from, from + values.size() * sizeof(values[0]));
    };
    append(schedule_.chunks);
    append(layouts_);
    append(schedule_.units.chunks);
    append(shares_);
    bytes.resize(bytes.size() + sizeof(std::int32_t));  // not empty
    cut_table_.write(bytes.data(), bytes.size(), stream_, capturing_);
  }

  std::size_t layouts_at() const { return schedule_.chunks.size() * sizeof(ChunkEntry); }
  std::size_t units_at() const { return layouts_at() + layouts_.size() * sizeof(Layout); }
  std::size_t shares_at() const { return units_at() + schedule_.units.chunks.size() * sizeof(ChunkUnits); }

  // Takes over the addresses of all arrays but the gradients; true if one is another than before.
  bool take_addresses(const Problem& problem) {
    bool differs = false;
    for (std::size_t t = 0; t < schedule_.slots.size(); ++t) {
      const Slot& slot = problem.slots[schedule_.slots[t]];
      TensorEntry& tensor = tensors_[t];
      for (int a = 0; a < kMaxArrays; ++a) {
        if (a == kGradient || tensor.arrays[a] == slot.arrays[a]) continue;
        tensor.arrays[a] = slot.arrays[a];
        differs = true;
      }
      if (tensor.step != slot.step) {
        tensor.step = slot.step;
        differs = true;
      }
    }
    if (differs) tensor_table_.invalidate();  // also if something throws before it is written
    return differs;
  }

  // Scalars and gradients: into the arguments if they fit, else into device memory if they differ from what is there.
  void write_changing(const Problem& problem) {
    const std::size_t bytes = changing_bytes(problem.groups.size(), schedule_.slots.size());
    large_ = bytes > Arguments<kSmallArguments>::kChangingBytes;
    in_arguments_ = !large_ || (device_.large_arguments && bytes <= Arguments<kLargeArguments>::kChangingBytes);
    if (in_arguments_) {
      fill_changing(problem, arguments_->changing);
      return;
    }
    large_ = false;
    next_changing_.resize(bytes);
    fill_changing(problem, next_changing_.data());
    if (changing_table_.is_written() && next_changing_ == changing_) return;
    changing_table_.write(next_changing_.data(), bytes, stream_, capturing_);
    changing_.swap(next_changing_);
  }

  void fill_changing(const Problem& problem, unsigned char* to) const {
    for (const Group& group : problem.groups) {
      const GroupEntry entry{group.values, group.max_norm, group.lr, group.lr_is_double ? 1 : 0};
      std::memcpy(to, &entry, sizeof entry);
      to += sizeof entry;
    }
    for (const std::int32_t slot : schedule_.slots) {
      std::memcpy(to, &problem.slots[slot].arrays[kGradient], sizeof(void*));
      to += sizeof(void*);
    }
  }

  void fill_header(const Problem& problem, const double* total) {
    Header& header = arguments_->header;
    header = {};
    header.chunks = cut_table_.use<ChunkEntry>(capturing_);
    header.layouts = layouts_.empty() ? nullptr : cut_table_.use<Layout>(capturing_, layouts_at());
    header.tensors = tensor_table_.use<TensorEntry>(capturing_);
    header.changing = in_arguments_ ? nullptr : changing_table_.use(capturing_);
    header.partials = partials();
    header.tensor_sums = tensor_sums();
    const std::size_t tensors = schedule_.slots.size();
    header.tensor_scales = tensor_sums() + tensors;
    header.update_partials = header.tensor_scales + tensors;
    header.tensor_rates = problem.clips_updates ? header.update_partials + schedule_.chunks.size() : nullptr;
    if (schedule_.units.pieces > 0) {
      header.chunk_units = cut_table_.use<ChunkUnits>(capturing_, units_at());
      header.unit_sums = reinterpret_cast<UnitSums*>(update_sums() + tensors);
      header.unit_factors = reinterpret_cast<double*>(header.unit_sums + schedule_.units.pieces);
    }
    header.report = report();
    header.finished = &fixed_.at<Fixed>()->finished;
    header.total = total;
    header.loss_scale = problem.loss_scale;
    header.found_infinite = problem.found_infinite;
    header.parameter_sums = problem.parameter_sums;
    header.update_means = problem.update_means;
    header.each_tensor = differs_by_tensor(problem) ? 1 : 0;
    header.group_limits = has_group_limits(problem) ? 1 : 0;
    header.rounding_seed = problem.rounding_seed;
    header.norm = problem.norm;
    header.clip = problem.clip;
    header.chunk_count = static_cast<std::int32_t>(schedule_.chunks.size());
    header.tensor_count = static_cast<std::int32_t>(schedule_.slots.size());
    header.group_count = static_cast<std::int32_t>(problem.groups.size());
  }

  // False if the grid cannot be resident after all (another process may hold a part of the device): no second try.
  bool launch(const Launch& each, int tasks) {
    Header& header = arguments_->header;
    header.shares = cut_table_.use<std::int32_t>(capturing_, shares_at() + each.shares * sizeof(std::int32_t));
    header.tasks = tasks;
    header.first_tensor = each.first_tensor;
    header.last_tensor = each.last_tensor;
    const void* kernel = large_ ? each.kernel.with_large_arguments : each.kernel.with_small_arguments;
    void* arguments[] = {arguments_.get()};  // the small arguments are the beginning of the large ones
    const dim3 blocks(each.blocks), threads(kThreads);
    if (each.cooperative) {
      const cudaError_t error =
          cudaLaunchCooperativeKernel(kernel, blocks, threads, arguments, each.shared_bytes, stream_);
      if (error == cudaErrorCooperativeLaunchTooLarge) {
        cudaGetLastError();
        joint_.reset();
        return false;
      }
      check(error, "cudaLaunchCooperativeKernel");
    } else {
      check(cudaLaunchKernel(kernel, blocks, threads, arguments, each.shared_bytes, stream_), "cudaLaunchKernel");
    }
    ++launches_;
    return true;
  }

  Device device_;
  DeviceMemory fixed_, workspace_;
  DeviceTable cut_table_, tensor_table_, changing_table_;

  bool scheduled_ = false;
  Schedule schedule_;
  std::vector<Layout> layouts_;
  std::vector<std::int32_t> shares_;  // of all launches, one after the other
  std::vector<TensorEntry> tensors_;
  std::optional<Launch> joint_;
  std::vector<Launch> measure_, update_;
  Launch report_launch_;

  // Of the run under way:
  std::unique_ptr<Arguments<kLargeArguments>> arguments_ = std::make_unique<Arguments<kLargeArguments>>();
  std::vector<unsigned char> changing_, next_changing_;  // in device memory, and to be
  bool in_arguments_ = true;
  bool large_ = false;
  cudaStream_t stream_ = nullptr;
  bool capturing_ = false;
  int launches_ = 0;
};

Stepper::Stepper(int device) : implementation_(std::make_unique<Implementation>(device)) {}
Stepper::~Stepper() = default;

void Stepper::run(const Problem& problem, bool changed, Phase phase, const double* total, cudaStream_t stream) {
  implementation_->run(problem, changed, phase, total, stream);
}

const Report* Stepper::report() const { return implementation_->report(); }
const double* Stepper::tensor_sums() const { return implementation_->tensor_sums(); }
const double* Stepper::update_sums() const { return implementation_->update_sums(); }
int Stepper::launches() const { return implementation_->launches(); }

}  // namespace gradfast::cuda
