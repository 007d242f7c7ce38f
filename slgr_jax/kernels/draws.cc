// Draws of triples, of preferences and of items outside a user's excluded set (see cpu.py,
// data/draws.py).

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>

#include "common.h"

namespace slgr {
namespace {

constexpr int64_t kLine = 16;     // int32 of a cache line, and keys from a mark to the next
constexpr int64_t kSide = 8;      // lanes of one user whose searches go side by side
constexpr int64_t kFetched = 32;  // groups of lanes fetched before the first of them is drawn

// floor(word * bound / 2^32): a number in [0, bound), as `draws.below`.
inline int32_t Below(uint32_t word, int64_t bound) {
  return static_cast<int32_t>((static_cast<uint64_t>(word) * static_cast<uint32_t>(bound)) >> 32);
}

// #{k < n: row[k] <= mass} of n <= kLine numbers.
inline int32_t Passed(const int32_t* row, int64_t n, int32_t mass) {
#ifdef __AVX512F__
  static_assert(kLine == 16, "lanes of a vector");
  const __mmask16 some = static_cast<__mmask16>((1u << n) - 1);
  const __m512i keys = _mm512_maskz_loadu_epi32(some, row);
  return __builtin_popcount(_mm512_mask_cmple_epi32_mask(some, keys, _mm512_set1_epi32(mass)));
#else
  int32_t passed = 0;
  for (int64_t k = 0; k < n; ++k) passed += row[k] <= mass;
  return passed;
#endif
}

// A number below the mass that a user has left, and the kLine keys (counted from the first user's
// first) among which its search ends.
struct Aimed {
  int32_t mass, line;
};

// The excluded sets of users: see data/batches.Excluded. `shifts` is null where every mass is 1.
// A draw goes in steps, so that many draws can wait for memory together: PrefetchBounds,
// PrefetchMarks, Aim, Draw.
struct Cut {
  const int32_t *offsets, *keys, *marks, *shifts, *free;

  int64_t size(int32_t user) const { return offsets[user + 1] - offsets[user]; }

  // Mass that a user has left; where each item has 1 there is no need to read it.
  int64_t left(int32_t user) const {
    return shifts ? free[user] : free[0] + size(0) - size(user);
  }

  // A user's row after its first line: the marks from `first_mark` on, so many.
  int64_t first_mark(int32_t user) const { return offsets[user] / kLine + 1; }
  int64_t count_marks(int32_t user) const {
    return std::max<int64_t>(0, (offsets[user + 1] + kLine - 1) / kLine - first_mark(user));
  }

  SLGR_PREFETCHES void PrefetchBounds(int32_t user) const {
    __builtin_prefetch(offsets + user);
    if (shifts) __builtin_prefetch(free + user);
  }

  // What a search reads of a user's marks: all of them, or every 16th part.
  SLGR_PREFETCHES void PrefetchMarks(int32_t user) const {
    const int32_t* mark = marks + first_mark(user);
    const int64_t length = count_marks(user), stride = std::max(kLine, length / 16);
    for (int64_t k = 0; k < length; k += stride) __builtin_prefetch(mark + k);
  }

  // Where the searches of `n` <= kSide random words end; fetches it.
  SLGR_INLINE void Aim(int32_t user, const uint32_t* words, int64_t n, Aimed* aimed) const {
    const int32_t* mark = marks + first_mark(user);
    const int64_t mass_left = left(user);
    int32_t mass[kSide], base[kSide] = {};
    for (int64_t k = 0; k < kSide; ++k) mass[k] = Below(words[k < n ? k : 0], mass_left);
    int64_t rest = count_marks(user);
    for (; rest > kLine; rest -= rest / 2) {
      const int32_t half = static_cast<int32_t>(rest / 2);
      for (int64_t k = 0; k < kSide; ++k) {
        base[k] += half & -static_cast<int32_t>(mark[base[k] + half - 1] <= mass[k]);
      }
    }
    const int32_t before = static_cast<int32_t>(first_mark(user)) - 1;
    for (int64_t k = 0; k < n; ++k) {
      const int32_t line = before + base[k] + Passed(mark + base[k], rest, mass[k]);
      aimed[k] = {mass[k], line};
      __builtin_prefetch(keys + line * kLine);
      if (shifts) __builtin_prefetch(shifts + line * kLine);
    }
  }

