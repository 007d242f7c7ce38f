// What full ranking makes of one user's scores, which come a piece of the catalogue at a time, in the
// order of items: places of relevant items, the best of all, counts for the pooled AUC.
//
// A piece is in the thread's first cache, where it is masked, counted and selected from. Every result
// is an integer or one of the scores, so neither threads nor the size of pieces matters.

#ifndef SLGR_JAX_KERNELS_RANKS_H_
#define SLGR_JAX_KERNELS_RANKS_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>

#include "common.h"
#include "vectors.h"

namespace slgr {

constexpr int64_t kLanes = kVectorBytes / 4;  // scores compared at once
constexpr int64_t kStep = 64;  // scores that one test dismisses; room for pieces is whole steps
constexpr int64_t kGroup = 4;  // relevant items that share one load of a score
constexpr float kInf = std::numeric_limits<float>::infinity();

using Floats = float __attribute__((vector_size(kVectorBytes)));
using Ints = int32_t __attribute__((vector_size(kVectorBytes)));
// A typedef, since Clang takes no alignment from an alias.
typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));

inline Floats Load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
inline void Store(float* to, Floats x) { *reinterpret_cast<Unaligned*>(to) = x; }
inline Floats All(float x) { return x - Floats{}; }

inline int32_t Sum(Ints x) {
  int32_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += x[i];
  return sum;
}

// Whether none of x [n] is infinite or a NaN.
inline bool AllFinite(const float* x, int64_t n) {
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) finite &= std::fabs(x[i]) < kInf;
  return finite;
}

inline int64_t Padded(int64_t n) { return (n + kStep - 1) / kStep * kStep; }

// count += x > bar, and x == bar, a lane each.
inline void CountGreater(Floats x, Floats bar, Ints* count) {
#ifdef __AVX512F__
  const __m512i one = _mm512_set1_epi32(1), sum = (__m512i)*count;
  *count = (Ints)_mm512_mask_add_epi32(sum, _mm512_cmp_ps_mask(x, bar, _CMP_GT_OQ), sum, one);
#else
  *count -= (Ints)(x > bar);
#endif
}
inline void CountEqual(Floats x, Floats bar, Ints* count) {
#ifdef __AVX512F__
  const __m512i one = _mm512_set1_epi32(1), sum = (__m512i)*count;
  *count = (Ints)_mm512_mask_add_epi32(sum, _mm512_cmp_ps_mask(x, bar, _CMP_EQ_OQ), sum, one);
#else
  *count -= (Ints)(x == bar);
#endif
}

// Bit i: x[i] > bar, for kStep scores.
inline uint64_t Above(const float* x, float bar) {
  uint64_t bits = 0;
#if defined(__AVX512F__)
  for (int64_t i = 0; i < kStep; i += kLanes) {
    bits |= static_cast<uint64_t>(_mm512_cmp_ps_mask(Load(x + i), All(bar), _CMP_GT_OQ)) << i;
  }
#elif defined(__AVX2__)
  for (int64_t i = 0; i < kStep; i += kLanes) {
    const int lanes = _mm256_movemask_ps((__m256)(Load(x + i) > All(bar)));
    bits |= static_cast<uint64_t>(static_cast<uint32_t>(lanes)) << i;
  }
#else
  for (int64_t i = 0; i < kStep; ++i) bits |= static_cast<uint64_t>(x[i] > bar) << i;
#endif
  return bits;
}

// ---- rows of items ------------------------------------------------------------------------------

// One user's row of items, ascending.
struct Items {
  const int32_t *next, *end;

  int64_t size() const { return end - next; }
  bool Has(int32_t item) const { return std::binary_search(next, end, item); }

  // Puts `value` at those of the piece [begin, begin + size), which `next` then leaves behind.
  void Mask(float* x, int64_t begin, int64_t size, float value) {
    for (; next < end && *next < begin + size; ++next) x[*next - begin] = value;
  }
};

// Ragged rows; row u is indices[offsets[u], offsets[u + 1]).
struct Rows {
  const int32_t *offsets, *indices;
  Rows(const S32& offsets, const S32& indices)
      : offsets(offsets.data()), indices(indices.data()) {}
  Items Of(int32_t user) const { return {indices + offsets[user], indices + offsets[user + 1]}; }
};

// ---- the best of a row --------------------------------------------------------------------------

// A score and its item as one number: greater means a greater score or, of equal ones, an earlier
// item. Scores are neither NaN nor -0.0.
inline uint64_t Key(float score, int64_t item) {
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  bits ^= (bits >> 31) ? 0xffffffffu : 0x80000000u;
  return (static_cast<uint64_t>(bits) << 32) | ~static_cast<uint32_t>(item);
}
inline int32_t ItemOf(uint64_t key) { return static_cast<int32_t>(~static_cast<uint32_t>(key)); }
inline float ScoreOf(uint64_t key) {
  uint32_t bits = static_cast<uint32_t>(key >> 32);
  bits ^= (bits >> 31) ? 0x80000000u : 0xffffffffu;
  float score;
  std::memcpy(&score, &bits, sizeof score);
  return score;
}

