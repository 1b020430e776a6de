// One row of a step table for a range of elements of one sample, on the CPU.
//
// The formula stands in kernels/thg_kernels/step_update/table.py. Registers are float32 and so is
// the arithmetic; header only, C++17, no dependencies. A block of each operand stays in the
// first-level cache while the passes of the row run over it, so memory traffic is that of the
// streams alone. What has weight 0 is not read, a slot of -1 not written, and NaN propagates from
// all that is read: this must not be compiled with -ffast-math.
#pragma once

#include <cstdint>
#include <cstring>

#include "float16.h"
#include "step_update_cpu.h"

namespace thg {
namespace THG_VARIANT {

struct Term {
  const float* at;
  float weight;
};

// out[i] = sum_k terms[k].weight * terms[k].at[i]; out may be one of the terms.
template <int kCount>
inline void combine(const Term* terms, std::int64_t size, float* out) {
  const float* at[kCount];
  float weight[kCount];
  for (int k = 0; k < kCount; ++k) {
    at[k] = terms[k].at;
    weight[k] = terms[k].weight;
  }
  THG_INDEPENDENT
  for (std::int64_t i = 0; i < size; ++i) {
    float sum = weight[0] * at[0][i];
    for (int k = 1; k < kCount; ++k) sum += weight[k] * at[k][i];
    out[i] = sum;
  }
}

// A weighted sum of streams that is put together term by term and then computed in few passes.
class Sum {
 public:
  // A term of weight 0 is left out and never read.
  void add(float weight, const float* at) {
    if (weight != 0.0F) terms_[count_++] = {at, weight};
  }

  // Writes the sum of `size` elements to `out`, which may be one of the terms. `partial` holds
  // what does not fit one pass: writing that to `out` would destroy the term.
  void store(std::int64_t size, float* partial, float* out) {
    Term* next = terms_;
    for (; count_ > kPass; count_ -= kPass - 1) {
      combine<kPass>(next, size, partial);
      next += kPass - 1;
      *next = {partial, 1.0F};
    }
    switch (count_) {
      case 0: std::memset(out, 0, static_cast<std::size_t>(size) * sizeof *out); break;
      case 1: combine<1>(next, size, out); break;
      case 2: combine<2>(next, size, out); break;
      case 3: combine<3>(next, size, out); break;
      case 4: combine<4>(next, size, out); break;
      default: combine<kPass>(next, size, out);
    }
  }

 private:
  static constexpr int kPass = 5;
  Term terms_[kMaxSlots + 8];
  int count_ = 0;
};

// delta = cond - uncond and guided = cond + gain * delta in one pass.
inline void guide(const float* cond, const float* uncond, float gain, std::int64_t size,
                  float* delta, float* guided) {
  THG_INDEPENDENT
  for (std::int64_t i = 0; i < size; ++i) {
    const float c = cond[i];
    const float difference = c - uncond[i];
    delta[i] = difference;
    guided[i] = c + gain * difference;
  }
}

// out[i] += weight * (cond[i] - past[i]).
inline void add_change(float weight, const float* cond, const float* past, std::int64_t size,
                       float* out) {
  THG_INDEPENDENT
  for (std::int64_t i = 0; i < size; ++i) out[i] += weight * (cond[i] - past[i]);
}

// Elements [begin, begin + size) of a row that lies as `layout` says. Along a run of the innermost
// dimension the stride is constant; its ends carry into the two outer ones.
template <typename T>
inline void gather(const T* row, const Layout& layout, std::int64_t begin, std::int64_t size,
                   float* to) {
  std::int64_t inner = begin % layout.n2;
  std::int64_t middle = begin / layout.n2 % layout.n1;
  std::int64_t outer = begin / layout.n2 / layout.n1;
  while (size > 0) {
    const std::int64_t run = size < layout.n2 - inner ? size : layout.n2 - inner;
    const T* from = row + outer * layout.s0 + middle * layout.s1 + inner * layout.s2;
    THG_INDEPENDENT
    for (std::int64_t i = 0; i < run; ++i) to[i] = to_float(from[i * layout.s2]);
    to += run;
    size -= run;
    inner = 0;
    if (++middle == layout.n1) {
      middle = 0;
      ++outer;
    }
  }
}

// Elements [begin, begin + size) of a stream in float32: in place where it is that already, else
// converted into `buffer`.
template <typename T>
inline const float* converted(const T* row, const Layout& layout, std::int64_t begin,
                              std::int64_t size, float* buffer) {
  if (is_flat(layout)) {
    widen(row + begin, size, buffer);
  } else {
    gather(row, layout, begin, size, buffer);
  }
  return buffer;
}

inline const float* loaded(const void* data, Dtype dtype, std::int64_t row_begin,
                           const Layout& layout, std::int64_t begin, std::int64_t size,
                           float* buffer) {
  if (dtype == Dtype::kFloat32) {
    const float* row = static_cast<const float*>(data) + row_begin;
    if (is_flat(layout)) return row + begin;
    return converted(row, layout, begin, size, buffer);
  }
  if (dtype == Dtype::kFloat16) {
    const auto* row = static_cast<const Float16*>(data) + row_begin;
    return converted(row, layout, begin, size, buffer);
  }
  if (dtype == Dtype::kBFloat16) {
    const auto* row = static_cast<const BFloat16*>(data) + row_begin;
    return converted(row, layout, begin, size, buffer);
  }
  const double* row = static_cast<const double*>(data) + row_begin;
  return converted(row, layout, begin, size, buffer);
}

// scale * x to elements from `begin` on, and the same once more from `twin` on where that is not -1.
template <typename T>
inline void stored(const float* x, float scale, std::int64_t size, T* data, std::int64_t begin,
                   std::int64_t twin) {
  narrow(x, scale, size, data + begin);
  if (twin < 0) return;
  std::memcpy(data + twin, data + begin, static_cast<std::size_t>(size) * sizeof(T));
}

inline void store(const float* x, float scale, std::int64_t size, void* data, Dtype dtype,
                  std::int64_t begin, std::int64_t twin = -1) {
  switch (dtype) {
    case Dtype::kFloat32:
      return stored(x, scale, size, static_cast<float*>(data), begin, twin);
    case Dtype::kFloat16:
      return stored(x, scale, size, static_cast<Float16*>(data), begin, twin);
    case Dtype::kBFloat16:
      return stored(x, scale, size, static_cast<BFloat16*>(data), begin, twin);
    case Dtype::kFloat64:
      return stored(x, scale, size, static_cast<double*>(data), begin, twin);
  }
}

// The row that one sample runs, its weights without those that are 0.
class Row {
 public:
  // The sample must be active, and its row's slots must exist.
  Row(const StepArgs& args, std::int64_t sample);
  // Everything the row does to elements [begin, begin + size), size <= kBlock.
  void run(std::int64_t begin, std::int64_t size) const;

