// Draws of triples, of preferences and of items outside a user's excluded set (see cpu.py,
// data/draws.py).

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>

#include "common.h"

namespace slgr {
namespace {

constexpr int64_t kLine = 16;    // int32 of a cache line
constexpr int64_t kSearch = 8;   // searches of one row that go side by side
constexpr int64_t kFetched = 32; // rows fetched before the first of them is searched

// floor(word * bound / 2^32): a number in [0, bound), as `draws.below`.
inline int32_t Below(uint32_t word, int64_t bound) {
  return static_cast<int32_t>((static_cast<uint64_t>(word) * static_cast<uint32_t>(bound)) >> 32);
}

// passed[k] = #{j < length: row[j] <= mass[k]} of an ascending row: branch-free upper bounds, whose
// loads do not wait for each other.
inline void Search(const int32_t* row, int64_t length, const int32_t* mass, int32_t* passed) {
#ifdef __AVX2__
  static_assert(kSearch == 8, "lanes of a vector");
  const __m256i masses = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(mass));
  __m256i base = _mm256_setzero_si256();
  const auto step = [&](int32_t ahead, int32_t by) {
    const __m256i at = _mm256_add_epi32(base, _mm256_set1_epi32(ahead));
    const __m256i above = _mm256_cmpgt_epi32(_mm256_i32gather_epi32(row, at, 4), masses);
    base = _mm256_add_epi32(base, _mm256_andnot_si256(above, _mm256_set1_epi32(by)));
  };
  for (int64_t rest = length; rest > 1; rest -= rest / 2) {
    const int32_t half = static_cast<int32_t>(rest / 2);
    step(half - 1, half);
  }
  if (length > 0) step(0, 1);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(passed), base);
#else
  std::fill(passed, passed + kSearch, 0);
  const auto step = [&](int32_t ahead, int32_t by) {
    for (int64_t k = 0; k < kSearch; ++k) {
      passed[k] += by & -static_cast<int32_t>(row[passed[k] + ahead] <= mass[k]);
    }
  };
  for (int64_t rest = length; rest > 1; rest -= rest / 2) {
    const int32_t half = static_cast<int32_t>(rest / 2);
    step(half - 1, half);
  }
  if (length > 0) step(0, 1);
#endif
}

// The excluded sets of users: see data/batches.Excluded. `shifts` is null where every mass is 1.
struct Cut {
  const int32_t *offsets, *keys, *shifts, *free;

  int64_t size(int32_t user) const { return offsets[user + 1] - offsets[user]; }

  SLGR_PREFETCHES void PrefetchBounds(int32_t user) const {
    __builtin_prefetch(offsets + user);
    __builtin_prefetch(free + user);
  }

  // What a search reads of a user's row: all of it, or every 16th part.
  SLGR_PREFETCHES void PrefetchRow(int32_t user) const {
    const int32_t* row = keys + offsets[user];
    const int64_t length = size(user), stride = std::max(kLine, length / 16);
    for (int64_t k = 0; k < length; k += stride) __builtin_prefetch(row + k);
  }

  // Places outside a user's set by `n` <= kSearch random words, 1 where there are any.
  void Draw(int32_t user, const uint32_t* words, int64_t n, int32_t* place, int64_t step,
            float* weight) const {
    const int64_t length = size(user), left = free[user];
    const int32_t* row = keys + offsets[user];
    int32_t mass[kSearch], passed[kSearch];
    for (int64_t k = 0; k < kSearch; ++k) mass[k] = Below(words[k < n ? k : 0], left);
    Search(row, length, mass, passed);
    for (int64_t k = 0; k < n; ++k) {
      int32_t shift = passed[k];
      if (shifts) shift = passed[k] > 0 ? shifts[offsets[user] + passed[k] - 1] : 0;
      place[k * step] = left > 0 ? mass[k] + shift : 0;
      weight[k] = left > 0 ? 1.0f : 0.0f;
    }
  }
};

}  // namespace

