// Streams of float32 values that the passes of a row read and write, a short tile at a time.
#pragma once

#include <cstdint>
#include <cstring>

#include "float16.h"
#include "step_update_args.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace thg {
namespace THG_VARIANT {

// All streams of a row advance side by side by this many elements: short enough that the memory bus
// is never idle while the tile is computed, long enough to hide the set-up of a pass.
constexpr std::int64_t kTile = 128;

// Values of a tile: `step` floats further on for the next tile, kTile in memory and 0 in a buffer
// that is filled anew.
struct Stream {
  const float* at;
  std::int64_t step;
};

struct Term {
  Stream stream;
  float weight;
};

// out[i] = sum_k weight_k stream_k[i], or += that; all streams move on.
template <int kCount, bool kOnto>
inline void combine(Term* terms, std::int64_t size, float* out) {
  const float* at[kCount];
  float weight[kCount];
  for (int k = 0; k < kCount; ++k) {
    at[k] = terms[k].stream.at;
    weight[k] = terms[k].weight;
    terms[k].stream.at += terms[k].stream.step;
  }
  THG_INDEPENDENT
  for (std::int64_t i = 0; i < size; ++i) {
    float sum = kOnto ? out[i] + weight[0] * at[0][i] : weight[0] * at[0][i];
    for (int k = 1; k < kCount; ++k) sum += weight[k] * at[k][i];
    out[i] = sum;
  }
}

// A weighted sum of streams: put together term by term, then computed tile by tile.
class Sum {
 public:
  // A term of weight 0 is left out and never read.
  void add(float weight, Stream stream) {
    if (weight != 0.0F) terms_[count_++] = {stream, weight};
  }

  bool empty() const { return count_ == 0; }

  // Writes the sum of the next `size` elements, which is 0 without terms.
  void next(std::int64_t size, float* out) {
    if (empty()) std::memset(out, 0, static_cast<std::size_t>(size) * sizeof *out);
    Term* terms = terms_;
    for (int left = count_; left > 0; left -= kPass, terms += kPass) {
      if (terms == terms_) {
        pass<false>(terms, left, size, out);
      } else {
        pass<true>(terms, left, size, out);
      }
    }
  }

 private:
  // As many streams as a core follows well beside those that are written.
  static constexpr int kPass = 4;

  template <bool kOnto>
  static void pass(Term* terms, int left, std::int64_t size, float* out) {
    switch (left) {
      case 1: return combine<1, kOnto>(terms, size, out);
      case 2: return combine<2, kOnto>(terms, size, out);
      case 3: return combine<3, kOnto>(terms, size, out);
      default: return combine<kPass, kOnto>(terms, size, out);
    }
  }

  Term terms_[kMaxSlots + 8];
  int count_ = 0;
};

// Copies a tile. Streaming stores go around the caches: they spare the memory bus reading each line
// before it is overwritten. Whole lines only, or the line would be read and written in parts.
template <typename T>
inline void put(const T* from, std::int64_t size, T* to, bool streaming) {
#if defined(__SSE2__)
  constexpr std::uintptr_t kLine = 64;
  const std::uintptr_t bytes = static_cast<std::uintptr_t>(size) * sizeof(T);
  if (streaming && (reinterpret_cast<std::uintptr_t>(to) | bytes) % kLine == 0) {
    const auto* source = reinterpret_cast<const __m128i*>(from);
    auto* target = reinterpret_cast<__m128i*>(to);
    for (std::uintptr_t i = 0; i < bytes / 16; ++i) {
      _mm_stream_si128(target + i, _mm_loadu_si128(source + i));
    }
    return;
  }
#endif
  (void)streaming;
  // Not memcpy: for sizes like these compilers take `rep movs`, which is slow to start.
  THG_INDEPENDENT
  for (std::int64_t i = 0; i < size; ++i) to[i] = from[i];
}

// Makes streaming stores visible to whom an ordinary store later tells that they are done.
inline void finish_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
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

template <typename T>
inline void load_as(const T* row, const Layout& layout, std::int64_t begin, std::int64_t size,
                    float* to) {
  if (is_flat(layout)) return widen(row + begin, size, to);
  gather(row, layout, begin, size, to);
}

// Elements [begin, begin + size) of the row that starts `row` elements into `data`, as float32.
inline void load(const void* data, Dtype dtype, std::int64_t row, const Layout& layout,
                 std::int64_t begin, std::int64_t size, float* to) {
  switch (dtype) {
    case Dtype::kFloat32:
      return load_as(static_cast<const float*>(data) + row, layout, begin, size, to);
    case Dtype::kFloat16:
      return load_as(static_cast<const Float16*>(data) + row, layout, begin, size, to);
    case Dtype::kBFloat16:
      return load_as(static_cast<const BFloat16*>(data) + row, layout, begin, size, to);
    case Dtype::kFloat64:
      return load_as(static_cast<const double*>(data) + row, layout, begin, size, to);
  }
}

// scale * x to each of `count` places, which are elements of `data`.
template <typename T>
inline void store_as(const float* x, float scale, std::int64_t size, T* data,
                     const std::int64_t* places, int count, bool streaming) {
  alignas(64) T narrowed[kTile];
  narrow(x, scale, size, narrowed);
  for (int k = 0; k < count; ++k) {
    put(narrowed, size, data + places[k], streaming);
  }
}

inline void store(const float* x, float scale, std::int64_t size, void* data, Dtype dtype,
                  const std::int64_t* places, int count, bool streaming) {
  switch (dtype) {
    case Dtype::kFloat32:
      return store_as(x, scale, size, static_cast<float*>(data), places, count, streaming);
    case Dtype::kFloat16:
      return store_as(x, scale, size, static_cast<Float16*>(data), places, count, streaming);
    case Dtype::kBFloat16:
      return store_as(x, scale, size, static_cast<BFloat16*>(data), places, count, streaming);
    case Dtype::kFloat64:
      return store_as(x, scale, size, static_cast<double*>(data), places, count, streaming);
  }
}

}  // namespace THG_VARIANT
}  // namespace thg
