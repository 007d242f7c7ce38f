// CPU kernel of propagation on a bipartite graph, called by XLA (see graph.py for what it computes).
//
// Why it exists: XLA's CPU backend writes the row of every edge to memory and adds it from there
// with one thread. Here a thread reads a row's neighbours and adds them in registers.
//
// With S = diag(1 / sqrt(degree)), layers are E^(k+1) = S A S E^(k). Kept in memory is the scaled
// Y^(k) = S E^(k): a sum T = A Y^(k) gives both E^(k+1) = S T, which is added to the result, and
// Y^(k+1) = S S T; no edge is multiplied by anything. A row is summed by one thread in the order
// of its edges: results do not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common.h"
#include "vectors.h"

namespace slgr {
namespace {

constexpr int64_t kAhead = 12;     // edges between a prefetch and its use
constexpr int64_t kLane = 16;      // columns of a vector; rows of Y are whole vectors
constexpr int64_t kRowCost = 4;    // edges that cost as much as a row's own work
constexpr int64_t kTaskCost = 1 << 12;  // at least so many edges a task
constexpr int64_t kMostTasks = 256;
constexpr int64_t kMostVectors = 4;  // summed at once, in registers

// MurmurHash3's finaliser, as random_words.mixed.
inline uint32_t Mixed(uint32_t x) {
  x = (x ^ x >> 16) * 0x85EBCA6Bu;
  x = (x ^ x >> 13) * 0xC2B2AE35u;
  return x ^ x >> 16;
}

// One order of the edges: rows of one side, and for each the rows of the other that it sums.
struct Side {
  int64_t rows, edges;
  const int32_t *offsets, *columns;       // columns [edges]: rows of the other side
  const uint32_t *words, *column_words;   // of this side's rows, and of the other's
  const float* table;                     // E^(0) [rows, width]
  float *result;                          // [rows, width]
  float *scaled[2];                       // Y of this side, [rows, lanes] each, used by turns
  int32_t *kept, *kept_end;               // columns of the kept edges; where each row's end

  int64_t tasks() const {
    return std::clamp<int64_t>((edges + kRowCost * rows) / kTaskCost, 1, kMostTasks);
  }
  // The first row of a task: tasks have equal shares of edges and rows together.
  int64_t first(int64_t task) const {
    const int64_t share = (edges + kRowCost * rows) * task / tasks();
    int64_t low = 0, high = rows;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      (offsets[middle] + kRowCost * middle < share ? low = middle + 1 : high = middle);
    }
    return low;
  }
  float scale(int64_t row) const {
    const int64_t degree = offsets[row + 1] - offsets[row];
    return degree > 0 ? 1.0f / std::sqrt(static_cast<float>(degree)) : 0.0f;
  }
};

// Lists the kept edges of rows [begin, end), without gaps between the rows of a task. Whether an
// edge is kept is a function of its two words, whichever side asks.
void Keep(const Side& side, int64_t begin, int64_t end, uint32_t threshold) {
  int64_t to = side.offsets[begin];
  for (int64_t row = begin; row < end; ++row) {
    const uint32_t word = side.words[row];
    for (int64_t k = side.offsets[row]; k < side.offsets[row + 1]; ++k) {
      const int32_t column = side.columns[k];
      side.kept[to] = column;
      to += Mixed(word + side.column_words[column]) >= threshold;
    }
    side.kept_end[row] = static_cast<int32_t>(to);
  }
}

struct Layer {
  int64_t width, lanes;    // columns of a row; in whole vectors
  bool drops, first, last;
  float weight, share;     // of kept edges; of a layer in the mean
  int from;                // which of `scaled` is read; the other is written
};

// Sums kVectors vectors of columns from `column` on of the rows [begin, end) of `side`.
template <int kVectors>
void Sum(const Side& side, const float* other, const Layer& layer, int64_t begin, int64_t end,
         int64_t column) {
  const int32_t* edges = layer.drops ? side.kept : side.columns;
  const int32_t* ends = layer.drops ? side.kept_end : side.offsets + 1;
  const int64_t last = ends[end - 1], lanes = layer.lanes;
  const int64_t size = std::min(layer.width - column, kVectors * kLane);
  int64_t k = side.offsets[begin];
  for (int64_t row = begin; row < end; ++row) {
    V16 sum[kVectors] = {};
    for (; k < ends[row]; ++k) {
      if (k + kAhead < last) {
        const float* next = other + edges[k + kAhead] * lanes + column;
        for (int v = 0; v < kVectors; ++v) __builtin_prefetch(next + v * kLane);
      }
      const float* from = other + edges[k] * lanes + column;
      for (int v = 0; v < kVectors; ++v) {
        sum[v] = sum[v] + In<V16>::Read(from + v * kLane);
      }
    }
    const float scale = side.scale(row) * layer.weight;
    const float* before = (layer.first ? side.table : side.result) + row * layer.width + column;
    float total[kVectors * kLane] = {};
    std::memcpy(total, before, size * sizeof(float));
    float* next = side.scaled[1 - layer.from] + row * lanes + column;
    for (int v = 0; v < kVectors; ++v) {
      const V16 value = scale * sum[v];
      float* const to = total + v * kLane;
      In<V16>::Write(to, (In<V16>::Read(to) + value) * layer.share);
      if (!layer.last) In<V16>::Write(next + v * kLane, side.scale(row) * value);
    }
    std::memcpy(side.result + row * layer.width + column, total, size * sizeof(float));
  }
}

void SumRows(const Side& side, const float* other, const Layer& layer, int64_t begin, int64_t end) {
  if (begin == end) return;
  const auto run = [&](auto vectors, int64_t column) {
    Sum<decltype(vectors)::value>(side, other, layer, begin, end, column);
  };
  for (int64_t column = 0; column < layer.lanes; column += kMostVectors * kLane) {
    switch (std::min((layer.lanes - column) / kLane, kMostVectors)) {
      case 1: run(std::integral_constant<int, 1>{}, column); break;
      case 2: run(std::integral_constant<int, 2>{}, column); break;
      case 3: run(std::integral_constant<int, 3>{}, column); break;
      default: run(std::integral_constant<int, 4>{}, column);
    }
  }
}

}  // namespace

