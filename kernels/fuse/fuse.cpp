// HZip-Mamba's gated fusion of two scans on the CPU, forward and backward (the formulas are in
// fuse/__init__.py).
//
// Channels lie in the vector lanes. A work item is a chunk of a sequence, walked in tiles whose
// features, hidden layer and gates live in the cache and are never written to memory; the backward
// pass computes them again. Every sum has a fixed order that depends on the shapes alone.
#include <cmath>
#include <type_traits>
#include <utility>
#include <vector>

#include "../simd.h"

constexpr int64_t CHUNK = 512;  // steps of a work item
constexpr int64_t TILE = 32;    // steps whose intermediate values stay in the cache
constexpr float EPSILON = 1e-5f;

extern "C" {

// Rows are (tokens, dim) or (tokens, hidden) with a stride in floats; null where not given.
struct FuseArgs {
  int64_t sequences, dim, width, hidden_width, features, window;
  int64_t y_f_stride, y_b_stride, z_stride, hidden_stride, dout_stride;
  const int32_t *cu_seqlens;  // (sequences + 1,)
  // taps (dim, 2, width), down (hidden, features, dim), up (2, dim, hidden / 2),
  // diagonal (2, features, dim), bias (2, dim)
  const float *y_f, *y_b, *z, *taps, *taps_bias, *down, *hidden, *hidden_bias, *up, *diagonal, *bias;
  float *out;
  const float *dout;
  float *dy_f, *dy_b, *dz, *dtaps, *dtaps_bias, *ddown, *dhidden, *dhidden_bias, *dup, *ddiagonal,
      *dbias;
  int32_t centred, normalise, softmax, threads;
};
}

namespace {

// out[i][j] += sum over k of a[i][k] w[k][j]: scalars of a row times vectors. Strides are in floats
// for a, in vectors for the rest.
template <int ROWS, int COLS>
inline void multiply_block(Vec *out, int64_t out_step, const float *a, int64_t a_step, int64_t depth,
                           const Vec *w, int64_t w_step) {
  Vec sum[ROWS][COLS];
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < COLS; ++j) sum[i][j] = out[i * out_step + j];
  for (int64_t k = 0; k < depth; ++k)
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < COLS; ++j) sum[i][j] += a[i * a_step + k] * w[k * w_step + j];
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < COLS; ++j) out[i * out_step + j] = sum[i][j];
}
void multiply(Vec *out, int64_t out_step, const float *a, int64_t a_step, int64_t rows, int64_t depth,
              const Vec *w, int64_t cols) {
  int64_t j = 0;
  for (; j + 2 <= cols; j += 2) {
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4)
      multiply_block<4, 2>(out + i * out_step + j, out_step, a + i * a_step, a_step, depth, w + j, cols);
    for (; i < rows; ++i)
      multiply_block<1, 2>(out + i * out_step + j, out_step, a + i * a_step, a_step, depth, w + j, cols);
  }
  if (j == cols) return;
  int64_t i = 0;
  for (; i + 8 <= rows; i += 8)
    multiply_block<8, 1>(out + i * out_step + j, out_step, a + i * a_step, a_step, depth, w + j, cols);
  for (; i < rows; ++i)
    multiply_block<1, 1>(out + i * out_step + j, out_step, a + i * a_step, a_step, depth, w + j, cols);
}

// out[k][j] += sum over rows i of a[i][k] x[i][j].
template <int DEPTH>
inline void outer_block(Vec *out, int64_t cols, const float *a, int64_t a_step, int64_t rows,
                        const Vec *x, int64_t x_step) {
  Vec sum[DEPTH];
  for (int k = 0; k < DEPTH; ++k) sum[k] = out[k * cols];
  for (int64_t i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int k = 0; k < DEPTH; ++k) sum[k] += a[i * a_step + k] * x[i * x_step];
  for (int k = 0; k < DEPTH; ++k) out[k * cols] = sum[k];
}
void outer(Vec *out, const float *a, int64_t a_step, int64_t rows, int64_t depth, const Vec *x,
           int64_t x_step, int64_t cols) {
  for (int64_t j = 0; j < cols; ++j) {
    int64_t k = 0;
    for (; k + 8 <= depth; k += 8)
      outer_block<8>(out + k * cols + j, cols, a + k, a_step, rows, x + j, x_step);
    for (; k < depth; ++k) outer_block<1>(out + k * cols + j, cols, a + k, a_step, rows, x + j, x_step);
  }
}

