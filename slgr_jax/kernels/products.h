// Scores as they are multiplied: inner products of some users' vectors with those of all items, a block
// of items in a core's second cache at a time. No matrix of scores is written to memory.

#ifndef SLGR_JAX_KERNELS_PRODUCTS_H_
#define SLGR_JAX_KERNELS_PRODUCTS_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>

#include "ranks.h"

namespace slgr {

// a * b + c, rounded once where the processor has it.
inline Floats MultiplyAdd(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__) && defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// A load that is not to be repeated by each instruction that reads it: a core loads twice a cycle.
SLGR_INLINE inline Floats InRegister(Floats x) {
#ifdef __AVX2__
  asm("" : "+v"(x));
#endif
  return x;
}

// A tile is kTileRows users by kTileItems items; with two sums of each it fills the registers.
#ifdef __AVX512F__
constexpr int64_t kTileRows = 6;
#else
constexpr int64_t kTileRows = 3;
#endif
constexpr int64_t kTileItems = 2 * kLanes;
constexpr int64_t kPanel = 32;  // items whose numbers lie side by side, see `ranks.Vectors`
constexpr int64_t kRowsAtOnce = 12;  // users who read a panel from the first cache
constexpr int64_t kBlockItems = 512, kBlockNumbers = 1 << 15;  // which the second cache holds

// Scores of kRows users and kTileItems items, to[r * room]. A score is the sum of the products of even
// columns and that of odd ones, each added up in the order of columns: its bits do not depend on what
// is computed beside it. `from` [kRows] are users' vectors, `items` the first numbers of the items.
template <int kRows>
void Tile(const float* const* from, const float* items, int64_t stride, int64_t depth, float* to,
          int64_t room) {
  Floats even[kRows][2] = {}, odd[kRows][2] = {};
  const auto add = [&](Floats (*sum)[2], int64_t column) SLGR_INLINE {
    const Floats left = InRegister(Load(items + column * stride));
    const Floats right = InRegister(Load(items + column * stride + kLanes));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Floats x = All(from[r][column]);
      sum[r][0] = MultiplyAdd(x, left, sum[r][0]);
      sum[r][1] = MultiplyAdd(x, right, sum[r][1]);
    }
  };
  int64_t column = 0;
  for (; column + 2 <= depth; column += 2) {
    add(even, column);
    add(odd, column + 1);
  }
  if (column < depth) add(even, column);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    Store(to + r * room, even[r][0] + odd[r][0] + 0.0f);  // 0.0 for -0.0
    Store(to + r * room + kLanes, even[r][1] + odd[r][1] + 0.0f);
  }
}

// The vectors of some users and of all items, and one thread's room.
class Products {
 public:
  Products(const F32& queries, const F32& items, const F32& panels, const F32& greatest)
      : queries_(queries.data()),
        items_(items.data()),
        panels_(panels.data()),
        n_items_(items.size(0)),
        depth_(items.size(1)),
        greatest_(*greatest.data()),
        block_(std::clamp(kBlockNumbers / std::max<int64_t>(depth_, 1) / kStep * kStep, kStep,
                          kBlockItems)),
        stride_(block_ + kPanel / 2),
        scores_(kRowsAtOnce * stride_),
        few_(kTileItems * depth_) {}

  // scores [n] of the user at row `row` and some items, with the bits that `Each` gives them.
  void Of(int64_t row, const int32_t* items, int64_t n, float* scores) {
    const float* const from[] = {queries_ + row * depth_};
    for (int64_t begin = 0; begin < n; begin += kTileItems) {
      const int64_t size = std::min(kTileItems, n - begin);
      for (int64_t i = 0; i < size; ++i) {
        const float* const item = items_ + items[begin + i] * depth_;
        for (int64_t d = 0; d < depth_; ++d) few_[d * kTileItems + i] = item[d];
      }
      Tile<1>(from, few_.data(), kTileItems, depth_, scores_.data(), stride_);
      std::memcpy(scores + begin, scores_.data(), size * sizeof(float));
    }
  }

  // take(i, x, begin, size) for each user i of rows [n] and each block of items, in the order of
  // items: x are the scores of [begin, begin + size), and room for whole steps, to be written to.
  // finite [n]: all of them are.
  template <typename Take>
  void Each(const int32_t* rows, int64_t n, bool* finite, const Take& take) {
    std::unique_ptr<bool[]> bounded(new bool[n]);
    for (int64_t i = 0; i < n; ++i) bounded[i] = Bounded(rows[i]);
    std::fill_n(finite, n, true);
    for (int64_t begin = 0; begin < n_items_; begin += block_) {
      const int64_t size = std::min(block_, n_items_ - begin);
      for (int64_t i = 0; i < n; i += kRowsAtOnce) {
        const int64_t some = std::min(kRowsAtOnce, n - i);
        Multiply(rows + i, some, begin, size, i == 0);
        for (int64_t r = 0; r < some; ++r) {
          float* const x = scores_.data() + r * stride_;
          if (!bounded[i + r]) finite[i + r] = AllFinite(x, size) && finite[i + r];
          take(i + r, x, begin, size);
        }
      }
    }
  }

 private:
  // Whether no sum of products of the user's numbers can overflow: false of a NaN.
  bool Bounded(int64_t row) const {
    const float limit = std::numeric_limits<float>::max() / 2 / static_cast<float>(depth_);
    bool bounded = true;
    for (int64_t d = 0; d < depth_; ++d) {
      bounded &= std::fabs(queries_[row * depth_ + d]) * greatest_ < limit;
    }
    return bounded;
  }

  // scores_ [n, stride_] of n users and the items [begin, begin + size); `fresh`: nobody has read
  // these items, so that a panel is fetched while the one before it is read.
  void Multiply(const int32_t* rows, int64_t n, int64_t begin, int64_t size, bool fresh) {
    const float* from[kRowsAtOnce];
    for (int64_t r = 0; r < kRowsAtOnce; ++r) from[r] = queries_ + rows[std::min(r, n - 1)] * depth_;
    for (int64_t first = 0; first < size; first += kTileItems) {
      const int64_t item = begin + first, within = item % kPanel;
      const float* const items = panels_ + (item - within) * depth_ + within;
      if (fresh && item + kPanel < n_items_) Prefetch(items + depth_ * kPanel);
      for (int64_t r = 0; r < n; r += kTileRows) {
        Tile<kTileRows>(from + r, items, kPanel, depth_, scores_.data() + r * stride_ + first,
                        stride_);
      }
    }
  }

  // What a tile reads.
  SLGR_PREFETCHES void Prefetch(const float* items) const {
    for (int64_t d = 0; d < depth_; ++d) __builtin_prefetch(items + d * kPanel);
  }

  // Whole cache lines: a vector that lies in two is loaded twice.
  class Room {
   public:
    explicit Room(int64_t n) : room_(new float[n + kLine]()) {
      const auto begin = reinterpret_cast<uintptr_t>(room_.get());
      data_ = room_.get() + (kLine - begin / sizeof(float) % kLine) % kLine;
    }
    float* data() const { return data_; }
    float& operator[](int64_t i) const { return data_[i]; }

   private:
    static constexpr int64_t kLine = 16;
    const std::unique_ptr<float[]> room_;
    float* data_;
  };

  const float *queries_, *items_, *panels_;
  const int64_t n_items_, depth_;
  const float greatest_;  // of the items' numbers, without their signs
  const int64_t block_;
  const int64_t stride_;  // of rows of scores: powers of two would share a few lines of a cache
  const Room scores_, few_;
};

}  // namespace slgr

#endif  // SLGR_JAX_KERNELS_PRODUCTS_H_