static ffi::Error DrawOutside(ffi::ThreadPool pool, U32 bits, S32 users, S32 offsets, S32 keys,
                              S32 shifts, S32 free, OutS32 place, OutF32 weight, bool unit_mass) {
  const int64_t n = users.element_count();
  const int32_t* user = users.typed_data();
  const Cut cut{offsets.typed_data(), keys.typed_data(),
                unit_mass ? nullptr : shifts.typed_data(), free.typed_data()};
  const int64_t tasks = std::max<int64_t>(1, pool.num_threads()), chunk = (n + tasks - 1) / tasks;
  Parallel(pool, tasks, n * 16, [&](int64_t i) {
    const int64_t end = std::min(n, (i + 1) * chunk);
    for (int64_t begin = i * chunk; begin < end; begin += kFetched) {
      const int64_t stop = std::min(end, begin + kFetched);
      for (int64_t lane = begin; lane < stop; ++lane) cut.PrefetchBounds(user[lane]);
      for (int64_t lane = begin; lane < stop; ++lane) {
        if (lane == begin || user[lane] != user[lane - 1]) cut.PrefetchRow(user[lane]);
      }
      for (int64_t lane = begin; lane < stop;) {
        int64_t same = 1;
        while (same < kSearch && lane + same < stop && user[lane + same] == user[lane]) ++same;
        cut.Draw(user[lane], bits.typed_data() + lane, same, place->typed_data() + lane, 1,
                 weight->typed_data() + lane);
        lane += same;
      }
    }
  });
  return ffi::Error::Success();
}

static ffi::Error DrawTriples(ffi::ThreadPool pool, U32 first, U32 positive, U32 negative,
                              S32 pair_users, S32 pair_items, S32 offsets, S32 keys, S32 shifts,
                              S32 free, OutS32 users, OutS32 items, OutF32 weights, int64_t drawn,
                              int64_t together, bool unit_mass) {
  const int64_t steps = users->dimensions()[0], size = users->dimensions()[1];
  const int64_t groups = first.dimensions()[1];
  const Cut cut{offsets.typed_data(), keys.typed_data(),
                unit_mass ? nullptr : shifts.typed_data(), free.typed_data()};
  const int32_t *owner = pair_users.typed_data(), *item = pair_items.typed_data();
  const int64_t all = steps * groups, tasks = std::max<int64_t>(1, pool.num_threads());
  const int64_t chunk = (all + tasks - 1) / tasks;
  Parallel(pool, tasks, steps * size * 16, [&](int64_t i) {
    const int64_t end = std::min(all, (i + 1) * chunk);
    int32_t pair[kFetched], user[kFetched];
    for (int64_t begin = i * chunk; begin < end; begin += kFetched) {
      const int64_t count = std::min(kFetched, end - begin);
      for (int64_t k = 0; k < count; ++k) {
        pair[k] = Below(first.typed_data()[begin + k], drawn);
        __builtin_prefetch(owner + pair[k]);
      }
      for (int64_t k = 0; k < count; ++k) cut.PrefetchBounds(user[k] = owner[pair[k]]);
      for (int64_t k = 0; k < count; ++k) cut.PrefetchRow(user[k]);
      for (int64_t k = 0; k < count; ++k) {
        const int64_t step = (begin + k) / groups, group = (begin + k) % groups;
        const int64_t lane = step * size + group * together;
        const int64_t stop = std::min(lane + together, (step + 1) * size);
        const int64_t start = cut.offsets[user[k]], length = cut.size(user[k]);
        for (int64_t at = lane; at < stop; at += kSearch) {
          const int64_t n = std::min(kSearch, stop - at);
          int32_t* out = items->typed_data() + 2 * at;
          for (int64_t j = 0; j < n; ++j) {
            users->typed_data()[at + j] = user[k];
            const int32_t chosen = Below(positive.typed_data()[at + j], length);
            // With masses of 1 a key tells the item, from the lines that are searched next.
            out[2 * j] = unit_mass ? cut.keys[start + chosen] + chosen : item[start + chosen];
          }
          cut.Draw(user[k], negative.typed_data() + at, n, out + 1, 2, weights->typed_data() + at);
        }
      }
    }
  });
  return ffi::Error::Success();
}