// The parameters, or their gradients, with channels (or hidden units) in the last place, padded with
// zeros to whole vectors.
struct Weights {
  const FuseArgs &a;
  const int64_t blocks, hidden_blocks, rank;
  Vec *taps, *taps_bias, *down, *hidden_bias, *up, *diagonal, *bias;

  Weights(const FuseArgs &args, Vec *at)
      : a(args), blocks((a.dim + LANES - 1) / LANES), hidden_blocks((a.hidden_width + LANES - 1) / LANES),
        rank(a.hidden_width / 2) {
    Vec *start = at;
    auto take = [&](int64_t rows, int64_t vectors) { return std::exchange(at, at + rows * vectors); };
    taps = take(2 * a.width, blocks), taps_bias = take(1, blocks);
    down = take(a.hidden_width, a.features * blocks), hidden_bias = take(1, hidden_blocks);
    up = take(2 * rank, blocks), diagonal = take(2 * a.features, blocks), bias = take(2, blocks);
    vectors = at - start;
  }
  static int64_t size(const FuseArgs &a) { return Weights(a, nullptr).vectors; }

  // Visits every number as (given, here), where given holds the parameters as the caller has them.
  template <typename Pointer, typename Visit>
  void pair(Pointer taps_, Pointer taps_bias_, Pointer down_, Pointer hidden_bias_, Pointer up_,
            Pointer diagonal_, Pointer bias_, Visit visit) const {
    auto at = [](Vec *base, int64_t i) -> float & { return reinterpret_cast<float *>(base)[i]; };
    const int64_t D = a.dim, wide = blocks * LANES, W = a.width, F = a.features, R = a.hidden_width;
    for (int64_t c = 0; c < D; ++c) {
      for (int64_t k = 0; taps_ && k < 2 * W; ++k) visit(taps_[c * 2 * W + k], at(taps, k * wide + c));
      if (taps_bias_) visit(taps_bias_[c], at(taps_bias, c));
      for (int64_t g = 0; g < 2; ++g) {
        for (int64_t r = 0; up_ && r < rank; ++r)
          visit(up_[(g * D + c) * rank + r], at(up, (g * rank + r) * wide + c));
        for (int64_t f = 0; diagonal_ && f < F; ++f)
          visit(diagonal_[(g * F + f) * D + c], at(diagonal, (g * F + f) * wide + c));
        if (bias_) visit(bias_[g * D + c], at(bias, g * wide + c));
      }
    }
    for (int64_t r = 0; r < R; ++r) {
      for (int64_t f = 0; down_ && f < F; ++f)
        for (int64_t c = 0; c < D; ++c)
          visit(down_[(r * F + f) * D + c], at(down, (r * F + f) * wide + c));
      if (hidden_bias_) visit(hidden_bias_[r], at(hidden_bias, r));
    }
  }

  int64_t vectors = 0;
};

// A call's parameters, and the transposes by which gradients go back and features go in.
struct Parameters {
  Scratch memory;
  Weights w;
  Scratch transposed;
  Vec *down, *up;  // (features * padded dim, hidden blocks), (2 * padded dim, hidden blocks)

  explicit Parameters(const FuseArgs &a)
      : memory(Weights::size(a)), w(a, memory.get()),
        transposed((a.features + 2) * w.blocks * LANES * w.hidden_blocks) {
    std::fill_n(memory.get(), w.vectors, Vec{});
    w.pair(a.taps, a.taps_bias, a.down, a.hidden_bias, a.up, a.diagonal, a.bias,
           [](float given, float &here) { here = given; });
    const int64_t wide = w.blocks * LANES, units = w.hidden_blocks * LANES;
    down = transposed.get(), up = down + a.features * wide * w.hidden_blocks;
    std::fill_n(down, (a.features + 2) * wide * w.hidden_blocks, Vec{});
    const float *from = reinterpret_cast<float *>(w.down), *above = reinterpret_cast<float *>(w.up);
    float *to = reinterpret_cast<float *>(down), *below = reinterpret_cast<float *>(up);
    for (int64_t r = 0; r < a.hidden_width; ++r)
      for (int64_t c = 0; c < a.features * wide; ++c) to[c * units + r] = from[r * a.features * wide + c];
    for (int64_t r = 0; r < 2 * w.rank; ++r)  // hidden unit r belongs to one of the two gates
      for (int64_t c = 0; c < wide; ++c) below[((r / w.rank) * wide + c) * units + r] = above[r * wide + c];
  }
};

