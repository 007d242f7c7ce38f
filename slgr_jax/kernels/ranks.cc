// CPU kernels of full ranking, called by XLA (see ranks.py for what each one computes).
//
// Why they exist: XLA compares one relevant item of every user of a chunk at a time, so the
// chunk's scores pass through memory once per item, and its top_k orders whole rows. Here one
// thread copies one user's scores into its own cache, masks them there, and counts and selects
// there. Every result is an integer or one of the scores, so threads and order do not matter.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>

#include "common.h"
#include "vectors.h"

namespace slgr {
namespace {

constexpr int64_t kLanes = kVectorBytes / 4;  // scores compared at once
constexpr int64_t kStep = 64;  // scores that one test dismisses; rows are whole steps
constexpr int64_t kTile = 1 << 13;  // scores that stay in the first cache for all relevant items
constexpr int64_t kGroup = 4;  // relevant items that share one load of a score
constexpr int64_t kTasksPerThread = 8;
using OutPred = Out<bool>;
using OutU32 = Out<uint32_t>;
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

// ---- one user's scores --------------------------------------------------------------------------

// Ragged rows of items, ascending; row u is indices[offsets[u], offsets[u + 1]).
struct Rows {
  const int32_t *offsets, *indices;
  Rows(const S32& offsets, const S32& indices)
      : offsets(offsets.data()), indices(indices.data()) {}
  const int32_t* begin(int32_t user) const { return indices + offsets[user]; }
  const int32_t* end(int32_t user) const { return indices + offsets[user + 1]; }
};

int64_t Padded(int64_t n) { return (n + kStep - 1) / kStep * kStep; }

// Copies n scores, with 0.0 for -0.0, and -inf up to a whole step. Returns whether all are finite.
bool CopyFinite(const float* from, int64_t n, float* to) {
  Ints worst{};
  int64_t i = 0;
  const auto take = [&](Floats x) {
    const Ints size = (Ints)x & 0x7fffffff;
    worst |= size >= 0x7f800000;  // infinity, or a NaN
    Store(to + i, x + 0.0f);
  };
  for (; i + kLanes <= n; i += kLanes) take(Load(from + i));
  if (i < n) {
    Floats x{};
    std::memcpy(&x, from + i, (n - i) * sizeof(float));
    take(x);
  }
  std::fill(to + n, to + Padded(n), -kInf);
  return Sum(worst) == 0;
}

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

// Collects what is above the bar, and once the room is full keeps the K best and raises the bar:
// a few hundred scores of a row are looked at twice, whatever K; all of them are, at a constant
// cost each, if the row ascends.
class Best {
 public:
  explicit Best(int64_t k)
      : k_(k), room_(2 * k + 4 * kStep), keys_(new uint64_t[room_ + kStep]) {}

  // The items and scores of the K best above -inf, then -1 and -inf.
  void Of(const float* row, int64_t padded, int32_t* items, float* scores) {
    size_ = 0;
    bar_ = -kInf;
    for (int64_t i = 0; i < padded; i += kStep) {
      for (uint64_t bits = Above(row + i, bar_); bits != 0; bits &= bits - 1) {
        const int64_t item = i + __builtin_ctzll(bits);
        keys_[size_++] = Key(row[item], item);
      }
      if (size_ > room_) Keep();
    }
    if (size_ > k_) Keep();
    std::sort(keys_.get(), keys_.get() + size_, std::greater<uint64_t>());
    for (int64_t i = 0; i < k_; ++i) {
      items[i] = i < size_ ? ItemOf(keys_[i]) : -1;
      scores[i] = i < size_ ? ScoreOf(keys_[i]) : -kInf;
    }
  }

 private:
  void Keep() {
    uint64_t* keys = keys_.get();
    std::nth_element(keys, keys + k_ - 1, keys + size_, std::greater<uint64_t>());
    size_ = k_;
    bar_ = ScoreOf(keys[k_ - 1]);  // later items with this very score come after
  }

  const int64_t k_, room_;
  int64_t size_ = 0;
  float bar_ = -kInf;
  std::unique_ptr<uint64_t[]> keys_;
};

// ---- places of relevant items -------------------------------------------------------------------

// Adds how many of x [n], whole steps, are above and at each of kGroup bars.
void CountAll(const float* x, int64_t n, const float* bars, int32_t* greater, int32_t* equal) {
  Floats bar[kGroup];
  Ints above[kGroup] = {}, at[kGroup] = {};
  for (int64_t g = 0; g < kGroup; ++g) bar[g] = All(bars[g]);
  for (int64_t i = 0; i < n; i += kLanes) {
    const Floats score = Load(x + i);
#pragma GCC unroll 4
    for (int64_t g = 0; g < kGroup; ++g) {
      CountGreater(score, bar[g], &above[g]);
      CountEqual(score, bar[g], &at[g]);
    }
  }
  for (int64_t g = 0; g < kGroup; ++g) {
    greater[g] += Sum(above[g]);
    equal[g] += Sum(at[g]);
  }
}

int32_t CountEqualBefore(const float* x, int64_t n, float bar) {
  Ints sums{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) CountEqual(Load(x + i), All(bar), &sums);
  int32_t count = Sum(sums);
  for (; i < n; ++i) count += x[i] == bar;
  return count;
}

// The places of a user's relevant items in a masked row; nothing for those that are masked.
class Places {
 public:
  explicit Places(int64_t width)
      : room_((width + kGroup - 1) / kGroup * kGroup),
        bars_(new float[room_]),
        counts_(new int32_t[2 * room_]) {}

