// One row of a step table for a range of elements of one sample, on the CPU.
//
// The formula stands in kernels/thg_kernels/step_update/table.py. Registers are float32 and so is
// the arithmetic; header only, C++17, no dependencies. All operands of a row move on side by side
// in short tiles, so that each passes the memory bus once, whatever the number of terms. What has
// weight 0 is not read, a slot of -1 not written, and NaN propagates from all that is read: this
// must not be compiled with -ffast-math.
#pragma once

#include "streams.h"

namespace thg {
namespace THG_VARIANT {

// The row that one sample runs, from a first element on.
class Row {
 public:
  // The sample must be active, and its row's slots and denoiser rows must exist. `streaming`: write
  // around the caches, for more data than they hold.
  Row(const StepArgs& args, std::int64_t sample, std::int64_t begin, bool streaming);
  Row(const Row&) = delete;
  Row& operator=(const Row&) = delete;

  // Everything the row does to the next elements, up to `end`.
  void run(std::int64_t end);

 private:
  struct Change {
    Stream past;
    float weight;
  };
  struct Kept {
    Stream value;
    float* to;
  };

  float at(Column column) const { return line_[column]; }
  Stream slot(std::int64_t which) const;
  Stream output(std::int64_t row, float* buffer) const;
  void read_slots();
  void form_sums();
  void keep(Column column, Stream value);
  void choose_inputs();
  void tile(std::int64_t size);
  void form_delta_and_guided(std::int64_t size);
  void write_outputs(std::int64_t size);