  // Places outside a user's set, 1 where there are any.
  void Draw(int32_t user, const Aimed* aimed, int64_t n, int32_t* place, int64_t step,
            float* weight) const {
    const int64_t begin = offsets[user], end = offsets[user + 1], mass_left = left(user);
    for (int64_t k = 0; k < n; ++k) {
      const int64_t at = aimed[k].line * kLine;
      const int64_t from = std::max(begin, at), to = std::min(end, at + kLine);
      const int64_t passed = from - begin + Passed(keys + from, to - from, aimed[k].mass);
      int64_t shift = passed;
      if (shifts) shift = passed > 0 ? shifts[begin + passed - 1] : 0;
      place[k * step] = mass_left > 0 ? static_cast<int32_t>(aimed[k].mass + shift) : 0;
      weight[k] = mass_left > 0 ? 1.0f : 0.0f;
    }
  }
};

// How many lanes from `lane` on, kSide at most, have its user.
inline int64_t Run(const int32_t* user, int64_t lane, int64_t stop) {
  int64_t same = 1;
  while (same < kSide && lane + same < stop && user[lane + same] == user[lane]) ++same;
  return same;
}

}  // namespace

static void DrawOutside(ThreadPool pool, U32 bits, S32 users, S32 offsets, S32 keys,
                        S32 marks, S32 shifts, S32 free, OutS32 place, OutF32 weight,
                        bool unit_mass) {
  constexpr int64_t kLanes = kFetched * kSide;
  const int64_t n = users.count();
  const int32_t* user = users.data();
  const Cut cut{offsets.data(), keys.data(), marks.data(),
                unit_mass ? nullptr : shifts.data(), free.data()};
  const int64_t tasks = std::max<int64_t>(1, pool.num_threads()), chunk = (n + tasks - 1) / tasks;
  Parallel(pool, tasks, n * 16, [&](int64_t i) {
    const int64_t end = std::min(n, (i + 1) * chunk);
    Aimed aimed[kLanes];
    for (int64_t begin = i * chunk; begin < end; begin += kLanes) {
      const int64_t stop = std::min(end, begin + kLanes);
      for (int64_t lane = begin; lane < stop; ++lane) cut.PrefetchBounds(user[lane]);
      for (int64_t lane = begin; lane < stop; lane += Run(user, lane, stop)) {
        cut.PrefetchMarks(user[lane]);
      }
      for (int64_t lane = begin, run; lane < stop; lane += run) {
        run = Run(user, lane, stop);
        cut.Aim(user[lane], bits.data() + lane, run, aimed + (lane - begin));
      }
      for (int64_t lane = begin, run; lane < stop; lane += run) {
        run = Run(user, lane, stop);
        cut.Draw(user[lane], aimed + (lane - begin), run, place.data() + lane, 1,
                 weight.data() + lane);
      }
    }
  });
}

static void DrawTriples(ThreadPool pool, U32 first, U32 positive, U32 negative,
                        S32 pair_users, S32 pair_items, S32 offsets, S32 keys, S32 marks,
                        S32 shifts, S32 free, OutS32 users, OutS32 items, OutF32 weights,
                        int64_t drawn, int64_t together, bool unit_mass) {
  const int64_t steps = users.size(0), size = users.size(1);
  const int64_t groups = first.size(1);
  const Cut cut{offsets.data(), keys.data(), marks.data(),
                unit_mass ? nullptr : shifts.data(), free.data()};
  const int32_t* owner = pair_users.data();
  // With masses of 1 a key tells the item.
  const int32_t* item = unit_mass ? cut.keys : pair_items.data();
  const int64_t all = steps * groups, tasks = std::max<int64_t>(1, pool.num_threads());
  const int64_t chunk = (all + tasks - 1) / tasks;
  Parallel(pool, tasks, steps * size * 16, [&](int64_t i) {
    const int64_t end = std::min(all, (i + 1) * chunk);
    int32_t pair[kFetched], user[kFetched], chosen[kFetched * kSide];
    int64_t lanes[kFetched], most[kFetched];  // first lane of a group, and how many it has
    Aimed aimed[kFetched * kSide];
    for (int64_t begin = i * chunk; begin < end; begin += kFetched) {
      const int64_t count = std::min(kFetched, end - begin);
      for (int64_t k = 0; k < count; ++k) {
        pair[k] = Below(first.data()[begin + k], drawn);
        __builtin_prefetch(owner + pair[k]);
        const int64_t step = (begin + k) / groups, group = (begin + k) % groups;
        lanes[k] = step * size + group * together;
        most[k] = std::min(together, size - group * together);
      }
      for (int64_t k = 0; k < count; ++k) cut.PrefetchBounds(user[k] = owner[pair[k]]);
      for (int64_t k = 0; k < count; ++k) cut.PrefetchMarks(user[k]);
      for (int64_t part = 0; part < together; part += kSide) {
        for (int64_t k = 0; k < count; ++k) {
          const int64_t at = lanes[k] + part, n = std::min(kSide, most[k] - part);
          if (n <= 0) continue;
          cut.Aim(user[k], negative.data() + at, n, aimed + k * kSide);
          for (int64_t j = 0; j < n; ++j) {
            const int32_t place = Below(positive.data()[at + j], cut.size(user[k]));
            __builtin_prefetch(item + cut.offsets[user[k]] + place);
            chosen[k * kSide + j] = place;
          }
        }
        for (int64_t k = 0; k < count; ++k) {
          const int64_t at = lanes[k] + part, n = std::min(kSide, most[k] - part);
          if (n <= 0) continue;
          const int32_t* row = item + cut.offsets[user[k]];
          int32_t* out = items.data() + 2 * at;
          for (int64_t j = 0; j < n; ++j) {
            const int32_t place = chosen[k * kSide + j];
            users.data()[at + j] = user[k];
            out[2 * j] = row[place] + (unit_mass ? place : 0);
          }
          cut.Draw(user[k], aimed + k * kSide, n, out + 1, 2, weights.data() + at);
        }
      }
    }
  });
}

static void DrawPreferences(ThreadPool pool, U32 first, U32 partner, U32 share,
                            S32 starts, S32 list_offsets, S32 list_items, F32 list_scores,
                            S32 offsets, S32 keys, S32 marks, S32 free, OutS32 users,
                            OutS32 items, OutF32 margins, OutS32 entries, int64_t together,
                            bool unlisted, int64_t most_word, float floor) {
  const int64_t steps = users.size(0), size = users.size(1);
  const int64_t groups = first.size(1), stated = starts.size(0);
  const Cut cut{offsets.data(), keys.data(), marks.data(), nullptr,
                free.data()};
  struct Start {
    int32_t entry, user, low, high;
  };
  const Start* begins = reinterpret_cast<const Start*>(starts.data());
  const int32_t *row = list_offsets.data(), *item = list_items.data();
  const float* score = list_scores.data();
  const uint32_t *start_word = first.data(), *partner_word = partner.data();
  const uint32_t* share_word = share.data();
  int32_t *out_users = users.data(), *out_items = items.data(), *out_entries = entries.data();
  float* out_margins = margins.data();
  const int64_t all = steps * groups, tasks = std::max<int64_t>(1, pool.num_threads());
  const int64_t chunk = (all + tasks - 1) / tasks;
  // By value: what is written here could be a pointer that is read through a reference.
  Parallel(pool, tasks, steps * size * 24, [=](int64_t i) {
    const int64_t end = std::min(all, (i + 1) * chunk);
    constexpr int64_t kLanes = kFetched * kSide;
    int64_t first_start[kFetched], lanes[kFetched], most[kFetched];
    const Start* own[kLanes];
    int64_t at[kLanes];
    // `partner`: an entry, or -1, an item outside the list.
    int32_t user[kLanes], partner[kLanes], outside[kLanes];
    uint32_t word[kLanes];
    Aimed aimed[kLanes];
    float able[kLanes];  // 1: only entries of users with something outside begin a preference
    for (int64_t begin = i * chunk; begin < end; begin += kFetched) {
      const int64_t count = std::min(kFetched, end - begin);
      for (int64_t k = 0; k < count; ++k) {
        first_start[k] = Below(start_word[begin + k], stated);
        const int64_t step = (begin + k) / groups, group = (begin + k) % groups;
        lanes[k] = step * size + group * together;
        most[k] = std::min(together, size - group * together);
      }
      for (int64_t part = 0; part < together; part += kSide) {
        int64_t n = 0;
        for (int64_t k = 0; k < count; ++k) {
          for (int64_t j = part; j < std::min(part + kSide, most[k]); ++j, ++n) {
            const int64_t start = first_start[k] + j;
            own[n] = begins + (start < stated ? start : start % stated);
            __builtin_prefetch(own[n]);
            at[n] = lanes[k] + j;
          }
        }
        for (int64_t m = 0; m < n; ++m) {
          user[m] = own[m]->user;
          __builtin_prefetch(row + user[m]);
          if (unlisted) cut.PrefetchBounds(user[m]);
        }
        for (int64_t m = 0; m < n; ++m) {
          const auto [entry, who, low, high] = *own[m];
          word[m] = partner_word[at[m]];
          const int32_t start = row[who], ties = high - low;
          const int32_t partners = row[who + 1] - start - ties;
          partner[m] = -1;
          if (!unlisted || (partners > 0 && share_word[at[m]] > most_word)) {
            // Scores ascend: what an entry beats comes before it, then its ties, then what beats it.
            const int32_t chosen = Below(word[m], partners);
            partner[m] = start + chosen + (chosen < low ? 0 : ties);
            __builtin_prefetch(item + partner[m]);
            __builtin_prefetch(score + partner[m]);
          }
          __builtin_prefetch(item + entry);
          __builtin_prefetch(score + entry);
        }
        for (int64_t m = 0; unlisted && m < n; m += Run(user, m, n)) cut.PrefetchMarks(user[m]);
        for (int64_t m = 0, run; unlisted && m < n; m += run) {
          cut.Aim(user[m], word + m, run = Run(user, m, n), aimed + m);
        }
        for (int64_t m = 0, run; unlisted && m < n; m += run) {
          cut.Draw(user[m], aimed + m, run = Run(user, m, n), outside + m, 1, able + m);
        }
        for (int64_t m = 0; m < n; ++m) {
          const int32_t entry = own[m]->entry, other = partner[m];
          int32_t *pair = out_items + 2 * at[m], *listed = out_entries + 2 * at[m];
          out_users[at[m]] = user[m];
          if (other < 0) {
            listed[0] = entry;
            listed[1] = -1;
            pair[0] = item[entry];
            pair[1] = outside[m];
            out_margins[at[m]] = score[entry] - floor;
          } else {
            // Where a partner comes before its entry it is beaten.
            const bool beats = other < entry;
            const int32_t preferred = beats ? entry : other, beaten = beats ? other : entry;
            listed[0] = preferred;
            listed[1] = beaten;
            pair[0] = item[preferred];
            pair[1] = item[beaten];
            out_margins[at[m]] = score[preferred] - score[beaten];
          }
        }
      }
    }
  });
}

static void Take(ThreadPool pool, F32 values, S32 at, OutF32 found) {
  constexpr int64_t kAhead = 64;
  const int64_t n = at.count(), tasks = std::max<int64_t>(1, pool.num_threads());
  const int64_t chunk = (n + tasks - 1) / tasks;
  const float* value = values.data();
  const int32_t* place = at.data();
  float* out = found.data();
  Parallel(pool, tasks, n, [&](int64_t i) {
    const int64_t begin = i * chunk, end = std::min(n, begin + chunk);
    for (int64_t k = begin; k < end; ++k) {
      if (k + kAhead < end) __builtin_prefetch(value + place[k + kAhead]);
      out[k] = value[place[k]];
    }
  });
}

}  // namespace slgr

using namespace slgr;

SLGR_KERNEL(slgr_draw_outside, DrawOutside, "unit_mass")
SLGR_KERNEL(slgr_draw_triples, DrawTriples, "drawn", "together", "unit_mass")
SLGR_KERNEL(slgr_draw_preferences, DrawPreferences, "together", "unlisted", "most", "floor")
SLGR_KERNEL(slgr_take, Take)
