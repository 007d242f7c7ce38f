// The search that draws an item outside a user's excluded set (see cpu.py, data/draws.py).

#include <algorithm>
#include <cstdint>

#include "common.h"

namespace slgr {
namespace {

constexpr int64_t kAhead = 12;  // lanes between a prefetch and its use
constexpr int64_t kLine = 16;   // int32 of a cache line

}  // namespace

static ffi::Error DrawOutside(ffi::ThreadPool pool, U32 bits, S32 users, S32 offsets, S32 keys,
                              S32 shifts, S32 free, OutS32 place, OutF32 weight, bool unit_mass) {
  const int64_t n = users.element_count();
  const uint32_t* word = bits.typed_data();
  const int32_t *user = users.typed_data(), *offset = offsets.typed_data();
  const int32_t *key = keys.typed_data(), *shift = shifts.typed_data(), *left = free.typed_data();
  int32_t* out = place->typed_data();
  float* drawn = weight->typed_data();
  const int64_t tasks = std::max<int64_t>(1, pool.num_threads()), chunk = (n + tasks - 1) / tasks;
  Parallel(pool, tasks, n * 16, [&](int64_t i) {
    const int64_t end = std::min(n, (i + 1) * chunk);
    for (int64_t lane = i * chunk; lane < end; ++lane) {
      if (lane + 2 * kAhead < end) {
        __builtin_prefetch(offset + user[lane + 2 * kAhead]);
        __builtin_prefetch(left + user[lane + 2 * kAhead]);
      }
      if (lane + kAhead < end && user[lane + kAhead] != user[lane + kAhead - 1]) {
        // What a search reads of a new user's row: all of it, or every 16th part.
        const int64_t begin = offset[user[lane + kAhead]];
        const int64_t length = offset[user[lane + kAhead] + 1] - begin;
        const int64_t stride = std::max(kLine, length / 16);
        for (int64_t k = 0; k < length; k += stride) __builtin_prefetch(key + begin + k);
      }
      const int32_t u = user[lane];
      const uint64_t bound = static_cast<uint32_t>(left[u]);
      const int32_t mass = static_cast<int32_t>((word[lane] * bound) >> 32);
      const int32_t* row = key + offset[u];
      const int64_t size = offset[u + 1] - offset[u];
      const int32_t* base = row;  // branch-free upper bound: the first key above mass
      for (int64_t rest = size; rest > 1;) {
        const int64_t half = rest / 2;
        base += half & -static_cast<int64_t>(base[half - 1] <= mass);
        rest -= half;
      }
      const int64_t passed = base - row + (size > 0 && *base <= mass);
      int32_t moved = mass + static_cast<int32_t>(passed);
      if (!unit_mass) moved = mass + (passed > 0 ? shift[offset[u] + passed - 1] : 0);
      out[lane] = left[u] > 0 ? moved : 0;
      drawn[lane] = left[u] > 0 ? 1.0f : 0.0f;
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
