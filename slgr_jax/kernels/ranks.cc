// CPU kernels of full ranking, called by XLA (see ranks.py for what each one computes).
//
// Why they exist: XLA compares one relevant item of every user of a chunk at a time, so the
// chunk's scores pass through memory once per item, and its top_k orders whole rows. Here one
// thread ranks one user, of a matrix of scores or of the product of vectors while it is computed.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "common.h"
#include "products.h"
#include "ranks.h"

namespace slgr {
namespace {

constexpr int64_t kTile = 1 << 13;  // scores that stay in the first cache for all relevant items
constexpr int64_t kTasksPerThread = 8;
constexpr int64_t kUsersPerTask = 11 * kRowsAtOnce;  // of products: they read all items together
constexpr int64_t kKeysPerTask = 1 << 19;  // of the best of its users
using OutPred = Out<bool>;
using OutU32 = Out<uint32_t>;

// Copies n scores, with 0.0 for -0.0. Returns whether all are finite.
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
  return Sum(worst) == 0;
}

// take(x, begin, size) for pieces of a row of scores, in order. Returns whether all are finite.
template <typename Take>
bool EachPiece(const float* row, int64_t n, float* room, const Take& take) {
  bool finite = true;
  for (int64_t begin = 0; begin < n; begin += kTile) {
    const int64_t size = std::min(kTile, n - begin);
    finite = CopyFinite(row + begin, size, room) && finite;
    take(room, begin, size);
  }
  return finite;
}

// Shares the rows of a chunk out, a multiple of `some` at a time: task(begin, end) for ranges of them.
template <typename Task>
void EachRange(const ThreadPool& pool, int64_t rows, int64_t some, int64_t work,
               const Task& task) {
  const int64_t most = kTasksPerThread * std::max<int64_t>(1, pool.num_threads()) * some;
  const int64_t size = (rows + most - 1) / most * some;
  const int64_t tasks = (rows + size - 1) / size;
  Parallel(pool, tasks, work,
           [&](int64_t i) { task(i * size, std::min(rows, (i + 1) * size)); });
}

// Those of the rows [begin, end) that are a user's.
std::vector<int32_t> Asking(const S32& users, int64_t begin, int64_t end) {
  std::vector<int32_t> rows;
  for (int64_t r = begin; r < end; ++r) {
    if (users.data()[r] >= 0) rows.push_back(static_cast<int32_t>(r));
  }
  return rows;
}

Ranked RankedOf(OutPred bad, OutF32 score, OutS32 greater, OutS32 tied, OutS32 before,
                OutS32 top_items, OutF32 top_scores) {
  return {bad.data(),     score.data(),      greater.data(),    tied.data(),      before.data(),
          score.size(1),  top_items.data(),  top_scores.data(), top_items.size(1)};
}

static void RankRows(ThreadPool pool, F32 scores, S32 users, S32 seen_offsets,
                     S32 seen_indices, S32 relevant_offsets, S32 relevant_indices,
                     OutPred bad, OutF32 score, OutS32 greater, OutS32 tied, OutS32 before,
                     OutS32 top_items, OutF32 top_scores) {
  const int64_t n = users.count(), n_items = scores.size(1);
  const Rows seen(seen_offsets, seen_indices), relevant(relevant_offsets, relevant_indices);
  const Ranked out = RankedOf(bad, score, greater, tied, before, top_items, top_scores);
  EachRange(pool, n, 1, n * n_items, [&](int64_t begin, int64_t end) {
    std::unique_ptr<float[]> room(new float[std::min(kTile, Padded(n_items))]);
    std::unique_ptr<uint64_t[]> keys(new uint64_t[Best::Room(out.k)]);
    RankedRow row;
    for (int64_t r = begin; r < end; ++r) {
      const int32_t user = users.data()[r];
      if (user < 0) {
        RankNobody(out, r);
        continue;
      }
      const float* from = scores.data() + r * n_items;
      row.Begin(out, r, seen.Of(user), relevant.Of(user), keys.get());
      for (int64_t p = 0; p < row.relevant().size(); ++p) {
        row.score()[p] = from[row.relevant().next[p]] + 0.0f;
      }
      row.MaskRelevant();
      const bool finite = EachPiece(
          from, n_items, room.get(),
          [&](float* x, int64_t first, int64_t size) { row.Take(x, first, size, out.k); });
      row.End(out, r, !finite);
    }
  });
}

static void RankProducts(ThreadPool pool, F32 queries, F32 items, F32 panels, F32 greatest, S32 users, S32 seen_offsets,
                         S32 seen_indices, S32 relevant_offsets, S32 relevant_indices,
                         OutPred bad, OutF32 score, OutS32 greater, OutS32 tied, OutS32 before,
                         OutS32 top_items, OutF32 top_scores) {
  const int64_t n = users.count(), work = n * items.count();
  const Rows seen(seen_offsets, seen_indices), relevant(relevant_offsets, relevant_indices);
  const Ranked out = RankedOf(bad, score, greater, tied, before, top_items, top_scores);
  EachRange(pool, n, kUsersPerTask, work, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (users.data()[r] < 0) RankNobody(out, r);
    }
    const std::vector<int32_t> asking = Asking(users, begin, end);
    const int64_t room = Best::Room(out.k);
    const int64_t most = out.k ? std::max(kRowsAtOnce, kKeysPerTask / room) : end - begin;
    const int64_t at_once = std::min<int64_t>(most, asking.size());
    std::unique_ptr<RankedRow[]> rows(new RankedRow[at_once]);
    std::unique_ptr<uint64_t[]> keys(new uint64_t[out.k ? at_once * room : 0]);
    std::unique_ptr<bool[]> finite(new bool[at_once]);
    Products products(queries, items, panels, greatest);
    for (size_t first = 0; first < asking.size(); first += at_once) {
      const int32_t* const numbers = asking.data() + first;
      const int64_t some = std::min<int64_t>(at_once, asking.size() - first);
      for (int64_t i = 0; i < some; ++i) {
        const int32_t user = users.data()[numbers[i]];
        uint64_t* const own_keys = keys.get() + (out.k ? i * room : 0);
        rows[i].Begin(out, numbers[i], seen.Of(user), relevant.Of(user), own_keys);
        const Items wanted = rows[i].relevant();
        products.Of(numbers[i], wanted.next, wanted.size(), rows[i].score());
        rows[i].MaskRelevant();
      }
      products.Each(numbers, some, finite.get(),
                    [&](int64_t i, float* x, int64_t begin, int64_t size) {
                      rows[i].Take(x, begin, size, out.k);
                    });
      for (int64_t i = 0; i < some; ++i) rows[i].End(out, numbers[i], !finite[i]);
    }
  });
}

