// The CPU backend: which samples move on, on how many threads, with which instructions.
#include "step_update_cpu.h"

#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <cstring>
#include <memory>

namespace thg {
namespace {

// Below this a second thread costs more than it saves: waking it takes some microseconds, in which
// one core moves about as many elements.
constexpr std::int64_t kGrain = 32 * 1024;

UpdateBlocks* chosen_variant() {
#if defined(THG_X86_VARIANTS)
  // Named for tests and for reports of a wrong result; what the CPU lacks is not taken.
  const char* wanted = std::getenv("THG_CPU_VARIANT");
  const auto allowed = [wanted](const char* name) {
    return wanted == nullptr || std::strcmp(wanted, name) == 0;
  };
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  if (has_avx512 && allowed("avx512")) return avx512::update_blocks;
  if (has_avx2 && allowed("avx2")) return avx2::update_blocks;
#endif
  return portable::update_blocks;
}

void check_row(const StepArgs& args, std::int64_t sample, const char* name,
               const std::int32_t* rows, std::int64_t count) {
  for (const std::int64_t at : {sample, args.batch + sample}) {
    STD_TORCH_CHECK(rows[at] < count, name, " names row ", rows[at], " for sample ", sample,
                    ", but there are ", count);
  }
}

// Whether a sample has a row to run and the outputs that the row needs.
bool is_active(const StepArgs& args, std::int64_t sample) {
  const std::int64_t at = args.cursor[sample];
  if (at < 0 || at >= args.num_rows - 1) return false;
  const float* line = args.table + at * (kHead + 4 * args.num_slots);
  if (line[kActive] == 0.0F || args.output_rows[sample] < 0) return false;
  return line[kBoth] == 0.0F || args.output_rows[args.batch + sample] >= 0;
}

void check_sample(const StepArgs& args, std::int64_t sample) {
  check_row(args, sample, "output_rows", args.output_rows, args.num_outputs);
  if (args.input_rows != nullptr) {
    check_row(args, sample, "input_rows", args.input_rows, args.num_inputs);
  }
  const float* line = args.table + args.cursor[sample] * (kHead + 4 * args.num_slots);
  for (std::int64_t column = kSlotSample; column <= kSlotState; ++column) {
    STD_TORCH_CHECK(line[column] < static_cast<float>(args.num_slots), "row ", args.cursor[sample],
                    " of the table stores into slot ", line[column], ", but there are ",
                    args.num_slots);
  }
}

// The host's part, after the elements: the next timestep, and the cursor.
void advance(const StepArgs& args, std::int64_t sample) {
  const float* following = args.table + (args.cursor[sample] + 1) * (kHead + 4 * args.num_slots);
  args.cursor[sample] += 1;
  if (args.timestep == nullptr || args.input_rows == nullptr) return;
  const std::int32_t cond = args.input_rows[sample];
  const std::int32_t uncond = args.input_rows[args.batch + sample];
  if (cond >= 0) args.timestep[cond] = following[kTimestep];
  if (uncond >= 0 && following[kBoth] != 0.0F) args.timestep[uncond] = following[kTimestep];
}

}  // namespace

void step_update_cpu(const StepArgs& args) {
  static UpdateBlocks* const update_blocks = chosen_variant();
  const std::unique_ptr<bool[]> active(new bool[static_cast<std::size_t>(args.batch)]);
  for (std::int64_t sample = 0; sample < args.batch; ++sample) {
    active[sample] = is_active(args, sample);
    if (active[sample]) check_sample(args, sample);
  }
  const bool* moves = active.get();
  const std::int64_t total = args.batch * blocks_of(args.numel);
  if (total * kBlock <= kGrain) {
    update_blocks(args, moves, 0, total);
  } else {
    torch::stable::parallel_for(0, total, kGrain / kBlock,
                                [&args, moves](std::int64_t begin, std::int64_t end) {
                                  update_blocks(args, moves, begin, end);
                                });
  }
  for (std::int64_t sample = 0; sample < args.batch; ++sample) {
    if (active[sample]) advance(args, sample);
  }
}

}  // namespace thg
