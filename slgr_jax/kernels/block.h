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
SLGR_PREFETCHES inline void Prefetch(const uint16_t* row) { __builtin_prefetch(row); }

using V16 = float __attribute__((vector_size(64)));
using V8 = float __attribute__((vector_size(32)));
using V4 = float __attribute__((vector_size(16)));
// A typedef, since Clang takes no alignment from an alias.
typedef float Unaligned __attribute__((vector_size(64), aligned(4), may_alias));

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

// ---- halves of float32, as integers -------------------------------------------------------------

using Bits = int32_t __attribute__((vector_size(64)));
using Words = uint32_t __attribute__((vector_size(64)));
using Halves = uint16_t __attribute__((vector_size(32)));
typedef uint16_t UnalignedHalves __attribute__((vector_size(32), aligned(2), may_alias));

struct WordBlock {
  Words lo, hi;
};

// GCC 12 converts vectors of this size in pieces unless it is told the instruction.
inline Words Widened(const uint16_t* from) {
  const UnalignedHalves halves = *reinterpret_cast<const UnalignedHalves*>(from);
#ifdef __AVX512F__
  return (Words)_mm512_cvtepu16_epi32((__m256i)halves);
#else
  return __builtin_convertvector(halves, Words);
#endif
}
inline void StoreNarrowed(uint16_t* to, Words words) {
#ifdef __AVX512F__
  const Halves halves = (Halves)_mm512_cvtepi32_epi16((__m512i)words);
#else
  const Halves halves = __builtin_convertvector(words, Halves);
#endif
  *reinterpret_cast<UnalignedHalves*>(to) = halves;
}

template <bool kFull>
inline WordBlock LoadWords(const uint16_t* from, int64_t size) {
  uint16_t some[kBlock];
  if (!kFull) {
    std::memset(some, 0, sizeof some);
    std::memcpy(some, from, size * sizeof(uint16_t));
    from = some;
  }
  return {Widened(from), Widened(from + 16)};
}

template <bool kFull>
inline void StoreWords(uint16_t* to, WordBlock words, int64_t size) {
  uint16_t some[kBlock];
  uint16_t* const all = kFull ? to : some;
  StoreNarrowed(all, words.lo);
  StoreNarrowed(all + 16, words.hi);
  if (!kFull) std::memcpy(to, some, size * sizeof(uint16_t));
}

// Values that are upper halves.
template <bool kFull>
inline Block Load(const uint16_t* from, int64_t size) {
  const WordBlock words = LoadWords<kFull>(from, size);
  return {(V16)(words.lo << 16), (V16)(words.hi << 16)};
}

// Numbers of which upper and lower halves lie apart.
template <bool kFull>
inline Block LoadHalves(const uint16_t* upper, const uint16_t* lower, int64_t size) {
  const WordBlock a = LoadWords<kFull>(upper, size), b = LoadWords<kFull>(lower, size);
  return {(V16)(a.lo << 16 | b.lo), (V16)(a.hi << 16 | b.hi)};
}

template <bool kFull>
inline void StoreHalves(uint16_t* upper, uint16_t* lower, Block block, int64_t size) {
  const Words lo = (Words)block.lo, hi = (Words)block.hi;
  StoreWords<kFull>(upper, {lo >> 16, hi >> 16}, size);
  StoreWords<kFull>(lower, {lo & 0xFFFFu, hi & 0xFFFFu}, size);
}

// random_words.mixed, of numbers and of vectors.
template <typename W>
inline W Mixed(W x) {
  x = (x ^ x >> 16) * 0x85EBCA6Bu;
  x = (x ^ x >> 13) * 0xC2B2AE35u;
  return x ^ x >> 16;
}

// Uniform in [0, 2^16), a function of (words, row, column): random_words.halves_of_rows.
inline WordBlock Noise(const uint32_t* words, int64_t id, int64_t begin) {
  constexpr uint32_t kWeyl = 0x9E3779B9u;
  const Words steps = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};
  const uint32_t start = Mixed(Mixed(static_cast<uint32_t>(id) ^ words[0]) + words[1]);
  const Words both = Mixed(start + (steps + static_cast<uint32_t>(begin / 2)) * kWeyl);
  return {both >> 16, both & 0xFFFFu};
}

// The upper halves of (bits + noise), but that a NaN stays one: tables.RowFormat.pack.
template <bool kFull>
inline void StoreUpper(uint16_t* to, Block block, WordBlock noise, int64_t size) {
  const auto upper = [](V16 x, Words more) {
    const Words bits = (Words)x;
    return (x != x) ? bits >> 16 | 0x40u : bits + more >> 16;
  };
  StoreWords<kFull>(to, {upper(block.lo, noise.lo), upper(block.hi, noise.hi)}, size);
}

// ---- one column ---------------------------------------------------------------------------------

// All bits set in one column, none in the others.
struct Mask {
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

// The four of (x, y)'s eight numbers at these places.
template <int a, int b, int c, int d>
inline V4 Picked(V4 x, V4 y) {
#ifdef __clang__
  return __builtin_shufflevector(x, y, a, b, c, d);
#else
  using Places = int32_t __attribute__((vector_size(16)));
  return __builtin_shuffle(x, y, Places{a, b, c, d});
#endif
}

// (sum of a, of b, anything, of d), added in the order of `Sum`.
inline V4 Sums(Block a, Block b, Block d) {
  const V4 x = Fold(a), y = Fold(b), w = Fold(d);
  const V4 xy = Picked<0, 4, 1, 5>(x, y) + Picked<2, 6, 3, 7>(x, y);
  const V4 ww = Picked<0, 0, 1, 1>(w, w) + Picked<2, 2, 3, 3>(w, w);
  return Picked<0, 1, 4, 5>(xy, ww) + Picked<2, 3, 6, 7>(xy, ww);
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