struct Chunk {
  int64_t start, end;    // of the sequence
  int64_t begin, until;  // of the chunk
};

std::vector<Chunk> cut(const FuseArgs &a) {
  std::vector<Chunk> chunks;
  for (int64_t s = 0; s < a.sequences; ++s)
    for (int64_t t = a.cu_seqlens[s]; t < a.cu_seqlens[s + 1]; t += CHUNK)
      chunks.push_back({a.cu_seqlens[s], a.cu_seqlens[s + 1], t,
                        std::min<int64_t>(a.cu_seqlens[s + 1], t + CHUNK)});
  return chunks;
}

// What is computed of a few steps, `low` to `high`, of a sequence. Readings of both scans reach
// `reach` steps further, zeros beyond the sequence's ends.
class Tile {
 public:
  Tile(const FuseArgs &args, const Parameters &parameters)
      : a(args), p(parameters), w(parameters.w), blocks(w.blocks), hidden_blocks(w.hidden_blocks),
        context(a.taps ? 1 : 0), half(a.width / 2), reach(std::max(half, a.window)),
        memory((TILE + 2 * reach) * ((7 + 2 * a.features) * blocks + 3 * hidden_blocks) +
               8 * reach * blocks),
        scales((TILE + 2 * reach) * 3) {
    const int64_t rows = TILE + 2 * reach;
    Vec *at = memory.get();
    auto take = [&](int64_t count, int64_t vectors) { return std::exchange(at, at + count * vectors); };
    y[0] = take(rows + 2 * reach, blocks), y[1] = take(rows + 2 * reach, blocks);
    dy[0] = take(rows + 2 * reach, blocks), dy[1] = take(rows + 2 * reach, blocks);
    before = take(rows, blocks), x = take(rows, a.features * blocks), dx = take(rows, a.features * blocks);
    hidden = take(rows, hidden_blocks), active = take(rows, hidden_blocks);
    dhidden = take(rows, hidden_blocks), logits = take(rows, 2 * blocks);
  }

  void forward(const Chunk &chunk, int64_t begin, int64_t until) {
    gates(chunk, begin, until);
    for (int64_t t = low; t < high; ++t)
      for_blocks([&](int64_t j, int64_t channel, auto lanes) {
        Vec f, b;
        open(t - low, j, f, b);
        Vec fused = f * y[0][reading(t, j)] + b * y[1][reading(t, j)];
        if (a.z) {
          Vec z = load(a.z + t * a.z_stride + channel, lanes);
          fused *= z * sigmoid(z);
        }
        store(a.out + t * a.dim + channel, fused, lanes);
      });
  }

  // Gradients of steps begin to until. Those of the readings also come from `reach` steps on either
  // side, which are computed once more; the parameters' come from the tile's own steps.
  void backward(const Chunk &chunk, int64_t begin, int64_t until, const Weights &d) {
    gates(chunk, std::max(chunk.start, begin - reach), std::min(chunk.end, until + reach));
    const int64_t rows = high - low, own = begin - low, owned = until - begin;
    for (Vec *each : dy) std::fill_n(each, (rows + 2 * reach) * blocks, Vec{});
    for (int64_t t = low; t < high; ++t) close(t, t >= begin && t < until, d);
    if (a.features) std::fill_n(dx, rows * a.features * blocks, Vec{});
    if (a.diagonal) back_through_diagonal(rows, own, owned, d);
    if (a.up) back_through_hidden(rows, own, owned, d);
    if (a.features && a.normalise) back_through_norm(rows);
    if (context) back_through_context(rows, own, owned, d);
    if (a.window) back_through_rates(rows);
    for (int64_t t = begin; t < until; ++t)
      for_blocks([&](int64_t j, int64_t channel, auto lanes) {
        store(a.dy_f + t * a.dim + channel, dy[0][reading(t, j)], lanes);
        store(a.dy_b + t * a.dim + channel, dy[1][reading(t, j)], lanes);
      });
  }

 private:
  const FuseArgs &a;
  const Parameters &p;
  const Weights &w;
  const int64_t blocks, hidden_blocks, context, half, reach;
  Scratch memory;
  std::vector<float> scales;  // of each step's features, where they are normalised
  Vec *y[2], *dy[2];          // readings: steps low - reach to high + reach
  Vec *before;                // the context before its SiLU
  Vec *x, *dx;                // features as the gates see them
  Vec *hidden, *active, *dhidden, *logits;
  int64_t start = 0, end = 0, low = 0, high = 0;

