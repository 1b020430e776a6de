// One sampling step of a batch in one launch: grid (blocks of a sample, samples).
//
// The row comes from the table by the cursor, both on the device, so a captured graph replays any
// schedule. A block first takes its row into shared memory and learns from it which slots are read:
// the number of slots costs nothing, and the loads of those that are read are in flight together.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "step_update_cuda.h"

namespace thg {
namespace {

// Two 16-byte accesses per float32 register, one per half-precision output.
constexpr int kPerThread = 8;
// Slots whose loads are issued before the first of them is used.
constexpr int kFetch = 4;

// How a thread reaches its elements: they are neighbours and move 16 bytes at a time (kVector);
// likewise, but the model output is looked up by its layout (kGather); or they are a block apart,
// so that neighbouring threads read neighbours, and each is looked up (kScalar).
enum class Access { kVector, kGather, kScalar };

using Values = float[kPerThread];

__device__ float to_float(float value) { return value; }
__device__ float to_float(double value) { return static_cast<float>(value); }
__device__ float to_float(__half value) { return __half2float(value); }
__device__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ void from_float(float value, float& to) { to = value; }
__device__ void from_float(float value, double& to) { to = value; }
__device__ void from_float(float value, __half& to) { to = __float2half_rn(value); }
__device__ void from_float(float value, __nv_bfloat16& to) { to = __float2bfloat16_rn(value); }

// The elements of one thread, by number within their sample.
template <Access kAccess>
struct Elements {
  std::int64_t first, numel;

  __device__ explicit Elements(std::int64_t count) : numel(count) {
    const std::int64_t block = static_cast<std::int64_t>(blockIdx.x) * blockDim.x * kPerThread;
    first = block + threadIdx.x * (kAccess == Access::kScalar ? 1 : kPerThread);
  }
  __device__ std::int64_t at(int i) const {
    return first + (kAccess == Access::kScalar ? static_cast<std::int64_t>(i) * blockDim.x : i);
  }
  __device__ bool has(int i) const { return at(i) < numel; }

  template <typename T>
  __device__ void load(const T* from, Values& to) const {
    if constexpr (kAccess == Access::kScalar) {
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) to[i] = has(i) ? to_float(from[at(i)]) : 0.0F;
    } else {
      constexpr int kWide = 16 / sizeof(T);
#pragma unroll
      for (int i = 0; i < kPerThread; i += kWide) {
        T values[kWide];
        const uint4 raw = *reinterpret_cast<const uint4*>(from + first + i);
        memcpy(values, &raw, sizeof raw);
#pragma unroll
        for (int k = 0; k < kWide; ++k) to[i + k] = to_float(values[k]);
      }
    }
  }

  template <typename T>
  __device__ void store(const Values& from, float scale, T* to) const {
    if constexpr (kAccess == Access::kScalar) {
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        if (has(i)) from_float(scale * from[i], to[at(i)]);
      }
    } else {
      constexpr int kWide = 16 / sizeof(T);
#pragma unroll
      for (int i = 0; i < kPerThread; i += kWide) {
        T values[kWide];
#pragma unroll
        for (int k = 0; k < kWide; ++k) from_float(scale * from[i + k], values[k]);
        uint4 raw;
        memcpy(&raw, values, sizeof raw);
        *reinterpret_cast<uint4*>(to + first + i) = raw;
      }
    }
  }
};

// Where element n stands in its row of the model output. A latent has rarely 2^31 elements, and a
// division of 32 bits takes a fraction of one of 64.
template <typename Index>
__device__ std::int64_t position(const Layout& layout, std::int64_t n) {
  const auto n1 = static_cast<Index>(layout.n1), n2 = static_cast<Index>(layout.n2);
  const Index row = static_cast<Index>(n) / n2;
  return static_cast<std::int64_t>(row / n1) * layout.s0 +
         static_cast<std::int64_t>(row % n1) * layout.s1 +
         static_cast<std::int64_t>(static_cast<Index>(n) % n2) * layout.s2;
}

