// The row arithmetic of step_update.h, compiled once for each set of instructions (CMakeLists.txt).
#include "step_update.h"

#include "step_update_cpu.h"

namespace thg {
namespace THG_VARIANT {

// Blocks are numbered through the samples: block i is block i % blocks of sample i / blocks.
void update_blocks(const StepArgs& args, const bool* active, std::int64_t begin, std::int64_t end) {
  const std::int64_t blocks = blocks_of(args.numel);
  while (begin < end) {
    const std::int64_t sample = begin / blocks;
    const std::int64_t sample_end = (sample + 1) * blocks;
    const std::int64_t last = end < sample_end ? end : sample_end;
    if (active[sample]) {
      const Row row(args, sample);
      for (std::int64_t i = begin - sample * blocks; i < last - sample * blocks; ++i) {
        const std::int64_t left = args.numel - i * kBlock;
        row.run(i * kBlock, left < kBlock ? left : kBlock);
      }
    }
    begin = last;
  }
}

}  // namespace THG_VARIANT
}  // namespace thg