  int64_t reading(int64_t t, int64_t j) const { return (t - low + reach) * blocks + j; }

  template <typename Visit>
  void for_blocks(Visit visit) const {
    int64_t j = 0;
    for (; (j + 1) * LANES <= a.dim; ++j) visit(j, j * LANES, std::integral_constant<int, LANES>());
    if (j < blocks) visit(j, j * LANES, (int)(a.dim - j * LANES));
  }

  // Visits the steps that G of direction g at step t compares t with: t - 1 .. t - window for the
  // forward scan, t + 1 .. t + window for the backward one, or both.
  template <typename Visit>
  int64_t for_compared(int g, int64_t t, Visit visit) const {
    int64_t count = 0;
    for (int side : {0, 1}) {
      if (side != g && !a.centred) continue;
      for (int64_t step = 1; step <= a.window; ++step) {
        int64_t other = side ? t + step : t - step;
        if (other >= start && other < end) visit(other), ++count;
      }
    }
    return count;
  }

  void gates(const Chunk &chunk, int64_t from, int64_t to) {
    start = chunk.start, end = chunk.end, low = from, high = to;
    for (int64_t t = low - reach; t < high + reach; ++t) {
      const bool inside = t >= start && t < end;
      for_blocks([&](int64_t j, int64_t channel, auto lanes) {
        y[0][reading(t, j)] = inside ? load(a.y_f + t * a.y_f_stride + channel, lanes) : Vec{};
        y[1][reading(t, j)] = inside ? load(a.y_b + t * a.y_b_stride + channel, lanes) : Vec{};
      });
    }
    for (int64_t t = low; t < high; ++t) {
      Vec *features = x + (t - low) * a.features * blocks;
      if (context) compute_context(t, features);
      for (int g = 0; a.window && g < 2; ++g) compute_rate(g, t, features + (context + g) * blocks);
      for (int64_t f = 0; a.normalise && f < a.features; ++f)
        scales[(t - low) * 3 + f] = normalise(features + f * blocks);
    }
    if (a.up) compute_hidden();
    compute_logits();
  }

  void compute_context(int64_t t, Vec *to) {
    for (int64_t j = 0; j < blocks; ++j) {
      Vec sum = w.taps_bias[j];
      for (int64_t g = 0; g < 2; ++g)
        for (int64_t k = 0; k < a.width; ++k)
          sum += w.taps[(g * a.width + k) * blocks + j] * y[g][reading(t - half + k, j)];
      before[(t - low) * blocks + j] = sum;
      to[j] = sum * sigmoid(sum);
    }
  }

  void compute_rate(int g, int64_t t, Vec *to) {
    std::fill_n(to, blocks, Vec{});
    int64_t count = for_compared(g, t, [&](int64_t other) {
      for (int64_t j = 0; j < blocks; ++j)
        to[j] += vabs(y[g][reading(t, j)] - y[g][reading(other, j)]);
    });
    for (int64_t j = 0; count > 1 && j < blocks; ++j) to[j] *= 1.0f / (float)count;
  }

  float normalise(Vec *feature) {
    Vec sum{};
    for (int64_t j = 0; j < blocks; ++j) sum += feature[j] * feature[j];
    float scale = 1.0f / std::sqrt(sum_lanes(sum) / (float)a.dim + EPSILON);
    for (int64_t j = 0; j < blocks; ++j) feature[j] *= scale;
    return scale;
  }

  void compute_hidden() {
    for (int64_t t = low; t < high; ++t)
      for (int64_t j = 0; j < hidden_blocks; ++j) {
        Vec sum = w.hidden_bias[j];
        int lanes = (int)std::min<int64_t>(LANES, a.hidden_width - j * LANES);
        if (a.hidden) sum += load(a.hidden + t * a.hidden_stride + j * LANES, lanes);
        hidden[(t - low) * hidden_blocks + j] = sum;
      }
    if (a.down) {
      const int64_t depth = a.features * blocks * LANES;
      multiply(hidden, hidden_blocks, reinterpret_cast<float *>(x), depth, high - low, depth, p.down,
               hidden_blocks);
    }
    for (int64_t i = 0; i < (high - low) * hidden_blocks; ++i) active[i] = hidden[i] * sigmoid(hidden[i]);
  }

