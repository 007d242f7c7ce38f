// A block of a row in registers: kBlock columns of float32, and what is done with them.

#ifndef SLGR_JAX_KERNELS_BLOCK_H_
#define SLGR_JAX_KERNELS_BLOCK_H_

#include <cstdint>
#include <cstring>

#include "common.h"
#include "vectors.h"

namespace slgr {

constexpr int64_t kBlock = 32;  // columns of one task: two cache lines of float32

SLGR_PREFETCHES inline void Prefetch(const float* row) {
  __builtin_prefetch(row);
  __builtin_prefetch(row + 16);
}
SLGR_PREFETCHES inline void Prefetch(const uint16_t* row) { __builtin_prefetch(row); }

using Block = Pair<V16>;
using WordBlock = Pair<W16>;

// `kFull`: the block has all kBlock columns; otherwise `size` of them, and 0 in the others.
template <bool kFull>
inline Block Load(const float* from, int64_t size) {
  if (kFull) return In<Block>::Read(from);
  float some[kBlock] = {};
  std::memcpy(some, from, size * sizeof(float));
  return In<Block>::Read(some);
}

template <bool kFull>
inline void Store(float* to, Block block, int64_t size) {
  if (kFull) {
    In<Block>::Write(to, block);
    return;
  }
  float some[kBlock];
  In<Block>::Write(some, block);
  std::memcpy(to, some, size * sizeof(float));
}

// ---- halves of float32, as integers -------------------------------------------------------------

// Words that lie in memory as their lower halves. (GCC 12 converts vectors in pieces unless it is
// told the instruction.)
template <typename W>
struct Halves;
template <>
struct Halves<W4> {
  SLGR_INLINE static W4 Read(const uint16_t* from) { return W4{from[0], from[1], from[2], from[3]}; }
  SLGR_INLINE static void Write(uint16_t* to, W4 words) {
    for (int i = 0; i < 4; ++i) to[i] = static_cast<uint16_t>(words[i]);
  }
};
#ifdef __AVX2__
template <>
struct Halves<W8> {
  SLGR_INLINE static W8 Read(const uint16_t* from) {
    return (W8)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  SLGR_INLINE static void Write(uint16_t* to, W8 words) {
    const __m256i eight = (__m256i)words;
    const __m128i low = _mm256_castsi256_si128(eight), high = _mm256_extracti128_si256(eight, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_packus_epi32(low, high));
  }
};
#endif
#ifdef __AVX512F__
template <>
struct Halves<W16> {
  SLGR_INLINE static W16 Read(const uint16_t* from) {
    return (W16)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  SLGR_INLINE static void Write(uint16_t* to, W16 words) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16((__m512i)words));
  }
};
#endif
template <typename H>
struct Halves<Pair<H>> {
  static constexpr int64_t kHalf = In<H>::kSize;
  SLGR_INLINE static Pair<H> Read(const uint16_t* from) {
    return {Halves<H>::Read(from), Halves<H>::Read(from + kHalf)};
  }
  SLGR_INLINE static void Write(uint16_t* to, Pair<H> words) {
    Halves<H>::Write(to, words.lo);
    Halves<H>::Write(to + kHalf, words.hi);
  }
};

template <bool kFull>
inline WordBlock LoadWords(const uint16_t* from, int64_t size) {
  if (kFull) return Halves<WordBlock>::Read(from);
  uint16_t some[kBlock] = {};
  std::memcpy(some, from, size * sizeof(uint16_t));
  return Halves<WordBlock>::Read(some);
}

// Of words below 2^16.
template <bool kFull>
inline void StoreWords(uint16_t* to, WordBlock words, int64_t size) {
  if (kFull) {
    Halves<WordBlock>::Write(to, words);
    return;
  }
  uint16_t some[kBlock];
  Halves<WordBlock>::Write(some, words);
  std::memcpy(to, some, size * sizeof(uint16_t));
}

// Values that are upper halves.
template <bool kFull>
inline Block Load(const uint16_t* from, int64_t size) {
  const auto upper = [](auto words) { return FloatsOf(words << 16); };
  return Each(upper, LoadWords<kFull>(from, size));
}

// Numbers of which upper and lower halves lie apart.
template <bool kFull>
inline Block LoadHalves(const uint16_t* upper, const uint16_t* lower, int64_t size) {
  const auto joined = [](auto high, auto low) { return FloatsOf(high << 16 | low); };
  return Each(joined, LoadWords<kFull>(upper, size), LoadWords<kFull>(lower, size));
}

template <bool kFull>
inline void StoreHalves(uint16_t* upper, uint16_t* lower, Block block, int64_t size) {
  const auto high = [](auto x) { return WordsOf(x) >> 16; };
  const auto low = [](auto x) { return WordsOf(x) & 0xFFFFu; };
  StoreWords<kFull>(upper, Each(high, block), size);
  StoreWords<kFull>(lower, Each(low, block), size);
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
  static constexpr uint32_t kSteps[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};
  const uint32_t start = Mixed(Mixed(static_cast<uint32_t>(id) ^ words[0]) + words[1]);
  const uint32_t before = static_cast<uint32_t>(begin / 2);
  const auto mixed = [=](auto steps) { return Mixed(start + (steps + before) * kWeyl); };
  const W16 both = Each(mixed, In<W16>::Read(kSteps));
  const auto high = [](auto x) { return x >> 16; };
  const auto low = [](auto x) { return x & 0xFFFFu; };
  return {Each(high, both), Each(low, both)};
}

// The upper halves of (bits + noise), but that a NaN stays one: tables.RowFormat.pack.
template <bool kFull>
inline void StoreUpper(uint16_t* to, Block block, WordBlock noise, int64_t size) {
  const auto upper = [](auto x, auto more) {
    const auto bits = WordsOf(x);
    return (x != x) ? bits >> 16 | 0x40u : bits + more >> 16;
  };
  StoreWords<kFull>(to, Each(upper, block, noise), size);
}

// ---- one column ---------------------------------------------------------------------------------

// All bits set in one column, none in the others.
class Mask {
 public:
  explicit Mask(int64_t column) {
    uint32_t bits[kBlock] = {};
    bits[column] = ~0u;
    mask_ = In<WordBlock>::Read(bits);
  }
  // `block` with `value` in the mask's column.
  Block Put(Block block, float value) const {
    const auto pick = [value](auto x, auto mask) {
      const auto all = WordsOf(value - decltype(x){});
      return FloatsOf((mask & all) | (~mask & WordsOf(x)));
    };
    return Each(pick, block, mask_);
  }

 private:
  WordBlock mask_;
};

inline V4 Fold(Block block) { return Halved(Halved(Halved(block))); }

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

}  // namespace slgr

#endif  // SLGR_JAX_KERNELS_BLOCK_H_