// The K best of a row. Short lists are kept in order, and their last is the bar that others must pass.
// For longer ones it collects what is above the bar, and once the room is full keeps the K best and
// raises the bar: a few times K scores are looked at twice. If the row ascends all scores pass, at a
// constant cost each.
class Best {
 public:
  static int64_t Room(int64_t k) { return Full(k) + kStep; }  // keys that one row needs

  void Begin(uint64_t* keys, int64_t k) {
    keys_ = keys;
    k_ = k;
    size_ = 0;
    bar_ = -kInf;
  }

  // Whole steps of scores, of the items from `begin` on; -inf is never listed.
  void Take(const float* x, int64_t begin, int64_t padded) {
    for (int64_t i = 0; i < padded; i += kStep) {
      for (uint64_t bits = Above(x + i, bar_); bits != 0; bits &= bits - 1) {
        const int64_t at = i + __builtin_ctzll(bits);
        if (k_ > kShort) {
          keys_[size_++] = Key(x[at], begin + at);
        } else if (x[at] > bar_) {  // which may have risen since
          Insert(Key(x[at], begin + at));
        }
      }
      if (k_ > kShort && size_ > Full(k_)) Keep();
    }
  }

  // The items and scores of the K best, then -1 and -inf.
  void End(int32_t* items, float* scores) {
    if (k_ > kShort) {
      if (size_ > k_) Keep();
      std::sort(keys_, keys_ + size_, std::greater<uint64_t>());
    }
    for (int64_t i = 0; i < k_; ++i) {
      items[i] = i < size_ ? ItemOf(keys_[i]) : -1;
      scores[i] = i < size_ ? ScoreOf(keys_[i]) : -kInf;
    }
  }

 private:
  static constexpr int64_t kShort = 32;  // lists
  static int64_t Full(int64_t k) { return k + std::max(k, kStep); }

  void Insert(uint64_t key) {
    int64_t at = size_ < k_ ? size_++ : k_ - 1;
    for (; at > 0 && keys_[at - 1] < key; --at) keys_[at] = keys_[at - 1];
    keys_[at] = key;
    if (size_ == k_) bar_ = ScoreOf(keys_[k_ - 1]);  // later items with this very score come after
  }

  void Keep() {
    std::nth_element(keys_, keys_ + k_ - 1, keys_ + size_, std::greater<uint64_t>());
    size_ = k_;
    bar_ = ScoreOf(keys_[k_ - 1]);  // as in `Insert`
  }

  uint64_t* keys_;
  int64_t k_, size_;
  float bar_;
};

// ---- places of relevant items -------------------------------------------------------------------

// How many of x [n], whole steps, are above and at each of kBars bars.
template <int kBars>
void CountPiece(const float* x, int64_t n, const float* bars, int32_t* greater, int32_t* equal) {
  Floats bar[kBars];
  Ints above[kBars] = {}, at[kBars] = {};
  for (int64_t g = 0; g < kBars; ++g) bar[g] = All(bars[g]);
  for (int64_t i = 0; i < n; i += kLanes) {
    const Floats score = Load(x + i);
#pragma GCC unroll 4
    for (int64_t g = 0; g < kBars; ++g) {
      CountGreater(score, bar[g], &above[g]);
      CountEqual(score, bar[g], &at[g]);
    }
  }
  for (int64_t g = 0; g < kBars; ++g) {
    greater[g] = Sum(above[g]);
    equal[g] = Sum(at[g]);
  }
}

inline int32_t CountEqualBefore(const float* x, int64_t n, float bar) {
  Ints sums{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) CountEqual(Load(x + i), All(bar), &sums);
  int32_t count = Sum(sums);
  for (; i < n; ++i) count += x[i] == bar;
  return count;
}

// ---- a row ranked -------------------------------------------------------------------------------

// What ranks.py calls `Ranked`: rows of W places and of K best.
struct Ranked {
  bool* bad;
  float* score;
  int32_t *greater, *tied, *before;
  int64_t width;
  int32_t* items;
  float* values;
  int64_t k;
};

// One row of a chunk. Begin; then `score` gets those of the relevant items; then pieces; then End.
class RankedRow {
 public:
  // Args: row r of `out`, the user's rows, and Best::Room(k) keys.
  void Begin(const Ranked& out, int64_t r, Items seen, Items relevant, uint64_t* keys) {
    seen_ = seen;
    relevant_ = {relevant.next, std::min(relevant.end, relevant.next + out.width)};
    const int64_t at = r * out.width, wanted = relevant_.size();
    score_ = out.score + at, greater_ = out.greater + at;
    tied_ = out.tied + at, before_ = out.before + at;
    std::fill(score_ + wanted, score_ + out.width, 0.0f);
    for (int32_t* count : {greater_, tied_, before_}) std::fill(count, count + out.width, 0);
    best_.Begin(keys, out.k);
  }

  Items relevant() const { return relevant_; }