static ffi::Error DrawPreferences(ffi::ThreadPool pool, U32 first, U32 partner, U32 share,
                                  S32 starts, S32 list_offsets, S32 list_items, F32 list_scores,
                                  S32 offsets, S32 keys, S32 free, OutS32 users, OutS32 items,
                                  OutF32 margins, int64_t together, bool unlisted, int64_t most, float floor) {
  const int64_t steps = users->dimensions()[0], size = users->dimensions()[1];
  const int64_t groups = first.dimensions()[1], stated = starts.dimensions()[0];
  const Cut cut{offsets.typed_data(), keys.typed_data(), nullptr, free.typed_data()};
  struct Start {
    int32_t entry, user, low, high;
  };
  const Start* begins = reinterpret_cast<const Start*>(starts.typed_data());
  const int32_t *row = list_offsets.typed_data(), *item = list_items.typed_data();
  const float* score = list_scores.typed_data();
  const uint32_t *start_word = first.typed_data(), *partner_word = partner.typed_data();
  const uint32_t* share_word = share.typed_data();
  int32_t *out_users = users->typed_data(), *out_items = items->typed_data();
  float* out_margins = margins->typed_data();
  const int64_t all = steps * groups, tasks = std::max<int64_t>(1, pool.num_threads());
  const int64_t chunk = (all + tasks - 1) / tasks;
  // By value: what is written here could be a pointer that is read through a reference.
  Parallel(pool, tasks, steps * size * 16, [=](int64_t i) {
    const int64_t end = std::min(all, (i + 1) * chunk);
    int32_t place[kFetched];
    for (int64_t begin = i * chunk; begin < end; begin += kFetched) {
      const int64_t count = std::min(kFetched, end - begin);
      for (int64_t k = 0; k < count; ++k) {
        place[k] = Below(start_word[begin + k], stated);
        __builtin_prefetch(begins + place[k]);
        __builtin_prefetch(begins + place[k] + together - 1);
      }
      for (int64_t k = 0; k < count; ++k) {
        __builtin_prefetch(row + begins[place[k]].user);
        if (unlisted) cut.PrefetchBounds(begins[place[k]].user);
      }
      for (int64_t k = 0; k < count; ++k) {
        const int32_t user = begins[place[k]].user;
        for (int64_t at = row[user]; at < row[user + 1]; at += kLine) {
          __builtin_prefetch(item + at);
          __builtin_prefetch(score + at);
        }
        if (unlisted) cut.PrefetchRow(user);
      }
      for (int64_t k = 0; k < count; ++k) {
        const int64_t step = (begin + k) / groups, group = (begin + k) % groups;
        const int64_t lane = step * size + group * together;
        const int64_t stop = std::min(lane + together, (step + 1) * size);
        int64_t from = place[k];
        int32_t outside[kSearch];  // of the lanes of a run, which have one user
        float able[kSearch];  // 1: only entries of users with something outside begin a preference
        for (int64_t at = lane, run = 0, first_of_run = lane; at < stop; ++at) {
          const auto [own, user, low, high] = begins[from];
          if (unlisted && at == first_of_run + run) {
            first_of_run = at;
            for (run = 1; run < std::min(kSearch, stop - at); ++run) {
              if (begins[(from + run) % stated].user != user) break;
            }
            cut.Draw(user, partner_word + at, run, outside, 1, able);
          }
          const int32_t start = row[user], ties = high - low;
          const int32_t partners = row[user + 1] - start - ties;
          out_users[at] = user;
          if (unlisted && (partners <= 0 || share_word[at] <= most)) {
            out_items[2 * at] = item[own];
            out_items[2 * at + 1] = outside[at - first_of_run];
            out_margins[at] = score[own] - floor;
          } else {
            // Scores ascend: what an entry beats comes before it, then its ties, then what beats it.
            const int32_t chosen = Below(partner_word[at], partners);
            const bool beats = chosen < low;
            const int32_t other = start + chosen + (beats ? 0 : ties);
            const int32_t preferred = beats ? own : other, beaten = beats ? other : own;
            out_items[2 * at] = item[preferred];
            out_items[2 * at + 1] = item[beaten];
            out_margins[at] = score[preferred] - score[beaten];
          }
          if (++from == stated) from = 0;
        }
      }
    }
  });
  return ffi::Error::Success();
}