Pool PoolOf(F32 scores, S32 above2, S32 ties, S32 base, F32 low, F32 scale, S32 steps) {
  return {scores.data(), above2.data(),  ties.data(),    base.data(),    base.count(),
          scores.count(), low.data()[0], scale.data()[0], steps.data()[0]};
}

// The low and high words of a row's sum.
void Write(uint64_t total, uint32_t* words) {
  words[0] = static_cast<uint32_t>(total);
  words[1] = static_cast<uint32_t>(total >> 32);
}

static void PoolRows(ThreadPool pool, F32 scores, S32 users, S32 seen_offsets,
                     S32 seen_indices, S32 relevant_offsets, S32 relevant_indices,
                     F32 pool_scores, S32 above2, S32 ties, S32 base, F32 low, F32 scale,
                     S32 steps, OutU32 totals) {
  const int64_t n = users.count(), n_items = scores.size(1);
  const Rows seen(seen_offsets, seen_indices), relevant(relevant_offsets, relevant_indices);
  const Pool all = PoolOf(pool_scores, above2, ties, base, low, scale, steps);
  EachRange(pool, n, 1, n * n_items, [&](int64_t begin, int64_t end) {
    std::unique_ptr<float[]> room(new float[std::min(kTile, Padded(n_items))]);
    for (int64_t r = begin; r < end; ++r) {
      const int32_t user = users.data()[r];
      uint64_t total = 0;
      if (user >= 0) {
        PooledRow row{seen.Of(user), relevant.Of(user)};
        const bool finite = EachPiece(
            scores.data() + r * n_items, n_items, room.get(),
            [&](float* x, int64_t first, int64_t size) { row.Take(all, x, first, size); });
        total = finite ? row.total : 0;
      }
      Write(total, totals.data() + 2 * r);
    }
  });
}

static void PoolProducts(ThreadPool pool, F32 queries, F32 items, F32 panels, F32 greatest, S32 users, S32 seen_offsets,
                         S32 seen_indices, S32 relevant_offsets, S32 relevant_indices,
                         F32 pool_scores, S32 above2, S32 ties, S32 base, F32 low, F32 scale,
                         S32 steps, OutU32 totals) {
  const int64_t n = users.count(), work = n * items.count();
  const Rows seen(seen_offsets, seen_indices), relevant(relevant_offsets, relevant_indices);
  const Pool all = PoolOf(pool_scores, above2, ties, base, low, scale, steps);
  EachRange(pool, n, kUsersPerTask, work, [&](int64_t begin, int64_t end) {
    std::fill_n(totals.data() + 2 * begin, 2 * (end - begin), 0u);
    const std::vector<int32_t> asking = Asking(users, begin, end);
    std::vector<PooledRow> rows;
    for (const int32_t r : asking) {
      rows.push_back({seen.Of(users.data()[r]), relevant.Of(users.data()[r])});
    }
    std::unique_ptr<bool[]> finite(new bool[asking.size()]);
    Products(queries, items, panels, greatest)
        .Each(asking.data(), asking.size(), finite.get(),
              [&](int64_t i, float* x, int64_t first, int64_t size) {
                rows[i].Take(all, x, first, size);
              });
    for (size_t i = 0; i < asking.size(); ++i) {
      Write(finite[i] ? rows[i].total : 0, totals.data() + 2 * asking[i]);
    }
  });
}

}  // namespace
}  // namespace slgr

using namespace slgr;

SLGR_KERNEL(slgr_rank_rows, RankRows)
SLGR_KERNEL(slgr_rank_products, RankProducts)
SLGR_KERNEL(slgr_pool_rows, PoolRows)
SLGR_KERNEL(slgr_pool_products, PoolProducts)