template <typename T, Access kAccess>
__device__ void load_output(const StepArgs& args, const Elements<kAccess>& elements,
                            std::int64_t row, Values& to) {
  const T* from = static_cast<const T*>(args.model_output) + row * args.output_stride;
  if constexpr (kAccess == Access::kVector) {
    elements.load(from, to);
  } else {
    const bool is_small = args.numel <= INT32_MAX;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const std::int64_t n = elements.at(i);
      const bool has = kAccess == Access::kGather || n < args.numel;
      const std::int64_t where = is_small ? position<std::uint32_t>(args.layout, n)
                                          : position<std::uint64_t>(args.layout, n);
      to[i] = has ? to_float(from[where]) : 0.0F;
    }
  }
}

// to += weight * value; a term of weight 0 adds nothing, whatever the value.
__device__ void add(float weight, const Values& value, Values& to) {
  if (weight == 0.0F) return;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) to[i] = fmaf(weight, value[i], to[i]);
}

__device__ void add_change(float weight, const Values& cond, const Values& past, Values& to) {
  if (weight == 0.0F) return;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) to[i] = fmaf(weight, cond[i] - past[i], to[i]);
}

// Slots that the row reads, a bit each; every warp finds out for itself.
__device__ unsigned long long slots_read(const float* line, int num_slots) {
  const int weights = line[kBoth] != 0.0F ? 2 : 4;  // deltas come from slots or from this call
  unsigned long long found = 0;
  for (int half = 0; half < 2; ++half) {
    const int slot = half * 32 + static_cast<int>(threadIdx.x % 32);
    bool is_read = false;
    for (int k = 0; k < weights && slot < num_slots; ++k) {
      is_read |= line[kHead + k * num_slots + slot] != 0.0F;
    }
    const unsigned int bits = __ballot_sync(0xffffffffU, is_read);
    found |= static_cast<unsigned long long>(bits) << (32 * half);
  }
  return found;
}

// What becomes of the slots in `left`: sums for the sample, the state and, unless the row has both
// branches, the delta.
template <Access kAccess>
__device__ void sum_slots(const float* line, int num_slots, const float* slots,
                          std::int64_t stride, const Elements<kAccess>& elements,
                          unsigned long long left, const Values& cond, Values& sample,
                          Values& state, Values& delta) {
  const bool both = line[kBoth] != 0.0F;
  while (left != 0) {
    int which[kFetch];
    Values past[kFetch];
#pragma unroll
    for (int k = 0; k < kFetch; ++k) {
      which[k] = __ffsll(static_cast<long long>(left)) - 1;
      left &= left - 1;
      if (which[k] >= 0) elements.load(slots + which[k] * stride, past[k]);
    }
#pragma unroll
    for (int k = 0; k < kFetch; ++k) {
      if (which[k] < 0) break;
      const float* weights = line + kHead + which[k];
      add(weights[0], past[k], sample);
      add(weights[num_slots], past[k], state);
      if (both) continue;
      add(weights[2 * num_slots], past[k], delta);
      add_change(weights[3 * num_slots], cond, past[k], delta);
    }
  }
}

template <Access kAccess>
__device__ void load_any(const void* from, Dtype dtype, std::int64_t offset,
                         const Elements<kAccess>& elements, Values& to) {
  switch (dtype) {
    case Dtype::kFloat32: return elements.load(static_cast<const float*>(from) + offset, to);
    case Dtype::kFloat16: return elements.load(static_cast<const __half*>(from) + offset, to);
    case Dtype::kBFloat16:
      return elements.load(static_cast<const __nv_bfloat16*>(from) + offset, to);
    case Dtype::kFloat64: return elements.load(static_cast<const double*>(from) + offset, to);
  }
}