static void GraphPropagate(ThreadPool pool, F32 user_table, F32 item_table,
                           S32 user_offsets, S32 items, S32 item_offsets, S32 users,
                           U32 user_words, U32 item_words, OutF32 user, OutF32 item,
                           OutF32 floats, OutS32 ints, int64_t layers, bool drops,
                           int64_t threshold, float weight) {
  const int64_t width = user_table.size(1), n = items.count();
  const int64_t lanes = (width + kLane - 1) / kLane * kLane;
  const int64_t n_users = user_table.size(0), n_items = item_table.size(0);
  float* room = floats.data();
  float* item_room = room + 2 * n_users * lanes;
  int32_t* kept = ints.data();
  Side sides[2] = {
      {n_users, n, user_offsets.data(), items.data(), user_words.data(),
       item_words.data(), user_table.data(), user.data(),
       {room, room + n_users * lanes}, kept, kept + 2 * n},
      {n_items, n, item_offsets.data(), users.data(), item_words.data(),
       user_words.data(), item_table.data(), item.data(),
       {item_room, item_room + n_items * lanes}, kept + n, kept + 2 * n + n_users}};
  const int64_t cut = sides[0].tasks(), tasks = cut + sides[1].tasks();
  const auto over_rows = [&](const auto& work) {
    Parallel(pool, tasks, (2 * n + n_users + n_items) * width, [&](int64_t task) {
      const int which = task >= cut;
      const int64_t own = task - which * cut;
      work(sides[which], sides[1 - which], sides[which].first(own), sides[which].first(own + 1));
    });
  };
  over_rows([&](const Side& side, const Side&, int64_t begin, int64_t end) {
    if (drops && begin < end) Keep(side, begin, end, static_cast<uint32_t>(threshold));
    for (int64_t row = begin; row < end; ++row) {
      const float scale = side.scale(row);
      float* to = side.scaled[0] + row * lanes;
      for (int64_t c = 0; c < width; ++c) to[c] = scale * side.table[row * width + c];
      for (int64_t c = width; c < lanes; ++c) to[c] = 0.0f;
    }
  });
  for (int64_t k = 1; k <= layers; ++k) {
    const bool last = k == layers;
    const float share = last ? 1.0f / static_cast<float>(layers + 1) : 1.0f;
    const int from = (k - 1) % 2;
    const Layer layer{width, lanes, drops, k == 1, last, weight, share, from};
    over_rows([&](const Side& side, const Side& other, int64_t begin, int64_t end) {
      SumRows(side, other.scaled[from], layer, begin, end);
    });
  }
}

}  // namespace slgr

using namespace slgr;

SLGR_KERNEL(slgr_graph_propagate, GraphPropagate, "layers", "drops", "threshold", "weight")