  const StepArgs& args_;
  const std::int64_t sample_;
  std::int64_t begin_;
  const bool streaming_;
  const float* const line_;
  const bool both_;
  bool has_delta_, has_state_;
  Stream cond_, uncond_, guided_;
  Sum delta_sum_, guided_sum_, state_sum_, sample_sum_;
  Change changes_[kMaxSlots];
  Kept kept_[5];
  int num_changes_ = 0, num_kept_ = 0, num_inputs_ = 0;
  std::int64_t inputs_[2];  // first elements of the rows of the model input
  // Values of the tile, in float32.
  alignas(64) float cond_values_[kTile], uncond_values_[kTile], noise_values_[kTile];
  alignas(64) float delta_[kTile], guided_values_[kTile], state_[kTile], x_next_[kTile];
};

inline Row::Row(const StepArgs& args, std::int64_t sample, std::int64_t begin, bool streaming)
    : args_(args),
      sample_(sample),
      begin_(begin),
      streaming_(streaming),
      line_(args.table + args.cursor[sample] * (kHead + 4 * args.num_slots)),
      both_(line_[kBoth] != 0.0F) {
  has_delta_ = at(kGuidance) != 0.0F || at(kFromDelta) != 0.0F || at(kStateFromDelta) != 0.0F ||
               at(kSlotDelta) >= 0.0F;
  has_state_ = at(kFromState) != 0.0F || at(kSlotState) >= 0.0F;
  cond_ = output(args.output_rows[sample], cond_values_);
  uncond_ = output(args.output_rows[args.batch + sample], uncond_values_);
  guided_ = at(kGuidance) != 0.0F ? Stream{guided_values_, 0} : cond_;
  read_slots();
  form_sums();
  keep(kSlotSample, {x_next_, 0});
  keep(kSlotGuided, guided_);
  keep(kSlotCond, cond_);
  keep(kSlotDelta, {delta_, 0});
  keep(kSlotState, {state_, 0});
  choose_inputs();
}

inline Stream Row::slot(std::int64_t which) const {
  return {args_.registers + (which * args_.batch + sample_) * args_.numel + begin_, kTile};
}

// A model output that is float32 already is read where it stands.
inline Stream Row::output(std::int64_t row, float* buffer) const {
  if (row < 0 || args_.output_dtype != Dtype::kFloat32 || !is_flat(args_.layout)) {
    return {buffer, 0};
  }
  return {static_cast<const float*>(args_.model_output) + row * args_.output_stride + begin_,
          kTile};
}

inline void Row::read_slots() {
  for (std::int64_t s = 0; s < args_.num_slots; ++s) {
    const float* weight = line_ + kHead + s;
    const Stream past = slot(s);
    sample_sum_.add(weight[0], past);
    state_sum_.add(weight[args_.num_slots], past);
    if (both_) continue;
    delta_sum_.add(weight[2 * args_.num_slots], past);
    const float change = weight[3 * args_.num_slots];
    if (change != 0.0F) changes_[num_changes_++] = {past, change};
  }
}

inline void Row::form_sums() {
  const Stream delta = {delta_, 0};
  guided_sum_.add(1.0F, cond_);
  guided_sum_.add(at(kGuidance), delta);
  state_sum_.add(at(kStateFromGuided), guided_);
  state_sum_.add(at(kStateFromDelta), delta);
  sample_sum_.add(at(kFromGuided), guided_);
  sample_sum_.add(at(kFromCond), cond_);
  sample_sum_.add(at(kFromDelta), delta);
  sample_sum_.add(at(kFromState), {state_, 0});
  if (args_.noise != nullptr) sample_sum_.add(at(kNoise), {noise_values_, 0});
}

inline void Row::keep(Column column, Stream value) {
  const auto which = static_cast<std::int64_t>(at(column));
  if (which < 0) return;
  float* to = args_.registers + (which * args_.batch + sample_) * args_.numel + begin_;
  kept_[num_kept_++] = {value, to};
}

inline void Row::choose_inputs() {
  if (args_.model_input == nullptr || args_.input_rows == nullptr) return;
  const float* following = line_ + kHead + 4 * args_.num_slots;
  const std::int64_t cond = args_.input_rows[sample_];
  const std::int64_t uncond = args_.input_rows[args_.batch + sample_];
  if (cond >= 0) inputs_[num_inputs_++] = cond * args_.numel;
  if (uncond >= 0 && following[kBoth] != 0.0F) inputs_[num_inputs_++] = uncond * args_.numel;
}

inline void Row::form_delta_and_guided(std::int64_t size) {
  const float gain = at(kGuidance);
  if (both_) {
    const float* cond = cond_.at;
    const float* uncond = uncond_.at;
    THG_INDEPENDENT
    for (std::int64_t i = 0; i < size; ++i) {
      const float difference = cond[i] - uncond[i];
      delta_[i] = difference;
      guided_values_[i] = cond[i] + gain * difference;
    }
    return;
  }
  delta_sum_.next(size, delta_);
  for (int k = 0; k < num_changes_; ++k) {
    const float weight = changes_[k].weight;
    const float* past = changes_[k].past.at;
    THG_INDEPENDENT
    for (std::int64_t i = 0; i < size; ++i) delta_[i] += weight * (cond_.at[i] - past[i]);
    changes_[k].past.at += kTile;
  }
  guided_sum_.next(size, guided_values_);
}

inline void Row::write_outputs(std::int64_t size) {
  for (int k = 0; k < num_kept_; ++k) {
    put(kept_[k].value.at, size, kept_[k].to, streaming_);
    kept_[k].value.at += kept_[k].value.step;
    kept_[k].to += kTile;
  }
  if (args_.sample != nullptr) {
    const std::int64_t place = sample_ * args_.numel + begin_;
    store(x_next_, 1.0F, size, args_.sample, args_.sample_dtype, &place, 1, streaming_);
  }
  if (num_inputs_ == 0) return;
  const float scale = line_[kHead + 4 * args_.num_slots + kInputScale];
  const std::int64_t places[] = {inputs_[0] + begin_, inputs_[1] + begin_};
  store(x_next_, scale, size, args_.model_input, args_.input_dtype, places, num_inputs_,
        streaming_);
}

// All that is read is read before anything is written: a row may write over what it read.
inline void Row::tile(std::int64_t size) {
  const auto load_output = [this, size](const Stream& stream, std::int64_t row, float* buffer) {
    if (stream.step != 0) return;
    load(args_.model_output, args_.output_dtype, row * args_.output_stride, args_.layout, begin_,
         size, buffer);
  };
  load_output(cond_, args_.output_rows[sample_], cond_values_);
  if (both_ && has_delta_) {
    load_output(uncond_, args_.output_rows[args_.batch + sample_], uncond_values_);
  }
  if (has_delta_) form_delta_and_guided(size);
  if (has_state_) state_sum_.next(size, state_);
  if (args_.noise != nullptr && at(kNoise) != 0.0F) {
    load(args_.noise, args_.noise_dtype, sample_ * args_.numel, {1, 1, 1, 0, 0}, begin_, size,
         noise_values_);
  }
  sample_sum_.next(size, x_next_);
  write_outputs(size);
  cond_.at += cond_.step;
  uncond_.at += uncond_.step;
  begin_ += size;
}

inline void Row::run(std::int64_t end) {
  while (begin_ + kTile <= end) tile(kTile);
  if (begin_ < end) tile(end - begin_);
  if (streaming_) finish_streaming();
}

}  // namespace THG_VARIANT
}  // namespace thg
