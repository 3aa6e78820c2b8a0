// RMS normalisation on the CPU, forward and backward.
//
// A work item is a chunk of rows; partial sums of the weight's gradient are added in their order.
#include <cmath>

#include "../simd.h"

constexpr int64_t CHUNK = 256;  // rows of a work item

extern "C" {

struct NormArgs {
  int64_t rows, dim;
  const float *x, *weight;  // (rows, dim), (dim,)
  float *y;
  const float *dy;
  float *dx, *dweight;
  float epsilon;
  int32_t threads;
};
}

namespace {

int lanes_at(const NormArgs &a, int64_t c) { return (int)std::min<int64_t>(LANES, a.dim - c); }

// 1 / rms of a row.
float inverse_rms(const NormArgs &a, const float *x) {
  Vec sum{};
  for (int64_t c = 0; c < a.dim; c += LANES) {
    Vec v = load(x + c, lanes_at(a, c));
    sum += v * v;
  }
  return 1.0f / std::sqrt(sum_lanes(sum) / (float)a.dim + a.epsilon);
}

template <typename Visit>
void for_chunks(const NormArgs &a, Visit visit) {
  const int64_t chunks = (a.rows + CHUNK - 1) / CHUNK;
  const int threads = worthwhile(a.threads, chunks, a.rows * a.dim);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < chunks; ++i) visit(i, i * CHUNK, std::min(a.rows, (i + 1) * CHUNK));
}

}  // namespace

extern "C" {

void flexbench_norm_forward(const NormArgs *args) {
  const NormArgs &a = *args;
  for_chunks(a, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float *x = a.x + r * a.dim;
      const float scale = inverse_rms(a, x);
      for (int64_t c = 0; c < a.dim; c += LANES) {
        int lanes = lanes_at(a, c);
        store(a.y + r * a.dim + c, load(x + c, lanes) * scale * load(a.weight + c, lanes), lanes);
      }
    }
  });
}

// With s = 1 / rms and g = dy weight: dx = s g - s^3 mean(g x) x, dweight = sum of dy s x.
void flexbench_norm_backward(const NormArgs *args) {
  const NormArgs &a = *args;
  const int64_t chunks = (a.rows + CHUNK - 1) / CHUNK;
  std::unique_ptr<float[]> parts(new float[chunks * a.dim]());
  for_chunks(a, [&](int64_t i, int64_t begin, int64_t end) {
    float *dweight = parts.get() + i * a.dim;
    for (int64_t r = begin; r < end; ++r) {
      const float *x = a.x + r * a.dim, *dy = a.dy + r * a.dim;
      const float scale = inverse_rms(a, x);
      Vec along{};
      for (int64_t c = 0; c < a.dim; c += LANES) {
        int lanes = lanes_at(a, c);
        Vec normed = load(x + c, lanes) * load(dy + c, lanes);
        along += normed * load(a.weight + c, lanes);
        store(dweight + c, load(dweight + c, lanes) + normed * scale, lanes);
      }
      const float back = scale * scale * scale * sum_lanes(along) / (float)a.dim;
      for (int64_t c = 0; c < a.dim; c += LANES) {
        int lanes = lanes_at(a, c);
        Vec g = load(dy + c, lanes) * load(a.weight + c, lanes);
        store(a.dx + r * a.dim + c, g * scale - load(x + c, lanes) * back, lanes);
      }
    }
  });
  for (int64_t c = 0; c < a.dim; ++c) a.dweight[c] = 0;
  for (int64_t i = 0; i < chunks; ++i)
    for (int64_t c = 0; c < a.dim; ++c) a.dweight[c] += parts[i * a.dim + c];
}
}