template <Access kAccess>
__device__ void store_any(const Values& from, float scale, void* to, Dtype dtype,
                          std::int64_t offset, const Elements<kAccess>& elements) {
  switch (dtype) {
    case Dtype::kFloat32: return elements.store(from, scale, static_cast<float*>(to) + offset);
    case Dtype::kFloat16: return elements.store(from, scale, static_cast<__half*>(to) + offset);
    case Dtype::kBFloat16:
      return elements.store(from, scale, static_cast<__nv_bfloat16*>(to) + offset);
    case Dtype::kFloat64: return elements.store(from, scale, static_cast<double*>(to) + offset);
  }
}

// x_next as the caller's sample and, scaled, as the next input of the branches the next row runs.
template <Access kAccess>
__device__ void write_outputs(const StepArgs& args, const float* following, std::int64_t b,
                              const Elements<kAccess>& elements, const Values& sample) {
  if (args.sample != nullptr) {
    store_any(sample, 1.0F, args.sample, args.sample_dtype, b * args.numel, elements);
  }
  if (args.input_rows == nullptr || args.model_input == nullptr) return;
  for (int branch = 0; branch < (following[kBoth] != 0.0F ? 2 : 1); ++branch) {
    const std::int64_t row = args.input_rows[branch * args.batch + b];
    if (row < 0 || row >= args.num_inputs) continue;
    store_any(sample, following[kInputScale], args.model_input, args.input_dtype, row * args.numel,
              elements);
  }
}

// The row's arithmetic for the elements of one thread: everything is read before the first store.
template <typename T, Access kAccess>
__device__ void update(const StepArgs& args, const float* line, const float* following,
                       std::int64_t b, unsigned long long read,
                       const Elements<kAccess>& elements) {
  Values cond, other, sample = {}, state = {}, delta = {}, guided;
  const bool both = line[kBoth] != 0.0F;
  load_output<T>(args, elements, args.output_rows[b], cond);
  if (both) load_output<T>(args, elements, args.output_rows[args.batch + b], other);
  const std::int64_t stride = args.batch * args.numel;
  float* slots = args.registers + b * args.numel;
  const int num_slots = static_cast<int>(args.num_slots);
  sum_slots(line, num_slots, slots, stride, elements, read, cond, sample, state, delta);
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    if (both) delta[i] = cond[i] - other[i];
    guided[i] = cond[i];
  }
  add(line[kGuidance], delta, guided);
  add(line[kStateFromGuided], guided, state);
  add(line[kStateFromDelta], delta, state);
  add(line[kFromGuided], guided, sample);
  add(line[kFromCond], cond, sample);
  add(line[kFromDelta], delta, sample);
  add(line[kFromState], state, sample);
  if (args.noise != nullptr && line[kNoise] != 0.0F) {
    load_any(args.noise, args.noise_dtype, b * args.numel, elements, other);
    add(line[kNoise], other, sample);
  }
  const auto keep = [&](Column column, const Values& value) {
    const int slot = static_cast<int>(line[column]);
    if (slot >= 0 && slot < num_slots) elements.store(value, 1.0F, slots + slot * stride);
  };
  keep(kSlotSample, sample);
  keep(kSlotGuided, guided);
  keep(kSlotCond, cond);
  keep(kSlotDelta, delta);
  keep(kSlotState, state);
  write_outputs(args, following, b, elements, sample);
}

__device__ void write_timesteps(const StepArgs& args, const float* following, std::int64_t b) {
  if (args.timestep == nullptr || args.input_rows == nullptr) return;
  for (int branch = 0; branch < (following[kBoth] != 0.0F ? 2 : 1); ++branch) {
    const std::int64_t row = args.input_rows[branch * args.batch + b];
    if (row >= 0 && row < args.num_inputs) args.timestep[row] = following[kTimestep];
  }
}

