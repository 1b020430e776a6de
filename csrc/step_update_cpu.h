// What the CPU backend offers its binding, and what each set of instructions offers it.
#pragma once

#include <cstdint>

#include "step_update_args.h"

namespace thg {

// The unit that threads share out.
constexpr std::int64_t kBlock = 4096;
// From this many elements on, a step moves more than most caches keep until it is read again.
constexpr std::int64_t kStreaming = 1 << 20;

constexpr std::int64_t blocks_of(std::int64_t numel) { return (numel + kBlock - 1) / kBlock; }

using UpdateBlocks = void(const StepArgs& args, const bool* active, std::int64_t begin,
                          std::int64_t end);

namespace portable {
UpdateBlocks update_blocks;
}
namespace avx2 {
UpdateBlocks update_blocks;
}
namespace avx512 {
UpdateBlocks update_blocks;
}

// Runs the next row of every active sample on torch's threads. The contents of cursor, output_rows
// and input_rows are checked first: std::runtime_error leaves everything as it was.
void step_update_cpu(const StepArgs& args);

}  // namespace thg
