// A block of a row in registers: kBlock columns of float32, and what is done with them.

#ifndef SLGR_JAX_KERNELS_BLOCK_H_
#define SLGR_JAX_KERNELS_BLOCK_H_

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common.h"

namespace slgr {

constexpr int64_t kBlock = 32;  // columns of one task: two cache lines of float32

SLGR_PREFETCHES inline void Prefetch(const float* row) {
  __builtin_prefetch(row);
  __builtin_prefetch(row + 16);
}

using V16 = float __attribute__((vector_size(64)));
using V8 = float __attribute__((vector_size(32)));
using V4 = float __attribute__((vector_size(16)));
using Unaligned = float __attribute__((vector_size(64), aligned(4), may_alias));

struct Block {
  V16 lo, hi;
};
inline Block operator+(Block a, Block b) { return {a.lo + b.lo, a.hi + b.hi}; }
inline Block operator-(Block a, Block b) { return {a.lo - b.lo, a.hi - b.hi}; }
inline Block operator*(Block a, Block b) { return {a.lo * b.lo, a.hi * b.hi}; }
inline Block operator*(float a, Block b) { return {a * b.lo, a * b.hi}; }

// `kFull`: the block has all kBlock columns; otherwise `size` of them, and 0 in the others.
template <bool kFull>
inline Block Load(const float* from, int64_t size) {
  if (kFull) {
    return {*reinterpret_cast<const Unaligned*>(from),
            *reinterpret_cast<const Unaligned*>(from + 16)};
  }
  Block block{};
  std::memcpy(&block, from, size * sizeof(float));
  return block;
}

template <bool kFull>
inline void Store(float* to, Block block, int64_t size) {
  if (kFull) {
    *reinterpret_cast<Unaligned*>(to) = block.lo;
    *reinterpret_cast<Unaligned*>(to + 16) = block.hi;
  } else {
    std::memcpy(to, &block, size * sizeof(float));
  }
}

// All bits set in one column, none in the others.
struct Mask {
  using Bits = int32_t __attribute__((vector_size(64)));
  Bits lo{}, hi{};
  explicit Mask(int64_t column) {
    int32_t bits[kBlock] = {};
    bits[column] = -1;
    std::memcpy(&lo, bits, sizeof lo);
    std::memcpy(&hi, bits + 16, sizeof hi);
  }
  static V16 Pick(Bits mask, float yes, V16 no) {
    const V16 all = yes - V16{};
    return (V16)((mask & (Bits)all) | (~mask & (Bits)no));
  }
  // `block` with `value` in the mask's column.
  Block Put(Block block, float value) const {
    return {Pick(lo, value, block.lo), Pick(hi, value, block.hi)};
  }
};

inline V4 Fold(Block block) {
  const union {
    V16 whole;
    V8 half[2];
  } sixteen{block.lo + block.hi};
  const union {
    V8 whole;
    V4 half[2];
  } eight{sixteen.half[0] + sixteen.half[1]};
  return eight.half[0] + eight.half[1];
}

inline float Sum(Block block) {
  const V4 four = Fold(block);
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// (sum of a, of b, anything, of d), added in the order of `Sum`.
inline V4 Sums(Block a, Block b, Block d) {
  using Pick = int32_t __attribute__((vector_size(16)));
  const V4 x = Fold(a), y = Fold(b), w = Fold(d);
  const V4 xy = __builtin_shuffle(x, y, Pick{0, 4, 1, 5}) + __builtin_shuffle(x, y, Pick{2, 6, 3, 7});
  const V4 ww = __builtin_shuffle(w, Pick{0, 0, 1, 1}) + __builtin_shuffle(w, Pick{2, 2, 3, 3});
  return __builtin_shuffle(xy, ww, Pick{0, 1, 4, 5}) + __builtin_shuffle(xy, ww, Pick{2, 3, 6, 7});
}

inline V16 InverseRoot(V16 x) {
#ifdef __AVX512F__
  const V16 y = _mm512_rsqrt14_ps(x);
  return y * (1.5f - 0.5f * x * y * y);  // one Newton step: the rounding of float32
#else
  V16 y;
  for (int i = 0; i < 16; ++i) y[i] = 1.0f / std::sqrt(x[i]);
  return y;
#endif
}
inline Block InverseRoot(Block x) { return {InverseRoot(x.lo), InverseRoot(x.hi)}; }

}  // namespace slgr

#endif  // SLGR_JAX_KERNELS_BLOCK_H_
