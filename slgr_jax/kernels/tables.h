// Packed rows of a table, which of them a call touches, and their update rules. The columns of a table
// are cut into blocks of kBlock, each worked on by one thread (see rows.h).

#ifndef SLGR_JAX_KERNELS_TABLES_H_
#define SLGR_JAX_KERNELS_TABLES_H_

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "block.h"
#include "common.h"

namespace slgr {
namespace {

constexpr int64_t kAhead = 12;  // lanes between a prefetch and its use

int64_t Blocks(int64_t width) { return (width + kBlock - 1) / kBlock; }

// A table [rows, stride] of which the columns [0, width) are values and the others slots, laid out
// as `RowFormat` of embedding_table.py says: a Lane is a float, or half of one (uint16_t), where a
// value is its upper half and is rounded stochastically when it is written. `words` key that
// rounding.
template <typename Lane>
struct Table {
  static constexpr bool kHalves = std::is_same_v<Lane, uint16_t>;
  Lane* data;
  int64_t stride, width;
  const uint32_t* words;

  Lane* row(int64_t id) const { return data + id * stride; }

  // From a slot's first lane to its second.
  int64_t lower() const { return (stride - width) / 2; }

  template <bool kFull>
  void Write(int64_t id, int64_t begin, Block values, int64_t size) const {
    if constexpr (kHalves) {
      StoreUpper<kFull>(row(id) + begin, values, Noise(words, id, begin), size);
    } else {
      Store<kFull>(row(id) + begin, values, size);
    }
  }

  // Slots [at, at + size) of a row.
  template <bool kFull>
  Block Slots(const Lane* row, int64_t at, int64_t size) const {
    if constexpr (kHalves) {
      return LoadHalves<kFull>(row + width + at, row + width + at + lower(), size);
    } else {
      return Load<kFull>(row + width + at, size);
    }
  }
  template <bool kFull>
  void WriteSlots(Lane* row, int64_t at, Block slots, int64_t size) const {
    if constexpr (kHalves) {
      StoreHalves<kFull>(row + width + at, row + width + at + lower(), slots, size);
    } else {
      Store<kFull>(row + width + at, slots, size);
    }
  }
  SLGR_PREFETCHES void PrefetchSlots(const Lane* row) const {
    Prefetch(row + width);
    if (kHalves) Prefetch(row + width + lower());
  }
  // One slot of a row after `more` was added to it.
  float Grow(Lane* row, int64_t at, float more) const {
    float slot[kBlock];
    Store<true>(slot, Slots<false>(row, at, 1), kBlock);
    slot[0] += more;
    WriteSlots<false>(row, at, Load<true>(slot, kBlock), 1);
    return slot[0];
  }
};

// Calls f(whether the block is full, its first column, its columns).
template <typename F>
void OnBlock(int64_t block, int64_t width, const F& f) {
  const int64_t begin = block * kBlock, size = std::min(kBlock, width - begin);
  if (size == kBlock) {
    f(std::true_type{}, begin, size);
  } else {
    f(std::false_type{}, begin, size);
  }
}

// ---- distinct rows ----------------------------------------------------------------------------

// lane_row[lane] = number of the lane's row among the distinct ones, in order of appearance;
// ids_of[number] = its id, times[number] = its lanes (kRuns: how often it follows another row, as
// lanes that follow each other are worked on together). `slot` has an entry per table row and needs
// no clearing: what this call writes there is counted from a number that no call before it had.
// Returns how many are distinct. Whether a row is new is random, so nothing branches on it.
template <bool kRuns>
int64_t Distinct(const int32_t* ids, int64_t n, int32_t* slot, int32_t* lane_row, int32_t* ids_of,
                 int32_t* times) {
  static std::atomic<uint32_t> calls{1};
  const uint32_t first = calls.fetch_add(static_cast<uint32_t>(n));
  uint32_t found = 0;
  for (int64_t lane = 0; lane < n; ++lane) {
    if (lane + 2 * kAhead < n) __builtin_prefetch(slot + ids[lane + 2 * kAhead], 1);
    const int32_t id = ids[lane];
    if (kRuns && lane > 0 && id == ids[lane - 1]) {
      lane_row[lane] = lane_row[lane - 1];
      continue;
    }
    const uint32_t held = static_cast<uint32_t>(slot[id]) - first;
    uint32_t known = -static_cast<uint32_t>(held < found);
    // After 2^32 lanes an old entry may look like one of this call; its id tells.
    if (__builtin_expect((known & (ids_of[held & known] ^ id)) != 0, 0)) known = 0;
    const uint32_t number = (held & known) | (found & ~known);
    slot[id] = static_cast<int32_t>(first + number);
    ids_of[number] = id;
    times[number] = (times[number] & known) + 1;
    lane_row[lane] = static_cast<int32_t>(number);
    found += 1 + known;
  }
  return found;
}

// Of what `Distinct` found keeps the rows of more than one lane: their ids in `ids_of`, and for each
// number in `times` the new one, 0, 1, ..., or -1 for a row of one lane. Returns how many are kept.
int64_t Repeated(int64_t found, int32_t* ids_of, int32_t* times) {
  int32_t kept = 0;
  for (int64_t k = 0; k < found; ++k) {
    const bool repeated = times[k] > 1;
    ids_of[kept] = ids_of[k];
    times[k] = repeated ? kept : -1;
    kept += repeated;
  }
  return kept;
}

// As `Repeated`, of a rule that needs every row's whole gradient: nothing is left out.
int64_t All(int64_t found, int32_t* times) {
  for (int64_t k = 0; k < found; ++k) times[k] = static_cast<int32_t>(k);
  return found;
}

// ---- row optimisers ---------------------------------------------------------------------------

enum Kind : int64_t { kSgd = 0, kAdagrad = 1, kRowwiseAdagrad = 2, kLazyAdam = 3 };

// The touched rows of one table. `grad` [blocks, room, kBlock] holds the sums of their gradients,
// `scale` [2, room] what a rule needs once a row.
template <typename Lane>
struct Touched {
  Table<Lane> table;
  int64_t count, room;
  const int32_t* ids;
  float *grad, *scale;

