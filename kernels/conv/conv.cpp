// Causal depthwise convolution with optional SiLU on the CPU, forward and backward.
//
// Channels lie in the vector lanes; a work item is a chunk of a sequence, all channels. Partial sums
// of the weights' gradients are added in the order of the chunks, whatever the number of threads.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "../simd.h"

constexpr int64_t CHUNK = 256;  // steps of a work item
constexpr int64_t TILE = 32;    // steps that stay in the first-level cache
constexpr int GROUP = 4;        // steps computed side by side

extern "C" {

struct ConvArgs {
  int64_t sequences, dim, width;
  int64_t x_stride, dy_stride;
  const int32_t *cu_seqlens;
  const float *x, *weight, *bias;  // (tokens, dim), (dim, width), (dim,)
  float *y;
  const float *dy;
  float *dx, *dweight, *dbias;
  int32_t silu, reverse, threads;
};
}

namespace {

struct Chunk {
  int64_t first_row, step, length, begin, end;  // steps begin .. end of a sequence of that length
  int64_t row(int64_t t) const { return first_row + step * t; }
};

std::vector<Chunk> cut(const ConvArgs &a) {
  std::vector<Chunk> chunks;
  for (int64_t s = 0; s < a.sequences; ++s) {
    int64_t start = a.cu_seqlens[s], end = a.cu_seqlens[s + 1], length = end - start;
    for (int64_t begin = 0; begin < length; begin += CHUNK)
      chunks.push_back({a.reverse ? end - 1 : start, a.reverse ? -1 : 1, length, begin,
                        std::min(length, begin + CHUNK)});
  }
  return chunks;
}

// The weights with channels in the last place: taps[k * dim + channel], the bias as row `width`.
std::vector<float> transpose_taps(const ConvArgs &a) {
  std::vector<float> taps(a.dim * (a.width + 1), 0.0f);
  for (int64_t c = 0; c < a.dim; ++c) {
    for (int64_t k = 0; k < a.width; ++k) taps[k * a.dim + c] = a.weight[c * a.width + k];
    if (a.bias) taps[a.width * a.dim + c] = a.bias[c];
  }
  return taps;
}

// Visits steps in tiles whose rows stay in the cache while the channel blocks take their turns.
template <typename Visit>
void for_tiles(const ConvArgs &a, int64_t begin, int64_t end, Visit visit) {
  for (int64_t from = begin; from < end; from += TILE) {
    int64_t to = std::min(end, from + TILE);
    for (int64_t channel = 0; channel < a.dim; channel += LANES) {
      if (a.dim - channel >= LANES)
        visit(from, to, channel, std::integral_constant<int, LANES>());
      else
        visit(from, to, channel, (int)(a.dim - channel));
    }
  }
}

// Visits steps in groups. One step is a long chain of operations, each waiting for the one before; a
// core overlaps the chains of several steps where they stand close together in the program.
template <typename Visit>
void for_groups(int64_t from, int64_t to, Visit visit) {
  int64_t t = from;
  for (; t + GROUP <= to; t += GROUP) visit(t, std::integral_constant<int, GROUP>());
  for (; t < to; ++t) visit(t, std::integral_constant<int, 1>());
}

// A channel block's rows by the steps of a chunk. Local copies of pointer and stride, which the compiler
// would otherwise read anew after every store.
template <typename Float>
struct Rows {
  Float *first;
  int64_t stride;
  Rows(Float *base, int64_t width, const Chunk &c, int64_t channel)
      : first(base + c.first_row * width + channel), stride(c.step * width) {}
  Float *operator[](int64_t t) const { return first + t * stride; }
};

// The taps of a channel block, and its inputs from W - 1 steps before a group on.
template <int W, typename Lanes>
struct Window {
  Rows<const float> rows;
  Lanes lanes;
  Vec weight[W], bias, x[W - 1 + GROUP];
  Window(const ConvArgs &a, const Chunk &c, const float *taps, int64_t from, int64_t channel, Lanes lanes)
      : rows(a.x, a.x_stride, c, channel), lanes(lanes), bias(load(taps + W * a.dim + channel, lanes)) {
    for (int k = 0; k < W; ++k) weight[k] = load(taps + k * a.dim + channel, lanes);
    for (int k = 0; k + 1 < W; ++k) {
      int64_t t = from - (W - 1) + k;
      x[k] = t < 0 ? Vec{} : load(rows[t], lanes);
    }
  }
  // Takes in the steps t .. t + N - 1; `sum` is what goes into their activation.
  template <int N>
  void read(int64_t t, Vec (&sum)[N]) {
    for (int i = 0; i < N; ++i) x[W - 1 + i] = load(rows[t + i], lanes);
    for (int i = 0; i < N; ++i) {
      sum[i] = bias;
      for (int k = 0; k < W; ++k) sum[i] += weight[k] * x[i + k];
    }
  }
};

// Moves what the next group needs of this one, its last W - 1 values, to the front.
template <int W, int N>
void shift(Vec *values) {
  for (int k = 0; k + 1 < W; ++k) values[k] = values[N + k];
}

template <int W, bool SILU>
void forward_chunk(const ConvArgs &a, const Chunk &c, const float *taps) {
  for_tiles(a, c.begin, c.end, [&](int64_t from, int64_t to, int64_t channel, auto lanes) {
    Window<W, decltype(lanes)> window(a, c, taps, from, channel, lanes);
    Rows<float> y(a.y, a.dim, c, channel);
    for_groups(from, to, [&](int64_t t, auto count) {
      constexpr int N = count;
      Vec sum[N];
      window.read(t, sum);
      for (int i = 0; i < N; ++i) store(y[t + i], SILU ? sum[i] * sigmoid(sum[i]) : sum[i], lanes);
      shift<W, N>(window.x);
    });
  });
}

// dx[t] needs the gradients before the activation of steps t .. t + W - 1: those of a tile's last W - 1
// steps go to the next tile in the rows behind `dtaps`, and a chunk computes those of the W - 1 steps
// after it once more, which count for the weights in their own chunk alone.
template <int W, bool SILU>
void backward_chunk(const ConvArgs &a, const Chunk &c, const float *taps, float *dtaps) {
  float *carry = dtaps + a.dim * (W + 1);
  std::fill_n(dtaps, a.dim * 2 * W, 0.0f);
  const int64_t after = std::min(c.length, c.end + W - 1);
  auto tile = [&](int64_t from, int64_t to, int64_t channel, auto lanes, bool own) {
    Window<W, decltype(lanes)> window(a, c, taps, from, channel, lanes);
    Rows<const float> dy(a.dy, a.dy_stride, c, channel);
    Rows<float> dx(a.dx, a.dim, c, channel);
    Vec g[W - 1 + GROUP];  // from W - 1 steps before the group on, as window.x
    Vec dw[W + 1]{};       // of this tile alone: a sum in two stages rounds less
    for (int k = 0; k + 1 < W; ++k) g[k] = load(carry + k * a.dim + channel, lanes);
    auto emit = [&](int64_t t, const Vec *g) {
      Vec sum{};
      for (int k = 0; k < W; ++k) sum += window.weight[W - 1 - k] * g[k];
      if (t >= c.begin) store(dx[t], sum, lanes);
    };
    for_groups(from, std::min(to, after), [&](int64_t t, auto count) {
      constexpr int N = count;
      Vec sum[N], open[N];
      window.read(t, sum);
      for (int i = 0; i < N; ++i) open[i] = sigmoid(sum[i]);
      for (int i = 0; i < N; ++i) {
        g[W - 1 + i] = load(dy[t + i], lanes);
        if (SILU) g[W - 1 + i] *= open[i] + sum[i] * open[i] * (1.0f - open[i]);
      }
      if (own)
        for (int i = 0; i < N; ++i) {
          for (int k = 0; k < W; ++k) dw[k] += g[W - 1 + i] * window.x[i + k];
          dw[W] += g[W - 1 + i];
        }
      for (int i = 0; i < N; ++i) emit(t + i - (W - 1), g + i);
      shift<W, N>(window.x);
      shift<W, N>(g);
    });
    for (int64_t t = std::max(from, after); t < to; ++t) {
      g[W - 1] = Vec{};
      emit(t - (W - 1), g);
      shift<W, 1>(g);
    }
    for (int k = 0; k + 1 < W; ++k) store(carry + k * a.dim + channel, g[k], lanes);
    for (int k = 0; k <= W; ++k) {
      float *sum = dtaps + k * a.dim + channel;
      store(sum, load(sum, lanes) + dw[k], lanes);
    }
  };
  for (bool own : {true, false})
    for_tiles(a, own ? c.begin : c.end, own ? c.end : c.end + W - 1,
              [&](int64_t from, int64_t to, int64_t channel, auto lanes) {
                tile(from, to, channel, lanes, own);
              });
}

template <int W>
void forward(const ConvArgs &a) {
  std::vector<Chunk> chunks = cut(a);
  std::vector<float> taps = transpose_taps(a);
  const int threads = worthwhile(a.threads, chunks.size(), a.cu_seqlens[a.sequences] * a.dim);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (size_t i = 0; i < chunks.size(); ++i)
    (a.silu ? forward_chunk<W, true> : forward_chunk<W, false>)(a, chunks[i], taps.data());
}

template <int W>
void backward(const ConvArgs &a) {
  std::vector<Chunk> chunks = cut(a);
  std::vector<float> taps = transpose_taps(a);
  const int64_t size = a.dim * 2 * W;
  std::unique_ptr<float[]> parts(new float[chunks.size() * size]);
  const int threads = worthwhile(a.threads, chunks.size(), a.cu_seqlens[a.sequences] * a.dim);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (size_t i = 0; i < chunks.size(); ++i)
    (a.silu ? backward_chunk<W, true> : backward_chunk<W, false>)(a, chunks[i], taps.data(),
                                                                  parts.get() + i * size);
  std::vector<float> total(a.dim * (W + 1), 0.0f);
  for (size_t i = 0; i < chunks.size(); ++i)
    for (size_t j = 0; j < total.size(); ++j) total[j] += parts[i * size + j];
  for (int64_t c = 0; c < a.dim; ++c) {
    for (int k = 0; k < W; ++k) a.dweight[c * W + k] = total[k * a.dim + c];
    if (a.dbias) a.dbias[c] = total[W * a.dim + c];
  }
}

}  // namespace

extern "C" {

void flexbench_conv_forward(const ConvArgs *a) {
  (a->width == 2 ? forward<2> : a->width == 3 ? forward<3> : forward<4>)(*a);
}
void flexbench_conv_backward(const ConvArgs *a) {
  (a->width == 2 ? backward<2> : a->width == 3 ? backward<3> : backward<4>)(*a);
}
}