  void compute_logits() {
    for (int64_t i = 0; i < high - low; ++i)
      for (int64_t gj = 0; gj < 2 * blocks; ++gj) {
        Vec sum = w.bias[gj];
        const int64_t g = gj / blocks, j = gj % blocks;
        for (int64_t f = 0; a.diagonal && f < a.features; ++f)
          sum += w.diagonal[(g * a.features + f) * blocks + j] * x[(i * a.features + f) * blocks + j];
        logits[i * 2 * blocks + gj] = sum;
      }
    for (int64_t g = 0; a.up && g < 2; ++g)
      multiply(logits + g * blocks, 2 * blocks, reinterpret_cast<float *>(active) + g * w.rank,
               hidden_blocks * LANES, high - low, w.rank, w.up + g * w.rank * blocks, blocks);
  }

  void open(int64_t i, int64_t j, Vec &f, Vec &b) const {
    const Vec *logit = logits + i * 2 * blocks + j;
    if (a.softmax)
      f = sigmoid(logit[0] - logit[blocks]), b = 1.0f - f;
    else
      f = sigmoid(logit[0]), b = sigmoid(logit[blocks]);
  }

  // Back through z and the weighted sum of step t; the logits give way to their gradients.
  void close(int64_t t, bool own, const Weights &d) {
    for_blocks([&](int64_t j, int64_t channel, auto lanes) {
      Vec f, b;
      open(t - low, j, f, b);
      Vec y_f = y[0][reading(t, j)], y_b = y[1][reading(t, j)];
      Vec dfused = load(a.dout + t * a.dout_stride + channel, lanes);
      if (a.z) {
        Vec z = load(a.z + t * a.z_stride + channel, lanes), s = sigmoid(z);
        if (own) {
          Vec dz = dfused * (f * y_f + b * y_b) * (s * (1.0f + z * (1.0f - s)));
          store(a.dz + t * a.dim + channel, dz, lanes);
        }
        dfused *= z * s;
      }
      dy[0][reading(t, j)] = dfused * f, dy[1][reading(t, j)] = dfused * b;
      Vec *logit = logits + (t - low) * 2 * blocks + j;
      if (a.softmax) {
        logit[0] = dfused * (y_f - y_b) * f * b;
        logit[blocks] = -logit[0];
      } else {
        logit[0] = dfused * y_f * f * (1.0f - f);
        logit[blocks] = dfused * y_b * b * (1.0f - b);
      }
      if (own) d.bias[j] += logit[0], d.bias[blocks + j] += logit[blocks];
    });
  }