  float* sums(int64_t block) const { return grad + block * room * kBlock; }
  void Clear(int64_t block) const {
    std::memset(sums(block), 0, count * kBlock * sizeof(float));
  }
};

// The update rules of row_optimizers.py, on rows [values | slots].
struct Optimizer {
  int64_t kind;
  float lr, eps, b1, b2;

  // Whether a rule needs a row's whole gradient, or a slot that the row has once.
  bool per_row() const { return kind == kRowwiseAdagrad || kind == kLazyAdam; }

  // Before any block is applied: the slots and scales that a row has once.
  template <typename Lane>
  void PerRow(const Touched<Lane>& t) const {
    const int64_t width = t.table.width;
    for (int64_t k = 0; k < t.count; ++k) {
      Lane* row = t.table.row(t.ids[k]);
      if (kind == kRowwiseAdagrad) {
        float squares = 0.0f;
        for (int64_t block = 0; block < Blocks(width); ++block) {
          const Block g = Load<true>(t.sums(block) + k * kBlock, kBlock);
          squares += Sum(g * g);
        }
        const float slot = t.table.Grow(row, 0, squares / static_cast<float>(width));
        t.scale[k] = lr / std::sqrt(slot + eps);
      } else {
        const double count = t.table.Grow(row, 2 * width, 1.0f);
        t.scale[k] = b1 > 0 ? -1.0 / std::expm1(count * std::log(b1)) : 1.0;
        t.scale[t.room + k] = b2 > 0 ? -1.0 / std::expm1(count * std::log(b2)) : 1.0;
      }
    }
  }

  // A block of a row and its gradient, of rules that need no more than that.
  template <bool kFull, typename Lane>
  SLGR_INLINE void Direct(const Table<Lane>& table, int64_t id, int64_t begin, int64_t size, Block value,
              Block g) const {
    if (kind == kSgd) {
      value = value - lr * g;
    } else {
      Lane* const row = table.row(id);
      const Block slot = table.template Slots<kFull>(row, begin, size) + g * g;
      table.template WriteSlots<kFull>(row, begin, slot, size);
      value = value - lr * g * InverseRoot(slot + eps);
    }
    table.template Write<kFull>(id, begin, value, size);
  }

  template <bool kFull, typename Lane>
  void Columns(const Touched<Lane>& t, int64_t block, int64_t begin, int64_t size) const {
    const float* grads = t.sums(block);
    const Table<Lane>& table = t.table;
    for (int64_t k = 0; k < t.count; ++k) {
      if (k + kAhead < t.count) {
        const Lane* next = table.row(t.ids[k + kAhead]) + begin;
        Prefetch(next);
        if (kind == kAdagrad) table.PrefetchSlots(next);
      }
      const Block g = Load<true>(grads + k * kBlock, kBlock);
      const int64_t id = t.ids[k];
      Lane* row = table.row(id);
      Block value = Load<kFull>(row + begin, size);
      if (!per_row()) {
        Direct<kFull>(table, id, begin, size, value, g);
        continue;
      }
      if (kind == kRowwiseAdagrad) {
        value = value - t.scale[k] * g;
      } else {
        const int64_t second = table.width + begin;
        const Block m = b1 * table.template Slots<kFull>(row, begin, size) + (1.0f - b1) * g;
        const Block v = b2 * table.template Slots<kFull>(row, second, size) + (1.0f - b2) * (g * g);
        table.template WriteSlots<kFull>(row, begin, m, size);
        table.template WriteSlots<kFull>(row, second, v, size);
        const Block root = Root(t.scale[t.room + k] * v);
        const Block step = t.scale[k] * m;
        value = value - lr * (step / (root + eps));
      }
      table.template Write<kFull>(id, begin, value, size);
    }
  }

  template <typename Lane>
  void Apply(const Touched<Lane>& t, int64_t block) const {
    OnBlock(block, t.table.width, [&](auto full, int64_t begin, int64_t size) {
      Columns<decltype(full)::value>(t, block, begin, size);
    });
  }
};

// Sums the gradients of all tables, block by block with `add` (which clears the sums it adds to),
// and applies the optimiser.
template <typename Add, typename... T>
void Update(const ThreadPool& pool, const Optimizer& optimizer, int64_t work, const Add& add,
            const T&... touched) {
  const int64_t blocks = Blocks(std::get<0>(std::tie(touched...)).table.width);
  Parallel(pool, blocks, work, [&](int64_t block) {
    add(block);
    if (!optimizer.per_row()) (optimizer.Apply(touched, block), ...);
  });
  if (!optimizer.per_row()) return;
  (optimizer.PerRow(touched), ...);
  Parallel(pool, blocks, work,
           [&](int64_t block) { (optimizer.Apply(touched, block), ...); });
}

}  // namespace
}  // namespace slgr

#endif  // SLGR_JAX_KERNELS_TABLES_H_