 private:
  struct Weights {
    std::int64_t slot;
    float to_sample, to_state, to_delta, to_change;
  };
  // Float32 values of one block. Results whose slot the row still reads wait here.
  struct Block {
    std::int64_t begin, size;
    const float *cond, *delta, *guided, *state, *sample;
    alignas(64) float cond_buffer[kBlock], other[kBlock], delta_buffer[kBlock];
    alignas(64) float guided_buffer[kBlock], state_buffer[kBlock], partial[kBlock];
  };

  float* slot(std::int64_t which) const { return slots_ + which * slot_stride_; }
  float* place(Column column, float* buffer, const Block& block) const;
  void form_delta_and_guided(Block& block) const;
  void form_state(Block& block) const;
  void form_sample(Block& block) const;
  void keep(Column column, const float* value, const Block& block) const;
  void write_outputs(const Block& block) const;

  const StepArgs& args_;
  std::int64_t sample_;
  const float* line_;
  float* slots_;
  std::int64_t slot_stride_;
  std::int64_t cond_row_, uncond_row_;  // in elements from the start of the model output
  std::int64_t cond_input_ = -1, uncond_input_ = -1;  // likewise of the model input; -1: none
  float input_scale_ = 0.0F;
  bool reads_[kMaxSlots] = {};
  Weights weights_[kMaxSlots];
  int count_ = 0;
};

inline Row::Row(const StepArgs& args, std::int64_t sample) : args_(args), sample_(sample) {
  const std::int64_t width = kHead + 4 * args.num_slots;
  line_ = args.table + args.cursor[sample] * width;
  slots_ = args.registers + sample * args.numel;
  slot_stride_ = args.batch * args.numel;
  cond_row_ = args.output_rows[sample] * args.output_stride;
  uncond_row_ = args.output_rows[args.batch + sample] * args.output_stride;
  const float* following = line_ + width;
  input_scale_ = following[kInputScale];
  if (args.model_input != nullptr && args.input_rows != nullptr) {
    const std::int64_t cond = args.input_rows[sample];
    const std::int64_t uncond = args.input_rows[args.batch + sample];
    if (cond >= 0) cond_input_ = cond * args.numel;
    if (uncond >= 0 && following[kBoth] != 0.0F) uncond_input_ = uncond * args.numel;
  }
  const bool both = line_[kBoth] != 0.0F;
  for (std::int64_t s = 0; s < args.num_slots; ++s) {
    const float* weight = line_ + kHead + s;
    Weights found = {s, weight[0], weight[args.num_slots], weight[2 * args.num_slots],
                     weight[3 * args.num_slots]};
    if (both) found.to_delta = found.to_change = 0.0F;
    reads_[s] = found.to_sample != 0.0F || found.to_state != 0.0F || found.to_delta != 0.0F ||
                found.to_change != 0.0F;
    if (reads_[s]) weights_[count_++] = found;
  }
}

// Where a result is computed: in its slot, unless it has none or the row still reads what is there.
inline float* Row::place(Column column, float* buffer, const Block& block) const {
  const auto which = static_cast<std::int64_t>(line_[column]);
  return which < 0 || reads_[which] ? buffer : slot(which) + block.begin;
}

inline void Row::form_delta_and_guided(Block& block) const {
  const float gain = line_[kGuidance];
  float* delta = place(kSlotDelta, block.delta_buffer, block);
  float* guided = place(kSlotGuided, block.guided_buffer, block);
  block.delta = delta;
  block.guided = gain == 0.0F ? block.cond : guided;
  if (line_[kBoth] != 0.0F) {
    const float* uncond = loaded(args_.model_output, args_.output_dtype, uncond_row_, args_.layout,
                                 block.begin, block.size, block.other);
    return guide(block.cond, uncond, gain, block.size, delta, guided);
  }
  Sum from_slots;
  for (int k = 0; k < count_; ++k) {
    from_slots.add(weights_[k].to_delta, slot(weights_[k].slot) + block.begin);
  }
  from_slots.store(block.size, block.partial, delta);
  for (int k = 0; k < count_; ++k) {
    if (weights_[k].to_change == 0.0F) continue;
    const float* past = slot(weights_[k].slot) + block.begin;
    add_change(weights_[k].to_change, block.cond, past, block.size, delta);
  }
  if (gain == 0.0F) return;
  Sum sum;
  sum.add(1.0F, block.cond);
  sum.add(gain, delta);
  sum.store(block.size, block.partial, guided);
}

inline void Row::form_state(Block& block) const {
  block.state = nullptr;
  if (line_[kSlotState] < 0.0F && line_[kFromState] == 0.0F) return;
  float* state = place(kSlotState, block.state_buffer, block);
  Sum sum;
  for (int k = 0; k < count_; ++k) {
    sum.add(weights_[k].to_state, slot(weights_[k].slot) + block.begin);
  }
  sum.add(line_[kStateFromGuided], block.guided);
  sum.add(line_[kStateFromDelta], block.delta);
  sum.store(block.size, block.partial, state);
  block.state = state;
}

// The last value to be formed, so it goes to its slot even where the row reads what was there.
inline void Row::form_sample(Block& block) const {
  const auto which = static_cast<std::int64_t>(line_[kSlotSample]);
  float* sample = which < 0 ? block.other : slot(which) + block.begin;
  Sum sum;
  for (int k = 0; k < count_; ++k) {
    sum.add(weights_[k].to_sample, slot(weights_[k].slot) + block.begin);
  }
  sum.add(line_[kFromGuided], block.guided);
  sum.add(line_[kFromCond], block.cond);
  sum.add(line_[kFromDelta], block.delta);
  sum.add(line_[kFromState], block.state);
  if (args_.noise != nullptr && line_[kNoise] != 0.0F) {
    const float* noise = loaded(args_.noise, args_.noise_dtype, sample_ * args_.numel,
                                {1, 1, 1, 0, 0}, block.begin, block.size, block.other);
    sum.add(line_[kNoise], noise);
  }
  sum.store(block.size, block.partial, sample);
  block.sample = sample;
}

inline void Row::keep(Column column, const float* value, const Block& block) const {
  const auto which = static_cast<std::int64_t>(line_[column]);
  if (which < 0) return;
  float* to = slot(which) + block.begin;
  if (to != value) std::memcpy(to, value, static_cast<std::size_t>(block.size) * sizeof *to);
}

inline void Row::write_outputs(const Block& block) const {
  if (args_.sample != nullptr) {
    store(block.sample, 1.0F, block.size, args_.sample, args_.sample_dtype,
          sample_ * args_.numel + block.begin);
  }
  const bool twice = cond_input_ >= 0 && uncond_input_ >= 0;
  const std::int64_t first = cond_input_ >= 0 ? cond_input_ : uncond_input_;
  if (first < 0) return;
  store(block.sample, input_scale_, block.size, args_.model_input, args_.input_dtype,
        first + block.begin, twice ? uncond_input_ + block.begin : -1);
}

inline void Row::run(std::int64_t begin, std::int64_t size) const {
  Block block;
  block.begin = begin;
  block.size = size;
  block.cond = loaded(args_.model_output, args_.output_dtype, cond_row_, args_.layout, begin, size,
                      block.cond_buffer);
  form_delta_and_guided(block);
  form_state(block);
  form_sample(block);
  keep(kSlotGuided, block.guided, block);
  keep(kSlotCond, block.cond, block);
  keep(kSlotDelta, block.delta, block);
  keep(kSlotState, block.state, block);
  write_outputs(block);
}

}  // namespace THG_VARIANT
}  // namespace thg
