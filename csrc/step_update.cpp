// The row arithmetic of step_update.h, compiled once for each set of instructions (CMakeLists.txt).
#include "step_update.h"

#include "step_update_cpu.h"

namespace thg {
namespace THG_VARIANT {

// Blocks are numbered through the samples: block i is block i % blocks of sample i / blocks.
void update_blocks(const StepArgs& args, const bool* active, std::int64_t begin, std::int64_t end) {
  const std::int64_t blocks = blocks_of(args.numel);
  const bool streaming = args.batch * args.numel >= kStreaming;
  while (begin < end) {
    const std::int64_t sample = begin / blocks;
    const std::int64_t next = (sample + 1) * blocks < end ? (sample + 1) * blocks : end;
    if (active[sample]) {
      const std::int64_t last = (next - sample * blocks) * kBlock;
      Row row(args, sample, (begin - sample * blocks) * kBlock, streaming);
      row.run(last < args.numel ? last : args.numel);
    }
    begin = next;
  }
}

}  // namespace THG_VARIANT
}  // namespace thg