  // Where their scores go, before any piece comes; those that are masked stay at -inf.
  float* score() const { return score_; }
  void MaskRelevant() {
    for (int64_t p = 0; p < relevant_.size(); ++p) {
      if (seen_.Has(relevant_.next[p])) score_[p] = -kInf;
    }
  }

  // Scores of the items [begin, begin + size), and room for whole steps; both are written to.
  void Take(float* x, int64_t begin, int64_t size, int64_t k) {
    const int64_t padded = Padded(size);
    std::fill(x + size, x + padded, -kInf);
    seen_.Mask(x, begin, size, -kInf);
    const int64_t n = relevant_.size();
    for (int64_t p = 0; p < n; p += kGroup) {
      int32_t above[kGroup], at[kGroup];
      const int64_t group = std::min(kGroup, n - p);
      const auto count = group == 4   ? CountPiece<4>
                         : group == 3 ? CountPiece<3>
                         : group == 2 ? CountPiece<2>
                                      : CountPiece<1>;
      count(x, padded, score_ + p, above, at);
      for (int64_t g = 0; g < group; ++g) Add(p + g, above[g], at[g], x, begin, size);
    }
    if (k) best_.Take(x, begin, padded);
  }

  void End(const Ranked& out, int64_t r, bool bad) {
    out.bad[r] = bad;
    for (int64_t p = 0; p < relevant_.size(); ++p) {
      const bool masked = score_[p] == -kInf;
      greater_[p] = masked ? 0 : greater_[p];
      tied_[p] = masked ? 0 : tied_[p] - 1;  // without itself
      before_[p] = masked ? 0 : before_[p];
    }
    if (out.k) best_.End(out.items + r * out.k, out.values + r * out.k);
  }

 private:
  void Add(int64_t p, int32_t above, int32_t at, const float* x, int64_t begin, int64_t size) {
    const int64_t place = relevant_.next[p] - begin;
    if (place >= 0 && place < size) {
      before_[p] = tied_[p] + (at > 1 ? CountEqualBefore(x, place, score_[p]) : 0);
    }
    greater_[p] += above;
    tied_[p] += at;
  }

  Items seen_, relevant_;
  float* score_;
  int32_t *greater_, *tied_, *before_;
  Best best_;
};

// A row that is nobody's.
inline void RankNobody(const Ranked& out, int64_t r) {
  out.bad[r] = false;
  std::fill_n(out.score + r * out.width, out.width, 0.0f);
  for (int32_t* count : {out.greater, out.tied, out.before}) {
    std::fill_n(count + r * out.width, out.width, 0);
  }
  std::fill_n(out.items + r * out.k, out.k, -1);
  std::fill_n(out.values + r * out.k, out.k, -kInf);
}

// ---- the pooled AUC -----------------------------------------------------------------------------

// The sorted relevant scores of all users and the table into them, see metrics.pool_tables.
struct Pool {
  const float* scores;  // ascending, then +inf
  const int32_t *above2, *ties, *base;
  int64_t cells, room;
  float low, scale;
  int32_t steps;

  // The sum of 2 * pairs above + pairs with the same score over x [kStep]. All searches halve
  // together and without branches: what they wait for in memory, they wait for at once.
  uint64_t Count(const float* x) const {
    const float half_low = low * 0.5f, end = static_cast<float>(cells - 1);
    const int32_t last = static_cast<int32_t>(room) - 1;
    int32_t at[kStep];
    for (int64_t i = 0; i < kStep; i += kLanes) {
      Floats score = Load(x + i);
      score = score > All(low) ? score : All(low);
      Floats place = (score * 0.5f - half_low) * scale;
      place = place < All(end) ? place : All(end);
      const Ints cell = __builtin_convertvector(place, Ints);
      for (int l = 0; l < kLanes; ++l) at[i + l] = base[cell[l]];
    }
    for (int32_t jump = steps > 0 ? 1 << (steps - 1) : 0; jump > 0; jump >>= 1) {
      for (int64_t i = 0; i < kStep; ++i) {
        const int32_t probe = std::min(at[i] + jump - 1, last);  // the last is +inf
        at[i] += jump & -static_cast<int32_t>(scores[probe] < x[i]);
      }
    }
    uint64_t total = 0;
    for (int64_t i = 0; i < kStep; ++i) {
      total += static_cast<uint32_t>(above2[at[i]] - (scores[at[i]] == x[i] ? ties[at[i]] : 0));
    }
    return total;
  }
};

// One row of a chunk, looked up among the relevant scores of all users.
struct PooledRow {
  Items seen, relevant;
  uint64_t total = 0;

  // As of `RankedRow`.
  void Take(const Pool& pool, float* x, int64_t begin, int64_t size) {
    // +inf has no pair above it and none beside it.
    std::fill(x + size, x + Padded(size), kInf);
    seen.Mask(x, begin, size, kInf);
    relevant.Mask(x, begin, size, kInf);
    for (int64_t i = 0; i < size; i += kStep) total += pool.Count(x + i);
  }
};

}  // namespace slgr

#endif  // SLGR_JAX_KERNELS_RANKS_H_
