// Vectors of floats over channels, by the compiler's vector extension (GCC and Clang, any target).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
#else
#define LANES 8
#endif

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t VecInt __attribute__((vector_size(4 * LANES)));
typedef float VecUnaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

constexpr float LOG2E = 1.44269504088896f;
constexpr float LN2 = 0.693147180559945f;

static inline Vec splat(float x) { return Vec{} + x; }
static inline Vec load(const float *p) { return *reinterpret_cast<const VecUnaligned *>(p); }
static inline void store(float *p, Vec x) { *reinterpret_cast<VecUnaligned *>(p) = x; }

// The last block of channels may hold fewer than LANES: absent lanes read as zero.
static inline Vec load(const float *p, int lanes) {
  if (lanes == LANES) return load(p);
  Vec x{};
  std::memcpy(&x, p, sizeof(float) * lanes);
  return x;
}
static inline void store(float *p, Vec x, int lanes) {
  if (lanes == LANES)
    store(p, x);
  else
    std::memcpy(p, &x, sizeof(float) * lanes);
}

static inline Vec select(VecInt mask, Vec yes, Vec no) {
  return (Vec)((mask & (VecInt)yes) | (~mask & (VecInt)no));
}
#if defined(__AVX512F__)
static inline Vec vmax(Vec a, Vec b) { return (Vec)_mm512_max_ps((__m512)a, (__m512)b); }
static inline Vec vmin(Vec a, Vec b) { return (Vec)_mm512_min_ps((__m512)a, (__m512)b); }
#else
static inline Vec vmax(Vec a, Vec b) { return select(a > b, a, b); }
static inline Vec vmin(Vec a, Vec b) { return select(a < b, a, b); }
#endif
static inline Vec vabs(Vec a) { return (Vec)((VecInt)a & 0x7fffffff); }

// 2^x = 2^k (1 + r q(r)), k = round(x), |r| <= 1/2; q fitted for least relative error (9e-8).
// exp2(0) is exactly 1, so that a step of Δ = 0 is exactly the identity.
struct Exp2Parts {
  Vec k, rq;
};
static inline Exp2Parts exp2_parts(Vec x) {
#if !defined(__AVX512F__)
  x = vmin(vmax(x, splat(-126.0f)), splat(127.0f));
#endif
  const Vec round = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest integer
  Vec k = (x + round) - round;
  Vec r = x - k;
  Vec q = splat(0.001326472725f);
  q = q * r + 0.009671512786f;
  q = q * r + 0.05550733744f;
  q = q * r + 0.2402224208f;
  q = q * r + 0.6931469776f;
  return {k, q * r};
}
static inline Vec scale_by_exp2(Vec x, Vec k) {
#if defined(__AVX512F__)
  return (Vec)_mm512_scalef_ps((__m512)x, (__m512)k);
#else
  VecInt exponent = (VecInt)(k + 12582912.0f) << 23;
  return (Vec)((VecInt)x + exponent);
#endif
}
static inline Vec exp2v(Vec x) {
  Exp2Parts p = exp2_parts(x);
  return scale_by_exp2(p.rq + 1.0f, p.k);
}
// 2^x for x in [-1.5, 0], relative error 2e-7; exact at 0. Three operations in ten cheaper.
constexpr float EXP2_NEAR = -1.5f;
static inline Vec exp2_near(Vec x) {
  Vec q = splat(9.148586198e-05f);
  q = q * x + 0.001213678247f;
  q = q * x + 0.009499005581f;
  q = q * x + 0.05544230749f;
  q = q * x + 0.2402113936f;
  q = q * x + 0.6931459151f;
  return q * x + 1.0f;
}
// 2^x - 1 without cancellation near zero.
static inline Vec exp2m1(Vec x) {
  Exp2Parts p = exp2_parts(x);
  Vec power = scale_by_exp2(splat(1.0f), p.k);
  return power * p.rq + (power - 1.0f);
}
// 1 / x for x in [1, inf], to about a unit in the last place.
static inline Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
  x = vmin(x, splat(1e37f));  // an infinite x would make 0 times infinity below
  Vec guess = (Vec)_mm512_rcp14_ps((__m512)x);
  return guess * (2.0f - x * guess);
#else
  return 1.0f / x;
#endif
}
static inline Vec sigmoid(Vec x) { return reciprocal(1.0f + exp2v(x * -LOG2E)); }

// log(1 + e^x) = max(x, 0) + log1p(e^-|x|); log1p(e) = e P(e) on [0, 1], relative error 5e-9.
static inline Vec softplus(Vec x) {
  Vec e = exp2v(vabs(x) * -LOG2E);
  Vec p = splat(-0.003244015864f);
  p = p * e + 0.01985141994f;
  p = p * e - 0.05695945312f;
  p = p * e + 0.1060364642f;
  p = p * e - 0.1530558734f;
  p = p * e + 0.1967593731f;
  p = p * e - 0.2495413323f;
  p = p * e + 0.3332996237f;
  p = p * e - 0.4999990242f;
  p = p * e + 0.9999999953f;
  return vmax(x, Vec{}) + p * e;
}

// The sum over lanes, quarters of four lanes first; always in the same order.
static inline float sum_lanes(const Vec &x) {
  typedef float Quad __attribute__((vector_size(16), may_alias));
  const Quad *quads = reinterpret_cast<const Quad *>(&x);
  Quad sum = quads[0];
  for (int i = 1; i < LANES / 4; ++i) sum += quads[i];
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

// Threads worth waking for so many elementary steps, at most one an item: a wake-up costs
// microseconds, and far more where other programs want the same cores.
static inline int worthwhile(int threads, int64_t items, int64_t steps) {
  int64_t useful = 1 + steps / 65536;
  return (int)std::max<int64_t>(1, std::min({(int64_t)threads, items, useful}));
}

// Scratch memory of one work item, aligned to a vector.
struct Scratch {
  explicit Scratch(size_t vectors)
      : data(static_cast<Vec *>(std::aligned_alloc(sizeof(Vec), sizeof(Vec) * (vectors + 1)))) {}
  Vec *get() const { return data.get(); }

 private:
  struct Free {
    void operator()(void *p) const { std::free(p); }
  };
  std::unique_ptr<Vec, Free> data;
};
