// Vectors of float32 and of uint32: as wide as the machine's, and wider ones as pairs of those. (GCC
// keeps a vector that is wider than the machine's in memory and may work on it a number at a time.)

#ifndef SLGR_JAX_KERNELS_VECTORS_H_
#define SLGR_JAX_KERNELS_VECTORS_H_

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>

#include "common.h"

namespace slgr {

template <typename Half>
struct Pair {
  Half lo, hi;
};

// Of the machine's own vectors the widest.
#if defined(__AVX512F__)
constexpr int64_t kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int64_t kVectorBytes = 32;
#else
constexpr int64_t kVectorBytes = 16;
#endif

using V4 = float __attribute__((vector_size(16)));
using W4 = uint32_t __attribute__((vector_size(16)));
// Typedefs, since Clang takes no alignment from an alias.
typedef float Unaligned4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint32_t UnalignedW4 __attribute__((vector_size(16), aligned(4), may_alias));
#ifdef __AVX2__
using V8 = float __attribute__((vector_size(32)));
using W8 = uint32_t __attribute__((vector_size(32)));
typedef float Unaligned8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t UnalignedW8 __attribute__((vector_size(32), aligned(4), may_alias));
#else
using V8 = Pair<V4>;
using W8 = Pair<W4>;
#endif
#ifdef __AVX512F__
using V16 = float __attribute__((vector_size(64)));
using W16 = uint32_t __attribute__((vector_size(64)));
typedef float Unaligned16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t UnalignedW16 __attribute__((vector_size(64), aligned(4), may_alias));
#else
using V16 = Pair<V8>;
using W16 = Pair<W8>;
#endif

// ---- arithmetic of pairs -----------------------------------------------------------------------

#define SLGR_OF_PAIRS(op)                                          \
  template <typename H>                                            \
  SLGR_INLINE inline Pair<H> operator op(Pair<H> a, Pair<H> b) {   \
    return {a.lo op b.lo, a.hi op b.hi};                           \
  }                                                                \
  template <typename H>                                            \
  SLGR_INLINE inline Pair<H> operator op(Pair<H> a, float b) {     \
    return {a.lo op b, a.hi op b};                                 \
  }                                                                \
  template <typename H>                                            \
  SLGR_INLINE inline Pair<H> operator op(float a, Pair<H> b) {     \
    return {a op b.lo, a op b.hi};                                 \
  }
SLGR_OF_PAIRS(+)
SLGR_OF_PAIRS(-)
SLGR_OF_PAIRS(*)
SLGR_OF_PAIRS(/)
#undef SLGR_OF_PAIRS

// `f` of every machine vector of x, and of those of x and y.
template <typename F, typename V>
SLGR_INLINE inline auto Each(const F& f, V x) {
  return f(x);
}
template <typename F, typename H>
SLGR_INLINE inline auto Each(const F& f, Pair<H> x) {
  return Pair<decltype(Each(f, x.lo))>{Each(f, x.lo), Each(f, x.hi)};
}
template <typename F, typename V, typename W>
SLGR_INLINE inline auto Each(const F& f, V x, W y) {
  return f(x, y);
}
template <typename F, typename H, typename G>
SLGR_INLINE inline auto Each(const F& f, Pair<H> x, Pair<G> y) {
  return Pair<decltype(Each(f, x.lo, y.lo))>{Each(f, x.lo, y.lo), Each(f, x.hi, y.hi)};
}

// The same bits as the other kind of number.
SLGR_INLINE inline W4 WordsOf(V4 x) { return (W4)x; }
SLGR_INLINE inline V4 FloatsOf(W4 x) { return (V4)x; }
#ifdef __AVX2__
SLGR_INLINE inline W8 WordsOf(V8 x) { return (W8)x; }
SLGR_INLINE inline V8 FloatsOf(W8 x) { return (V8)x; }
#endif
#ifdef __AVX512F__
SLGR_INLINE inline W16 WordsOf(V16 x) { return (W16)x; }
SLGR_INLINE inline V16 FloatsOf(W16 x) { return (V16)x; }
#endif

// ---- memory ------------------------------------------------------------------------------------

template <typename V>
struct In;  // how a vector lies in memory
template <>
struct In<V4> {
  static constexpr int64_t kSize = 4;
  SLGR_INLINE static V4 Read(const float* from) { return *reinterpret_cast<const Unaligned4*>(from); }
  SLGR_INLINE static void Write(float* to, V4 x) { *reinterpret_cast<Unaligned4*>(to) = x; }
};
template <>
struct In<W4> {
  static constexpr int64_t kSize = 4;
  SLGR_INLINE static W4 Read(const uint32_t* from) {
    return *reinterpret_cast<const UnalignedW4*>(from);
  }
};
#ifdef __AVX2__
template <>
struct In<V8> {
  static constexpr int64_t kSize = 8;
  SLGR_INLINE static V8 Read(const float* from) { return *reinterpret_cast<const Unaligned8*>(from); }
  SLGR_INLINE static void Write(float* to, V8 x) { *reinterpret_cast<Unaligned8*>(to) = x; }
};
template <>
struct In<W8> {
  static constexpr int64_t kSize = 8;
  SLGR_INLINE static W8 Read(const uint32_t* from) {
    return *reinterpret_cast<const UnalignedW8*>(from);
  }
};
#endif
#ifdef __AVX512F__
template <>
struct In<V16> {
  static constexpr int64_t kSize = 16;
  SLGR_INLINE static V16 Read(const float* from) {
    return *reinterpret_cast<const Unaligned16*>(from);
  }
  SLGR_INLINE static void Write(float* to, V16 x) { *reinterpret_cast<Unaligned16*>(to) = x; }
};
template <>
struct In<W16> {
  static constexpr int64_t kSize = 16;
  SLGR_INLINE static W16 Read(const uint32_t* from) {
    return *reinterpret_cast<const UnalignedW16*>(from);
  }
};
#endif
template <typename H>
struct In<Pair<H>> {
  static constexpr int64_t kSize = 2 * In<H>::kSize;
  template <typename T>
  SLGR_INLINE static Pair<H> Read(const T* from) {
    return {In<H>::Read(from), In<H>::Read(from + In<H>::kSize)};
  }
  SLGR_INLINE static void Write(float* to, Pair<H> x) {
    In<H>::Write(to, x.lo);
    In<H>::Write(to + In<H>::kSize, x.hi);
  }
};

// ---- functions ---------------------------------------------------------------------------------

// The sum of the halves of a vector.
template <typename H>
SLGR_INLINE inline H Halved(Pair<H> x) {
  return x.lo + x.hi;
}
#ifdef __AVX2__
SLGR_INLINE inline V4 Halved(V8 x) {
  return (V4)_mm256_castps256_ps128((__m256)x) + (V4)_mm256_extractf128_ps((__m256)x, 1);
}
#endif
#ifdef __AVX512F__
SLGR_INLINE inline V8 Halved(V16 x) {
  const union {
    V16 whole;
    V8 half[2];
  } both{x};
  return both.half[0] + both.half[1];
}
#endif

struct RootOf {
  template <typename V>
  SLGR_INLINE V operator()(V x) const {
    V y;
    for (uint64_t i = 0; i < sizeof x / sizeof(float); ++i) y[i] = std::sqrt(x[i]);
    return y;
  }
};
template <typename V>
SLGR_INLINE inline V Root(V x) {
  return Each(RootOf{}, x);
}

struct InverseRootOf {
  template <typename V>
  SLGR_INLINE V operator()(V x) const {
#ifdef __AVX512F__
    const V y = _mm512_rsqrt14_ps(x);
    return y * (1.5f - 0.5f * x * y * y);  // one Newton step: the rounding of float32
#else
    return 1.0f / RootOf{}(x);
#endif
  }
};
template <typename V>
SLGR_INLINE inline V InverseRoot(V x) {
  return Each(InverseRootOf{}, x);
}

}  // namespace slgr

#endif  // SLGR_JAX_KERNELS_VECTORS_H_