  void back_through_diagonal(int64_t rows, int64_t own, int64_t owned, const Weights &d) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t g = 0; g < 2; ++g)
        for (int64_t f = 0; f < a.features; ++f)
          for (int64_t j = 0; j < blocks; ++j) {
            const int64_t at = (g * a.features + f) * blocks + j, feature = (i * a.features + f) * blocks + j;
            Vec dlogit = logits[(i * 2 + g) * blocks + j];
            dx[feature] += w.diagonal[at] * dlogit;
            if (i >= own && i < own + owned) d.diagonal[at] += dlogit * x[feature];
          }
  }

  void back_through_hidden(int64_t rows, int64_t own, int64_t owned, const Weights &d) {
    const int64_t units = hidden_blocks * LANES, wide = a.features * blocks;
    const float *dlogits = reinterpret_cast<float *>(logits);
    std::fill_n(dhidden, rows * hidden_blocks, Vec{});
    multiply(dhidden, hidden_blocks, dlogits, 2 * blocks * LANES, rows, 2 * blocks * LANES, p.up,
             hidden_blocks);
    for (int64_t i = 0; i < rows * hidden_blocks; ++i) {
      Vec s = sigmoid(hidden[i]);
      dhidden[i] *= s * (1.0f + hidden[i] * (1.0f - s));
    }
    for (int64_t g = 0; g < 2; ++g)
      outer(d.up + g * w.rank * blocks, reinterpret_cast<float *>(active + own * hidden_blocks) + g * w.rank,
            units, owned, w.rank, logits + (own * 2 + g) * blocks, 2 * blocks, blocks);
    for (int64_t i = own; i < own + owned; ++i)
      for (int64_t j = 0; j < hidden_blocks; ++j) {
        Vec here = dhidden[i * hidden_blocks + j];
        d.hidden_bias[j] += here;
        int lanes = (int)std::min<int64_t>(LANES, a.hidden_width - j * LANES);
        if (a.hidden) store(a.dhidden + (low + i) * a.hidden_width + j * LANES, here, lanes);
      }
    if (!a.down) return;
    const float *gradient = reinterpret_cast<float *>(dhidden);
    outer(d.down, gradient + own * units, units, owned, a.hidden_width, x + own * wide, wide, wide);
    multiply(dx, wide, gradient, units, rows, a.hidden_width, w.down, wide);
  }

  void back_through_norm(int64_t rows) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t f = 0; f < a.features; ++f) {
        Vec *gradient = dx + (i * a.features + f) * blocks, along{};
        const Vec *feature = x + (i * a.features + f) * blocks;
        for (int64_t j = 0; j < blocks; ++j) along += gradient[j] * feature[j];
        const float mean = sum_lanes(along) / (float)a.dim, scale = scales[i * 3 + f];
        for (int64_t j = 0; j < blocks; ++j) gradient[j] = (gradient[j] - feature[j] * mean) * scale;
      }
  }

  void back_through_context(int64_t rows, int64_t own, int64_t owned, const Weights &d) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < blocks; ++j) {
        const bool mine = i >= own && i < own + owned;
        Vec sum = before[i * blocks + j], s = sigmoid(sum);
        Vec dsum = dx[i * a.features * blocks + j] * (s * (1.0f + sum * (1.0f - s)));
        if (mine) d.taps_bias[j] += dsum;
        for (int64_t g = 0; g < 2; ++g)
          for (int64_t k = 0; k < a.width; ++k) {
            const int64_t tap = (g * a.width + k) * blocks + j, from = reading(low + i - half + k, j);
            dy[g][from] += w.taps[tap] * dsum;
            if (mine) d.taps[tap] += dsum * y[g][from];
          }
      }
  }

  void back_through_rates(int64_t rows) {
    for (int64_t t = low; t < low + rows; ++t)
      for (int g = 0; g < 2; ++g) {
        const Vec *gradient = dx + ((t - low) * a.features + context + g) * blocks;
        const int64_t count = for_compared(g, t, [](int64_t) {});
        for_compared(g, t, [&](int64_t other) {
          for (int64_t j = 0; j < blocks; ++j) {
            Vec difference = y[g][reading(t, j)] - y[g][reading(other, j)];
            Vec share = gradient[j] * (1.0f / (float)count);
            Vec slope = select(difference > 0.0f, share, select(difference < 0.0f, -share, Vec{}));
            dy[g][reading(t, j)] += slope, dy[g][reading(other, j)] -= slope;
          }
        });
      }
  }
};

}  // namespace

extern "C" {

void flexbench_fuse_forward(const FuseArgs *args) {
  const FuseArgs &a = *args;
  const std::vector<Chunk> chunks = cut(a);
  const Parameters parameters(a);
  const int threads = worthwhile(a.threads, chunks.size(), a.cu_seqlens[a.sequences] * a.dim);
#pragma omp parallel num_threads(threads)
  {
    Tile tile(a, parameters);
#pragma omp for schedule(static)
    for (size_t i = 0; i < chunks.size(); ++i)
      for (int64_t t = chunks[i].begin; t < chunks[i].until; t += TILE)
        tile.forward(chunks[i], t, std::min(chunks[i].until, t + TILE));
  }
}

void flexbench_fuse_backward(const FuseArgs *args) {
  const FuseArgs &a = *args;
  const std::vector<Chunk> chunks = cut(a);
  const Parameters parameters(a);
  const int64_t size = parameters.w.vectors;
  Scratch parts(chunks.size() * size + size);
  Vec *total = parts.get() + chunks.size() * size;
  std::fill_n(parts.get(), chunks.size() * size + size, Vec{});
  const int threads = worthwhile(a.threads, chunks.size(), a.cu_seqlens[a.sequences] * a.dim);
#pragma omp parallel num_threads(threads)
  {
    Tile tile(a, parameters);
#pragma omp for schedule(static)
    for (size_t i = 0; i < chunks.size(); ++i) {
      const Weights gradients(a, parts.get() + i * size);
      for (int64_t t = chunks[i].begin; t < chunks[i].until; t += TILE)
        tile.backward(chunks[i], t, std::min(chunks[i].until, t + TILE), gradients);
    }
  }
  for (size_t i = 0; i < chunks.size(); ++i)
    for (int64_t j = 0; j < size; ++j) total[j] += parts.get()[i * size + j];
  Weights(a, total).pair(a.dtaps, a.dtaps_bias, a.ddown, a.dhidden_bias, a.dup, a.ddiagonal, a.dbias,
                         [](float &given, float here) { given = here; });
}
}
