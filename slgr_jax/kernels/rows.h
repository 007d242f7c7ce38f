// CPU kernels of the train step, called by XLA (see cpu.py for what each one computes), for tables of
// one type: rows_float32.cc, rows_bfloat16.cc.
//
// Why they exist: XLA's CPU backend writes every gathered row and every row gradient to memory
// and moves them between cores; for rows of a few hundred bytes that is most of a step. Here a
// row is read, used and written by one core: the columns of all tables are cut into blocks of
// kBlock, and a block is one task. A block meets the others in the sums over columns alone,
// which are added in block order: results do not depend on the number of threads.

#ifndef SLGR_JAX_KERNELS_ROWS_H_
#define SLGR_JAX_KERNELS_ROWS_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "block.h"
#include "common.h"
#include "tables.h"

namespace slgr {
namespace {

// As kAhead, of users: one has some lanes in a row, so theirs is further.
constexpr int64_t kUsersAhead = 48;

// (users [N], items [N, C]) of a call, and the two tables they are rows of.
template <typename Lane>
struct Lanes {
  Table<Lane> user, item;
  const int32_t *users, *items;
  int64_t n, c;

  // Fetches what a lane to come will read: its items' rows, and of the one kUsersAhead further
  // its user's, where that is not the user of the lane before.
  SLGR_PREFETCHES void PrefetchAfter(int64_t lane, int64_t begin) const {
    const int64_t far = lane + kUsersAhead;
    if (far < n && users[far] != users[far - 1]) Prefetch(user.row(users[far]) + begin);
    lane += kAhead;
    if (lane >= n) return;
    for (int64_t k = 0; k < c; ++k) Prefetch(item.row(items[lane * c + k]) + begin);
  }
};

// ---- scores of factor models ----------------------------------------------------------------

// out [N, C + 2]: this block's part of the scores, of |p|^2 and of sum_c |q_c|^2. With `kBias` the
// user's last column counts as 1 in the scores.
template <bool kFull, bool kBias, typename Lane>
void BlockScores(const Lanes<Lane>& in, int64_t begin, int64_t size, float* out) {
  const Mask bias(size - 1);
  for (int64_t lane = 0; lane < in.n;) {
    const int32_t user = in.users[lane];
    const Block p = Load<kFull>(in.user.row(user) + begin, size);
    const Block unit = kBias ? bias.Put(p, 1.0f) : p;
    const float squared = Sum(p * p);
    do {
      in.PrefetchAfter(lane, begin);
      const int32_t* items = in.items + lane * in.c;
      float* o = out + lane * (in.c + 2);
      if (in.c == 2) {
        const Block a = Load<kFull>(in.item.row(items[0]) + begin, size);
        const Block b = Load<kFull>(in.item.row(items[1]) + begin, size);
        V4 sums = Sums(unit * a, unit * b, a * a + b * b);
        sums[2] = squared;
        std::memcpy(o, &sums, sizeof sums);
        continue;
      }
      float squares = 0.0f;
      for (int64_t k = 0; k < in.c; ++k) {
        const Block q = Load<kFull>(in.item.row(items[k]) + begin, size);
        o[k] = Sum(unit * q);
        squares += Sum(q * q);
      }
      o[in.c] = squared;
      o[in.c + 1] = squares;
    } while (++lane < in.n && in.users[lane] == user);
  }
}

// The blocks' parts [blocks, N, C + 2] of scores [N, C] and squares [N, 2], added; `totals` [2] are
// the sums of the squares over lanes.
void AddParts(const float* part, int64_t n, int64_t c, int64_t blocks, float* scores,
              float* squares, float* totals) {
  const int64_t out = c + 2;
  totals[0] = totals[1] = 0.0f;
  if (c == 2) {
    V4 total{};
    for (int64_t lane = 0; lane < n; ++lane) {
      V4 sum;
      std::memcpy(&sum, part + lane * 4, sizeof sum);
      for (int64_t block = 1; block < blocks; ++block) {
        V4 more;
        std::memcpy(&more, part + (block * n + lane) * 4, sizeof more);
        sum += more;
      }
      total += sum;
      const float four[] = {sum[0], sum[1], sum[2], sum[3]};
      std::memcpy(scores + 2 * lane, four, 2 * sizeof(float));
      std::memcpy(squares + 2 * lane, four + 2, 2 * sizeof(float));
    }
    totals[0] = total[2], totals[1] = total[3];
    return;
  }
  for (int64_t lane = 0; lane < n; ++lane) {
    for (int64_t k = 0; k < out; ++k) {
      float sum = 0.0f;
      for (int64_t block = 0; block < blocks; ++block) sum += part[(block * n + lane) * out + k];
      if (k < c) {
        scores[lane * c + k] = sum;
      } else {
        totals[k - c] += squares[2 * lane + k - c] = sum;
      }
    }
  }
}

// ---- gradients of factor models ---------------------------------------------------------------

// The rows of a table that lanes read: `row` [lanes] numbers them, `sum` [numbers] says which sum
// their gradient is added to; -1: none, one lane alone (of users one run of lanes) has the row.
struct Numbers {
  const int32_t *row, *sum;
  int32_t operator[](int64_t lane) const { return sum[row[lane]]; }
};

// Adds to the sums of each lane's rows, with p the user's row and q_c the items':
//   d/dp   = sum_c dscores_c q_c + 2 dsquares_0 p       (kBias: no score part in the last column)
//   d/dq_c = dscores_c p + 2 dsquares_1 q_c             (kBias: p counts as 1 in the last column)
// The items' sums are cleared, the users' need not be. A row that has no sum is updated at once:
// nothing else reads it.
template <bool kFull, bool kBias, typename Lane>
void BlockGrads(const Lanes<Lane>& in, const Optimizer& optimizer, Numbers users, Numbers items,
                const float* dscores, const float* dsquares, int64_t begin, int64_t size,
                float* user_sums, float* item_sums) {
  const Mask bias(size - 1);
  const bool slots = optimizer.kind == kAdagrad;
  int32_t fresh = 0;  // users' sums from here on hold nothing yet
  for (int64_t lane = 0; lane < in.n;) {
    const int32_t user = in.users[lane], number = users[lane];
    Lane* const own_row = in.user.row(user) + begin;
    float* const own_sum = user_sums + number * kBlock;
    const Block p = Load<kFull>(own_row, size), unit = kBias ? bias.Put(p, 1.0f) : p;
    if (slots && number < 0) in.user.PrefetchSlots(own_row);
    Block total{};
    if (number < fresh && number >= 0) total = Load<true>(own_sum, kBlock);
    fresh = std::max(fresh, number + 1);
    do {
      in.PrefetchAfter(lane, begin);
      for (int64_t k = 0; slots && lane + kAhead < in.n && k < in.c; ++k) {
        in.item.PrefetchSlots(in.item.row(in.items[(lane + kAhead) * in.c + k]) + begin);
      }
      const float own = 2.0f * dsquares[2 * lane], other = 2.0f * dsquares[2 * lane + 1];
      Block sum{};
      for (int64_t k = lane * in.c; k < (lane + 1) * in.c; ++k) {
        Lane* const row = in.item.row(in.items[k]) + begin;
        const Block q = Load<kFull>(row, size), g = dscores[k] * unit + other * q;
        sum = sum + dscores[k] * q;
        const int32_t at = items[k];
        if (kFull && !Table<Lane>::kHalves && optimizer.kind == kSgd) {
          // Whether a row has a sum is random: one instruction for both, without a branch.
          const intptr_t direct = at >> 31;
          float* const to = reinterpret_cast<float*>(
              (reinterpret_cast<intptr_t>(row) & direct) |
              (reinterpret_cast<intptr_t>(item_sums + at * kBlock) & ~direct));
          const float factors[] = {1.0f, -optimizer.lr};
          Store<true>(to, Load<true>(to, kBlock) + factors[-direct] * g, kBlock);
        } else if (at < 0) {
          optimizer.template Direct<kFull>(in.item, in.items[k], begin, size, q, g);
        } else {
          float* const to = item_sums + at * kBlock;
          Store<true>(to, Load<true>(to, kBlock) + g, kBlock);
        }
      }
      if (kBias) sum = bias.Put(sum, 0.0f);
      total = total + (sum + own * p);
    } while (++lane < in.n && in.users[lane] == user);
    if (number < 0) {
      optimizer.template Direct<kFull>(in.user, user, begin, size, p, total);
    } else {
      Store<true>(own_sum, total, kBlock);
    }
  }
}

// ---- kernels ----------------------------------------------------------------------------------

template <typename Lane>
Table<Lane> TableOf(Buffer<Lane> buffer, int64_t width, const uint32_t* words) {
  return {buffer.data(), buffer.size(1), width, words};
}

template <typename Lane>
Lanes<Lane> LanesOf(Table<Lane> user, Table<Lane> item, S32 users, S32 items) {
  const int64_t n = users.count();
  return {user, item, users.data(), items.data(), n, n ? items.count() / n : 0};
}

template <typename Lane>
void FactorScores(ThreadPool pool, Buffer<Lane> user, Buffer<Lane> item, S32 users, S32 items,
                  OutF32 scores, OutF32 squares, OutF32 totals, OutF32 parts, int64_t width,
                  bool bias) {
  const auto in =
      LanesOf(TableOf(user, width, nullptr), TableOf(item, width, nullptr), users, items);
  const int64_t blocks = Blocks(width), out = in.c + 2;
  float* part = parts.data();
  Parallel(pool, blocks, in.n * (1 + in.c) * width, [&](int64_t block) {
    OnBlock(block, width, [&](auto full, int64_t begin, int64_t size) {
      constexpr bool kFull = decltype(full)::value;
      const bool last = bias && block == blocks - 1;
      const auto run = last ? BlockScores<kFull, true, Lane> : BlockScores<kFull, false, Lane>;
      run(in, begin, size, part + block * in.n * out);
    });
  });
  AddParts(part, in.n, in.c, blocks, scores.data(), squares.data(), totals.data());
}

template <typename Lane>
void FactorUpdate(ThreadPool pool, Buffer<Lane>, Buffer<Lane>, S32, S32, S32 users, S32 items,
                  F32 dscores, F32 dsquares, U32 words, Out<Lane> user, Out<Lane> item,
                  OutS32 user_slot, OutS32 item_slot, OutF32 floats, OutS32 ints, int64_t width,
                  bool bias, int64_t kind, float lr, float eps, float b1, float b2) {
  const auto in = LanesOf(TableOf<Lane>(user, width, words.data()),
                          TableOf<Lane>(item, width, words.data() + 2), users, items);
  const int64_t n = in.n, m = in.n * in.c, blocks = Blocks(width);
  float* room = floats.data();
  float* item_room = room + n * (blocks * kBlock + 2);
  int32_t* user_row = ints.data();
  int32_t *item_row = user_row + n, *user_ids = item_row + m, *item_ids = user_ids + n;
  int32_t *item_times = item_ids + m, *user_times = item_times + m;
  const Optimizer optimizer{kind, lr, eps, b1, b2};
  int64_t n_users = 0, n_items = 0;
  const auto distinct = [&](auto runs, S32 ids, OutS32 slot, int32_t* row, int32_t* ids_of,
                            int32_t* times) {
    const int64_t found = Distinct<decltype(runs)::value>(ids.data(), ids.count(), slot.data(),
                                                          row, ids_of, times);
    return optimizer.per_row() ? All(found, times) : Repeated(found, ids_of, times);
  };
  Parallel(pool, 2, (n + m) * 16, [&](int64_t i) {
    if (i == 0) {
      n_users = distinct(std::true_type{}, users, user_slot, user_row, user_ids, user_times);
    } else {
      n_items = distinct(std::false_type{}, items, item_slot, item_row, item_ids, item_times);
    }
  });
  const Touched<Lane> of_users{in.user, n_users, n, user_ids, room, room + n * blocks * kBlock};
  const Touched<Lane> of_items{in.item,   n_items,   m,
                               item_ids,  item_room, item_room + m * blocks * kBlock};
  const auto add = [&](int64_t block) {
    OnBlock(block, width, [&](auto full, int64_t begin, int64_t size) {
      constexpr bool kFull = decltype(full)::value;
      of_items.Clear(block);
      const bool last = bias && block == blocks - 1;
      const auto run = last ? BlockGrads<kFull, true, Lane> : BlockGrads<kFull, false, Lane>;
      run(in, optimizer, {user_row, user_times}, {item_row, item_times}, dscores.data(),
          dsquares.data(), begin, size, of_users.sums(block), of_items.sums(block));
    });
  };
  Update(pool, optimizer, (n + m) * width, add, of_users, of_items);
}

template <typename Lane>
void RowUpdate(ThreadPool pool, Buffer<Lane>, S32, S32 ids, F32 grads, U32 words, Out<Lane> table,
               OutS32 slot, OutF32 floats, OutS32 ints, int64_t width, int64_t kind, float lr,
               float eps, float b1, float b2) {
  const int64_t n = ids.count(), blocks = Blocks(width);
  int32_t *lane_row = ints.data(), *ids_of = lane_row + n, *times = ids_of + n;
  const int64_t count =
      Distinct<false>(ids.data(), n, slot.data(), lane_row, ids_of, times);
  float* room = floats.data();
  const Touched<Lane> touched{TableOf<Lane>(table, width, words.data()),
                              count, n, ids_of, room, room + n * blocks * kBlock};
  const auto add = [&](int64_t block) {
    OnBlock(block, width, [&](auto full, int64_t begin, int64_t size) {
      constexpr bool kFull = decltype(full)::value;
      touched.Clear(block);
      float* sums = touched.sums(block);
      for (int64_t lane = 0; lane < n; ++lane) {
        float* to = sums + lane_row[lane] * kBlock;
        const Block g = Load<kFull>(grads.data() + lane * width + begin, size);
        Store<true>(to, Load<true>(to, kBlock) + g, kBlock);
      }
    });
  };
  Update(pool, Optimizer{kind, lr, eps, b1, b2}, n * width, add, touched);
}

}  // namespace
}  // namespace slgr

// Defines the three of them for tables of `Lane`, whose type Python calls `type`.
#define SLGR_ROW_KERNELS(Lane, type)                                                     \
  SLGR_KERNEL(slgr_factor_scores_##type, slgr::FactorScores<Lane>, "width", "bias")      \
  SLGR_KERNEL(slgr_factor_update_##type, slgr::FactorUpdate<Lane>, "width", "bias",      \
              "kind", "lr", "eps", "b1", "b2")                                           \
  SLGR_KERNEL(slgr_row_update_##type, slgr::RowUpdate<Lane>, "width", "kind", "lr",      \
              "eps", "b1", "b2")

#endif  // SLGR_JAX_KERNELS_ROWS_H_