  void Of(const float* row, int64_t padded, const int32_t* items, int64_t n, float* score,
          int32_t* greater, int32_t* tied, int32_t* before) {
    float* bars = bars_.get();
    int32_t *above = counts_.get(), *equal = above + room_;
    const int64_t groups = (n + kGroup - 1) / kGroup * kGroup;
    for (int64_t p = 0; p < n; ++p) bars[p] = row[items[p]];
    std::fill(bars + n, bars + groups, kInf);
    std::fill(above, above + 2 * room_, 0);
    for (int64_t begin = 0; begin < padded; begin += kTile) {
      const int64_t size = std::min(kTile, padded - begin);
      for (int64_t g = 0; g < groups; g += kGroup) {
        CountAll(row + begin, size, bars + g, above + g, equal + g);
      }
    }
    for (int64_t p = 0; p < n; ++p) {
      const bool masked = bars[p] == -kInf;
      score[p] = bars[p];
      greater[p] = masked ? 0 : above[p];
      tied[p] = masked ? 0 : equal[p] - 1;
      before[p] = tied[p] > 0 ? CountEqualBefore(row, items[p], bars[p]) : 0;
    }
  }

 private:
  const int64_t room_;
  std::unique_ptr<float[]> bars_;
  std::unique_ptr<int32_t[]> counts_;
};

// Shares the rows of a chunk out: task(begin, end) for ranges of them.
template <typename Task>
void EachRange(const ThreadPool& pool, int64_t rows, int64_t work, const Task& task) {
  const int64_t most = kTasksPerThread * std::max<int64_t>(1, pool.num_threads());
  const int64_t size = (rows + most - 1) / most, tasks = (rows + size - 1) / size;
  Parallel(pool, tasks, work,
           [&](int64_t i) { task(i * size, std::min(rows, (i + 1) * size)); });
}

static void RankRows(ThreadPool pool, F32 scores, S32 users, S32 seen_offsets,
                     S32 seen_indices, S32 relevant_offsets, S32 relevant_indices,
                     OutPred bad, OutF32 score, OutS32 greater, OutS32 tied, OutS32 before,
                     OutS32 top_items, OutF32 top_scores) {
  const int64_t n = users.count();
  const int64_t n_items = scores.size(1), padded = Padded(n_items);
  const int64_t width = score.size(1), k = top_items.size(1);
  const Rows seen(seen_offsets, seen_indices), relevant(relevant_offsets, relevant_indices);
  bool* refused = bad.data();
  EachRange(pool, n, n * n_items, [&](int64_t begin, int64_t end) {
    std::unique_ptr<float[]> row(new float[padded]);
    Best best(k);
    Places places(width);
    for (int64_t r = begin; r < end; ++r) {
      const int32_t user = users.data()[r];
      int32_t* items = top_items.data() + r * k;
      float* values = top_scores.data() + r * k;
      float* found = score.data() + r * width;
      int32_t* counts[] = {greater.data() + r * width, tied.data() + r * width,
                           before.data() + r * width};
      refused[r] = user >= 0 && !CopyFinite(scores.data() + r * n_items, n_items, row.get());
      const bool ranked = user >= 0 && !refused[r];
      const int64_t wanted =
          ranked && width ? std::min<int64_t>(relevant.end(user) - relevant.begin(user), width) : 0;
      std::fill(found + wanted, found + width, 0.0f);
      for (int32_t* count : counts) std::fill(count + wanted, count + width, 0);
      if (!ranked) {
        std::fill(items, items + k, -1);
        std::fill(values, values + k, -kInf);
        continue;
      }
      for (const int32_t* s = seen.begin(user); s < seen.end(user); ++s) row[*s] = -kInf;
      if (wanted) {
        places.Of(row.get(), padded, relevant.begin(user), wanted, found, counts[0], counts[1],
                  counts[2]);
      }
      if (k) best.Of(row.get(), padded, items, values);
    }
  });
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

static void PoolRows(ThreadPool pool, F32 scores, S32 users, S32 seen_offsets,
                     S32 seen_indices, S32 relevant_offsets, S32 relevant_indices,
                     F32 pool_scores, S32 above2, S32 ties, S32 base, F32 low, F32 scale,
                     S32 steps, OutU32 totals) {
  const int64_t n = users.count();
  const int64_t n_items = scores.size(1), padded = Padded(n_items);
  const Rows seen(seen_offsets, seen_indices), relevant(relevant_offsets, relevant_indices);
  const Pool all{pool_scores.data(),
                 above2.data(),
                 ties.data(),
                 base.data(),
                 static_cast<int64_t>(base.count()),
                 static_cast<int64_t>(pool_scores.count()),
                 low.data()[0],
                 scale.data()[0],
                 steps.data()[0]};
  EachRange(pool, n, n * n_items, [&](int64_t begin, int64_t end) {
    std::unique_ptr<float[]> row(new float[padded]);
    for (int64_t r = begin; r < end; ++r) {
      const int32_t user = users.data()[r];
      uint64_t total = 0;
      if (user >= 0 && CopyFinite(scores.data() + r * n_items, n_items, row.get())) {
        // +inf has no pair above it and none beside it.
        for (const int32_t* s = seen.begin(user); s < seen.end(user); ++s) row[*s] = kInf;
        for (const int32_t* s = relevant.begin(user); s < relevant.end(user); ++s) row[*s] = kInf;
        std::fill(row.get() + n_items, row.get() + padded, kInf);
        for (int64_t i = 0; i < padded; i += kStep) total += all.Count(row.get() + i);
      }
      totals.data()[2 * r] = static_cast<uint32_t>(total);
      totals.data()[2 * r + 1] = static_cast<uint32_t>(total >> 32);
    }
  });
}

}  // namespace
}  // namespace slgr

using namespace slgr;

SLGR_KERNEL(slgr_rank_rows, RankRows)
SLGR_KERNEL(slgr_pool_rows, PoolRows)
