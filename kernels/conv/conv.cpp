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

// Visits a chunk in tiles whose rows stay in the cache while the channel blocks take their turns.
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

template <int W>
void forward_chunk(const ConvArgs &a, const Chunk &c, const float *taps) {
  for_tiles(a, c.begin, c.end, [&](int64_t from, int64_t to, int64_t channel, auto lanes) {
    auto x = [&](int64_t t) { return t < 0 ? Vec{} : load(a.x + c.row(t) * a.x_stride + channel, lanes); };
    Vec weight[W], window[W], bias = load(taps + W * a.dim + channel, lanes);
    for (int k = 0; k < W; ++k) weight[k] = load(taps + k * a.dim + channel, lanes);
    for (int k = 1; k < W; ++k) window[k] = x(from - W + k);
    for (int64_t t = from; t < to; ++t) {
      for (int k = 0; k + 1 < W; ++k) window[k] = window[k + 1];
      window[W - 1] = load(a.x + c.row(t) * a.x_stride + channel, lanes);
      Vec sum = bias;
      for (int k = 0; k < W; ++k) sum += weight[k] * window[k];
      if (a.silu) sum *= sigmoid(sum);
      store(a.y + c.row(t) * a.dim + channel, sum, lanes);
    }
  });
}

// dx[t] needs the gradients before the activation of steps t .. t + W - 1, so that a tile computes
// those of the W - 1 steps after it once more; only its own steps count for the weights.
template <int W>
void backward_chunk(const ConvArgs &a, const Chunk &c, const float *taps, float *dtaps) {
  std::fill_n(dtaps, a.dim * (W + 1), 0.0f);
  for_tiles(a, c.begin, c.end, [&](int64_t from, int64_t to, int64_t channel, auto lanes) {
    auto x = [&](int64_t t) { return t < 0 ? Vec{} : load(a.x + c.row(t) * a.x_stride + channel, lanes); };
    Vec weight[W], window[W], bias = load(taps + W * a.dim + channel, lanes);
    Vec after[W], dw[W + 1];  // after[k]: gradient of step t - (W - 1) + k
    for (int k = 0; k < W; ++k) weight[k] = load(taps + k * a.dim + channel, lanes);
    for (int k = 0; k <= W; ++k) dw[k] = load(dtaps + k * a.dim + channel, lanes);
    for (int k = 1; k < W; ++k) window[k] = x(from - W + k);
    for (int k = 0; k < W; ++k) after[k] = Vec{};
    auto step = [&](int64_t t, bool own) {
      for (int k = 0; k + 1 < W; ++k) window[k] = window[k + 1], after[k] = after[k + 1];
      window[W - 1] = load(a.x + c.row(t) * a.x_stride + channel, lanes);
      Vec g = load(a.dy + c.row(t) * a.dy_stride + channel, lanes);
      if (a.silu) {
        Vec sum = bias;
        for (int k = 0; k < W; ++k) sum += weight[k] * window[k];
        Vec open = sigmoid(sum);
        g *= open * (1.0f + sum * (1.0f - open));
      }
      if (own) {
        for (int k = 0; k < W; ++k) dw[k] += g * window[k];
        dw[W] += g;
      }
      after[W - 1] = g;
    };
    auto emit = [&](int64_t target) {
      Vec dx{};
      for (int k = 0; k < W; ++k) dx += weight[W - 1 - k] * after[k];
      store(a.dx + c.row(target) * a.dim + channel, dx, lanes);
    };
    int64_t warm = std::min(to, from + W - 1);
    for (int64_t t = from; t < warm; ++t) step(t, true);
    for (int64_t t = warm; t < to; ++t) step(t, true), emit(t - (W - 1));
    for (int64_t t = to; t < to + W - 1; ++t) {
      if (t < c.length) {
        step(t, false);
      } else {
        for (int k = 0; k + 1 < W; ++k) after[k] = after[k + 1];
        after[W - 1] = Vec{};
      }
      if (t - (W - 1) >= from) emit(t - (W - 1));
    }
    for (int k = 0; k <= W; ++k) store(dtaps + k * a.dim + channel, dw[k], lanes);
  });
}

template <int W>
void forward(const ConvArgs &a) {
  std::vector<Chunk> chunks = cut(a);
  std::vector<float> taps = transpose_taps(a);
  const int threads = worthwhile(a.threads, chunks.size(), a.cu_seqlens[a.sequences] * a.dim);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (size_t i = 0; i < chunks.size(); ++i) forward_chunk<W>(a, chunks[i], taps.data());
}

template <int W>
void backward(const ConvArgs &a) {
  std::vector<Chunk> chunks = cut(a);
  std::vector<float> taps = transpose_taps(a);
  const int64_t size = a.dim * (W + 1);
  std::unique_ptr<float[]> parts(new float[chunks.size() * size]);
  const int threads = worthwhile(a.threads, chunks.size(), a.cu_seqlens[a.sequences] * a.dim);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (size_t i = 0; i < chunks.size(); ++i)
    backward_chunk<W>(a, chunks[i], taps.data(), parts.get() + i * size);
  std::vector<float> total(size, 0.0f);
  for (size_t i = 0; i < chunks.size(); ++i)
    for (int64_t j = 0; j < size; ++j) total[j] += parts[i * size + j];
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