// Moves the cursor of sample b on, in whichever of its blocks comes last: every block reads the
// cursor first, so it may only change when all have. The counter is 0 again for the next launch.
__device__ void advance(const StepArgs& args, std::int64_t b, std::int32_t at) {
  __threadfence();
  const int arrived = atomicAdd(args.cursor + args.batch + b, 1);
  if (arrived != static_cast<int>(gridDim.x) - 1) return;
  __threadfence();
  args.cursor[args.batch + b] = 0;
  args.cursor[b] = at + 1;
}

template <typename T, Access kAccess>
__global__ void __launch_bounds__(128) step_update_kernel(const __grid_constant__ StepArgs args) {
  __shared__ float line[kHead + 4 * kMaxSlots];
  __shared__ float following[kHead];
  const std::int64_t b = blockIdx.y;
  const std::int32_t at = args.cursor[b];
  if (at < 0 || at >= args.num_rows - 1) return;
  const std::int64_t width = kHead + 4 * args.num_slots;
  const float* row = args.table + at * width;
  for (std::int64_t i = threadIdx.x; i < width; i += blockDim.x) line[i] = row[i];
  if (threadIdx.x < kHead) following[threadIdx.x] = row[width + threadIdx.x];
  const std::int64_t cond_row = args.output_rows[b];
  const std::int64_t uncond_row = args.output_rows[args.batch + b];
  __syncthreads();
  // The same for all threads of the block, so that all of them leave or none.
  if (line[kActive] == 0.0F || cond_row < 0 || cond_row >= args.num_outputs) return;
  if (line[kBoth] != 0.0F && (uncond_row < 0 || uncond_row >= args.num_outputs)) return;
  const Elements<kAccess> elements(args.numel);
  const unsigned long long read = slots_read(line, static_cast<int>(args.num_slots));
  if (elements.first < args.numel) update<T>(args, line, following, b, read, elements);
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 0) write_timesteps(args, following, b);
  advance(args, b, at);
}

bool is_aligned(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0; }

Access best_access(const StepArgs& args) {
  const bool neighbours = args.numel % kPerThread == 0 && is_aligned(args.registers) &&
                          is_aligned(args.model_input) && is_aligned(args.sample) &&
                          is_aligned(args.noise);
  if (!neighbours) return Access::kScalar;
  const bool plain = is_flat(args.layout) && args.output_stride % kPerThread == 0 &&
                     is_aligned(args.model_output);
  return plain ? Access::kVector : Access::kGather;
}

template <typename T>
void launch(const StepArgs& args, cudaStream_t stream) {
  // Small latents are cut finer, so that there are more blocks than multiprocessors.
  const unsigned int threads = args.batch * args.numel < (1 << 18) ? 64 : 128;
  const std::int64_t per_block = static_cast<std::int64_t>(threads) * kPerThread;
  // At least one block, so that cursors move on also where there are no elements.
  const std::int64_t blocks = args.numel == 0 ? 1 : (args.numel + per_block - 1) / per_block;
  const dim3 grid(static_cast<unsigned int>(blocks), static_cast<unsigned int>(args.batch));
  switch (best_access(args)) {
    case Access::kVector:
      step_update_kernel<T, Access::kVector><<<grid, threads, 0, stream>>>(args);
      break;
    case Access::kGather:
      step_update_kernel<T, Access::kGather><<<grid, threads, 0, stream>>>(args);
      break;
    case Access::kScalar:
      step_update_kernel<T, Access::kScalar><<<grid, threads, 0, stream>>>(args);
      break;
  }
}

}  // namespace

const char* step_update_cuda(const StepArgs& args, void* stream) {
  if (args.batch == 0) return nullptr;
  if (args.batch > 65535) return "more than 65,535 samples in one batch";
  const auto on = static_cast<cudaStream_t>(stream);
  switch (args.output_dtype) {
    case Dtype::kFloat32: launch<float>(args, on); break;
    case Dtype::kFloat16: launch<__half>(args, on); break;
    case Dtype::kBFloat16: launch<__nv_bfloat16>(args, on); break;
    case Dtype::kFloat64: return "model_output in float64";
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace thg