static ffi::Error Take(ffi::ThreadPool pool, F32 values, S32 at, OutF32 found) {
  constexpr int64_t kAhead = 64;
  const int64_t n = at.element_count(), tasks = std::max<int64_t>(1, pool.num_threads());
  const int64_t chunk = (n + tasks - 1) / tasks;
  const float* value = values.typed_data();
  const int32_t* place = at.typed_data();
  float* out = found->typed_data();
  Parallel(pool, tasks, n, [&](int64_t i) {
    const int64_t begin = i * chunk, end = std::min(n, begin + chunk);
    for (int64_t k = begin; k < end; ++k) {
      if (k + kAhead < end) __builtin_prefetch(value + place[k + kAhead]);
      out[k] = value[place[k]];
    }
  });
  return ffi::Error::Success();
}

}  // namespace slgr

using namespace slgr;

XLA_FFI_DEFINE_HANDLER_SYMBOL(slgr_draw_outside, DrawOutside,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<U32>()   // random words [N]
                                  .Arg<S32>()   // users [N]
                                  .Arg<S32>()   // offsets [U + 1]
                                  .Arg<S32>()   // keys [n]
                                  .Arg<S32>()   // shifts [n]
                                  .Arg<S32>()   // free [U]
                                  .Ret<S32>()   // place [N]
                                  .Ret<F32>()   // weight [N]
                                  .Attr<bool>("unit_mass"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(slgr_draw_triples, DrawTriples,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<U32>()   // random words of the users [S, M]
                                  .Arg<U32>()   // of the positives [S, B]
                                  .Arg<U32>()   // of the negatives [S, B]
                                  .Arg<S32>()   // users of the pairs [n]
                                  .Arg<S32>()   // items of the pairs [n]
                                  .Arg<S32>()   // offsets [U + 1]
                                  .Arg<S32>()   // keys [n]
                                  .Arg<S32>()   // shifts [n]
                                  .Arg<S32>()   // free [U]
                                  .Ret<S32>()   // users [S, B]
                                  .Ret<S32>()   // positive, place of the negative [S, B, 2]
                                  .Ret<F32>()   // weight [S, B]
                                  .Attr<int64_t>("drawn")
                                  .Attr<int64_t>("together")
                                  .Attr<bool>("unit_mass"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(slgr_draw_preferences, DrawPreferences,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<U32>()   // random words of the first entries [S, M]
                                  .Arg<U32>()   // of the partners [S, G]
                                  .Arg<U32>()   // of whether the partner is unlisted [S, G]
                                  .Arg<S32>()   // entry, user, ties from, to [m, 4]
                                  .Arg<S32>()   // lists: offsets [U + 1]
                                  .Arg<S32>()   // items [E]
                                  .Arg<F32>()   // scores [E]
                                  .Arg<S32>()   // outside: offsets [U + 1]
                                  .Arg<S32>()   // keys [n]
                                  .Arg<S32>()   // free [U]
                                  .Ret<S32>()   // users [S, G]
                                  .Ret<S32>()   // preferred, other [S, G, 2]
                                  .Ret<F32>()   // margins [S, G]
                                  .Attr<int64_t>("together")
                                  .Attr<bool>("unlisted")
                                  .Attr<int64_t>("most")
                                  .Attr<float>("floor"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(slgr_take, Take,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<F32>()    // values [R]
                                  .Arg<S32>()    // places [N]
                                  .Ret<F32>());  // [N]
