// The logits of a logistic gate, a lane at a time (see gates.py).

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common.h"
#include "vectors.h"

namespace slgr {
namespace {

using V = V8;  // hidden units side by side
constexpr int64_t kWide = In<V>::kSize;

// tanh x = 1 - 2 / (e^2x + 1), to the rounding of float32 beside 1.
struct TanhOf {
  template <typename W>
  SLGR_INLINE W operator()(W x) const {
    // Beyond 10 it is 1; a NaN passes both comparisons.
    const W least = W{} - 10.0f, most = W{} + 10.0f;
    W y = x < least ? least : x;
    y = y > most ? most : y;
    y = y * 2.885390081777927f;  // 2 / ln 2
    const W shifted = y + 12582912.0f;  // 1.5 * 2^23: the last bits are the nearest integer
    const W f = (y - (shifted - 12582912.0f)) * 0.6931471805599453f;
    // e^f for |f| <= ln 2 / 2: the next term is below 1.3e-7.
    W power = 1.0f + f * (1.0f / 6.0f);
    power = 1.0f + f * 0.2f * power;
    power = 1.0f + f * 0.25f * power;
    power = 1.0f + f * (1.0f / 3.0f) * power;
    power = 1.0f + f * 0.5f * power;
    power = 1.0f + f * power;
    const auto exponent = WordsOf(shifted) - 0x4B400000u + 127u;
    return 1.0f - 2.0f / (power * FloatsOf(exponent << 23) + 1.0f);
  }
};

SLGR_INLINE inline float Sum(V4 x) { return (x[0] + x[1]) + (x[2] + x[3]); }

}  // namespace

static void LogisticGate(ThreadPool pool, F32 features, S32 folds, F32 weight, F32 bias, F32 inner,
                         F32 outer, OutF32 logits) {
  const int64_t inputs = features.size(0), lanes = features.size(1), hidden = outer.size(1);
  const int64_t padded = (hidden + kWide - 1) / kWide * kWide;
  // Of each fold: V [inputs, padded], v [padded]; what is padded adds nothing.
  const int64_t of_fold = (inputs + 1) * padded;
  std::vector<float> layer(2 * of_fold);
  for (int64_t fold = 0; fold < 2; ++fold) {
    for (int64_t k = 0; k < inputs; ++k) {
      std::copy_n(inner.data() + (fold * inputs + k) * hidden, hidden,
                  layer.data() + fold * of_fold + k * padded);
    }
    std::copy_n(outer.data() + fold * hidden, hidden,
                layer.data() + fold * of_fold + inputs * padded);
  }
  const float* z = features.data();
  const int64_t tasks = std::max<int64_t>(1, pool.num_threads()), chunk = (lanes + tasks - 1) / tasks;
  Parallel(pool, tasks, lanes * (inputs + 1) * (padded + 1), [&](int64_t i) {
    const int64_t stop = std::min(lanes, (i + 1) * chunk);
    for (int64_t lane = i * chunk; lane < stop; ++lane) {
      const int64_t fold = folds.data()[lane] != 0;
      const float *w = weight.data() + fold * inputs, *v = layer.data() + fold * of_fold;
      float logit = bias.data()[fold];
      for (int64_t k = 0; k < inputs; ++k) logit += w[k] * z[k * lanes + lane];
      V sum = V{};
      for (int64_t h = 0; h < padded; h += kWide) {
        V state = V{};
        for (int64_t k = 0; k < inputs; ++k) {
          state = state + z[k * lanes + lane] * In<V>::Read(v + k * padded + h);
        }
        sum = sum + In<V>::Read(v + inputs * padded + h) * Each(TanhOf{}, state);
      }
      logits.data()[lane] = logit + Sum(Halved(sum));
    }
  });
}

}  // namespace slgr

using namespace slgr;

SLGR_KERNEL(slgr_logistic_gate, LogisticGate)
