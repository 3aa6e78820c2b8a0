// Selective scan on the CPU, forward and backward (the recurrence is in scan/__init__.py), and the
// block scan, which is the same walk with nodes on the way (block/__init__.py).
//
// Channels lie in the vector lanes and a channel block's states in registers. A work item is one
// sequence times one group of channel blocks; it walks the sequence in tiles of TILE steps, cut
// short where a node begins or ends. The forward pass keeps the state at each tile's start; the
// backward pass recomputes a tile from it.
// Every sum has a fixed order that depends on the shapes alone, so the bits do not depend on the
// number of threads.
#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "../simd.h"

constexpr int TILE = 16;
constexpr int CHUNK = 8;       // states held in registers at once
constexpr int MAX_BLOCKS = 8;  // channel blocks in a group

extern "C" {

// What happens to the state h on reaching a node's start, middle or end. A slot holds a state for as
// long as its node is open; slots are numbered by depth.
enum Operation : int32_t {
  OPEN,  // slot = h
  SWAP,  // h and slot change places
  MIX,   // h = alpha h + (1 - alpha) slot
};
struct Event {
  int32_t position;  // the token that it comes before
  int32_t operation, node, slot;
};

// Rows are (tokens, dim) or (tokens, state) with a stride in floats; null where not given.
struct ScanArgs {
  int64_t sequences, dim, state, slots;
  int64_t u_stride, delta_stride, B_stride, C_stride, z_stride, dout_stride;
  const int32_t *cu_seqlens;  // (sequences + 1,)
  const float *u, *delta, *A, *B, *C, *D, *z, *delta_bias, *initial_state;
  const int32_t *repeats;      // (tokens,)
  float *out, *last_state;     // (tokens, dim), (sequences, dim, state)
  const Event *events;          // by sequence, in the order in which they happen
  const int32_t *event_bounds;  // (sequences + 1,)
  const float *alpha;           // (nodes, dim)
  float *gap;                   // (nodes, state, dim) h - slot where it is mixed, null in inference
  float *dalpha;
  float *checkpoints;  // (tokens / TILE + sequences + events, state, dim), null in inference
  const float *dout, *dlast;   // dlast may be null
  float *du, *ddelta, *dA, *dB, *dC, *dD, *dz, *ddelta_bias, *dinitial;
  int32_t delta_softplus, reverse, threads;
};

int64_t flexbench_scan_tile() { return TILE; }
}

namespace {

struct Sequence {
  int64_t start, first_row, step, length;

  Sequence(const ScanArgs &a, int64_t s) {
    int64_t end = a.cu_seqlens[s + 1];
    start = a.cu_seqlens[s];
    length = end - start;
    first_row = a.reverse ? end - 1 : start;
    step = a.reverse ? -1 : 1;
  }
  int64_t row(int64_t t) const { return first_row + step * t; }
};

// A tile's place: up to TILE steps of a sequence from `begin` on, after events first_event up to
// last_event. A last one of no steps may hold the events at the sequence's end.
struct Span {
  int64_t begin;
  int steps;
  int64_t first_event, last_event;
};

// The spans of all sequences; those of sequence s begin at bounds[s].
struct Walk {
  std::vector<Span> spans;
  std::vector<int64_t> bounds;

  explicit Walk(const ScanArgs &a) {
    spans.reserve(a.cu_seqlens[a.sequences] / TILE + a.sequences);
    for (int64_t s = 0; s < a.sequences; ++s) {
      const Sequence sequence(a, s);
      bounds.push_back((int64_t)spans.size());
      int64_t event = a.events ? a.event_bounds[s] : 0, end = a.events ? a.event_bounds[s + 1] : 0;
      int64_t t = 0, first = event;
      do {
        while (event < end && a.events[event].position - sequence.start <= t) ++event;
        const int64_t stop = event < end ? a.events[event].position - sequence.start : sequence.length;
        if (t == stop && first < event) spans.push_back({t, 0, first, event});
        for (; t < stop; t += spans.back().steps, first = event)
          spans.push_back({t, (int)std::min<int64_t>(TILE, stop - t), first, event});
        first = event;
      } while (t < sequence.length || event < end);
    }
    bounds.push_back((int64_t)spans.size());
  }
};

// Large groups read whole rows; small ones give more work items where sequences are few.
int group_blocks(const ScanArgs &a) {
  int64_t blocks = (a.dim + LANES - 1) / LANES;
  int size = MAX_BLOCKS;
  while (size > 1 && a.sequences * ((blocks + size - 1) / size) < 4) size /= 2;
  return size;
}

struct Block {
  int64_t channel;
  int lanes;
  Block(const ScanArgs &a, int64_t index)
      : channel(index * LANES), lanes((int)std::min<int64_t>(LANES, a.dim - index * LANES)) {}
};

// (dim, state) row-major to one vector per state, and back.
void gather_states(const float *source, const Block &b, int64_t state, Vec *to) {
  for (int64_t n = 0; n < state; ++n) {
    Vec x{};
    for (int i = 0; i < b.lanes; ++i) x[i] = source[(b.channel + i) * state + n];
    to[n] = x;
  }
}
void scatter_states(const Vec *from, const Block &b, int64_t state, float *target) {
  for (int64_t n = 0; n < state; ++n)
    for (int i = 0; i < b.lanes; ++i) target[(b.channel + i) * state + n] = from[n][i];
}

// m equal steps in one: the decay is E = e^(mx), the input's gain G = expm1(mx) / expm1(x), with
// x = ΔA = x2 ln 2. G = sum of e^(kx), k < m: near x = 0 its Taylor series, whose coefficients are
// the power sums of k.
struct PowerSums {
  float s0, s1, s2, s3, s4;
  explicit PowerSums(double m) {
    double k = m - 1;
    s0 = (float)m;
    s1 = (float)(k * m / 2);
    s2 = (float)(k * m * (2 * k + 1) / 6);
    s3 = (float)(k * m / 2 * (k * m / 2));
    s4 = (float)(k * m * (2 * k + 1) * (3 * k * k + 3 * k - 1) / 30);
  }
};
inline Vec repeat_gain(Vec x2, const PowerSums &p) {
  Vec x = x2 * LN2;
  Vec series = ((x * (p.s3 / 6) + p.s2 / 2) * x + p.s1) * x + p.s0;
  VecInt near = vabs(x2 * p.s0) < 0.05f;
  return select(near, series, exp2m1(x2 * p.s0) / exp2m1(x2));
}
inline Vec repeat_gain_slope(Vec x2, Vec gain, const PowerSums &p) {
  Vec x = x2 * LN2;
  Vec series = ((x * (p.s4 / 6) + p.s3 / 2) * x + p.s2) * x + p.s1;
  VecInt near = vabs(x2 * p.s0) < 0.05f;
  Vec direct = (p.s0 * exp2v(x2 * p.s0) - gain * exp2v(x2)) / exp2m1(x2);
  return select(near, series, direct);
}

// Per-step quantities of one channel block over one tile.
struct Tile {
  Vec u[TILE], delta[TILE], input[TILE], y[TILE];  // Δ with bias and softplus; Δ u; sum of h C
  Vec apart[3];  // tiles of neighbouring blocks must not lie a multiple of 4 KiB apart
};
struct BackwardTile : Tile {
  Vec slope[TILE], dy[TILE];        // dΔ / d(raw delta); gradient of the ungated y
  Vec dgate[TILE];                  // dz / y
  Vec ddelta[TILE], dinput[TILE];   // gradients of Δ through the decay, in units of ln 2, and of Δ u
};

// What all channel blocks share over one tile: its rows of B, C and repeats.
struct Rows {
  int steps;
  const float *B, *C;
  int64_t B_step, C_step;
  const int32_t *repeats;
  int64_t repeats_step;

  Rows from_state(int64_t n) const {
    Rows part = *this;
    part.B += n, part.C += n;
    return part;
  }
};

// Advances NB states through a tile; OUTPUT adds their share to y. KEEP stores decays and states for
// the backward pass: kept_h[t] is the state before step t, kept_h[steps] the last.
template <int NB, bool NEAR, bool OUTPUT, bool KEEP, bool REPEATS>
inline void advance_by(Tile &tile, const Rows &rows, const Vec *A2, Vec *state, Vec *kept_h,
                       Vec *kept_a) {
  Vec h[NB];
  for (int n = 0; n < NB; ++n) h[n] = state[n];
  const float *B = rows.B, *C = rows.C;
  for (int t = 0; t < rows.steps; ++t) {
    Vec delta = tile.delta[t], input = tile.input[t], y{};
    if (OUTPUT) y = tile.y[t];
    float m = 1;
    if (REPEATS) m = (float)rows.repeats[t * rows.repeats_step];
    if (REPEATS && m > 1) {
      PowerSums sums(m);
#pragma GCC unroll 1
      for (int n = 0; n < NB; ++n) {
        Vec x2 = delta * A2[n];
        Vec a = exp2v(x2 * m);
        if (KEEP) kept_h[t * NB + n] = h[n], kept_a[t * NB + n] = a;
        h[n] = a * h[n] + input * B[n] * repeat_gain(x2, sums);
        if (OUTPUT) y += h[n] * C[n];
      }
    } else {
#pragma GCC unroll 16
      for (int n = 0; n < NB; ++n) {
        Vec a = NEAR ? exp2_near(delta * A2[n]) : exp2v(delta * A2[n]);
        if (KEEP) kept_h[t * NB + n] = h[n], kept_a[t * NB + n] = a;
        h[n] = a * h[n] + input * B[n];
        if (OUTPUT) y += h[n] * C[n];
      }
    }
    if (OUTPUT) tile.y[t] = y;
    B += rows.B_step, C += rows.C_step;
  }
  for (int n = 0; n < NB; ++n) {
    if (KEEP) kept_h[rows.steps * NB + n] = h[n];
    state[n] = h[n];
  }
}

// Whether every Δ A of a tile lies where the cheaper exponential holds, as it mostly does in training.
template <int NB>
inline bool is_near(const Tile &tile, int steps, const Vec *A2) {
  Vec low = tile.delta[0], high = low, steepest = A2[0], flattest = A2[0];
  for (int t = 1; t < steps; ++t) low = vmin(low, tile.delta[t]), high = vmax(high, tile.delta[t]);
  for (int n = 1; n < NB; ++n) steepest = vmin(steepest, A2[n]), flattest = vmax(flattest, A2[n]);
  VecInt near = (low >= 0.0f) & (flattest <= 0.0f) & (high * steepest >= EXP2_NEAR);
  for (int i = 0; i < LANES; ++i)
    if (!near[i]) return false;
  return true;
}

template <int NB, bool OUTPUT, bool KEEP, bool REPEATS>
inline void advance(Tile &tile, const Rows &rows, const Vec *A2, Vec *state, Vec *kept_h, Vec *kept_a) {
  if (is_near<NB>(tile, rows.steps, A2))
    advance_by<NB, true, OUTPUT, KEEP, REPEATS>(tile, rows, A2, state, kept_h, kept_a);
  else
    advance_by<NB, false, OUTPUT, KEEP, REPEATS>(tile, rows, A2, state, kept_h, kept_a);
}

// States in chunks that fit the registers: calls visit<NB>(first state) for each.
template <typename Visit>
void for_state_chunks(int64_t N, Visit visit) {
  int64_t n = 0;
  for (; N - n >= CHUNK; n += CHUNK) visit(std::integral_constant<int, CHUNK>(), n);
  for (; N - n >= 4; n += 4) visit(std::integral_constant<int, 4>(), n);
  for (; N - n >= 1; n += 1) visit(std::integral_constant<int, 1>(), n);
}

// A group of channel blocks of one sequence. Rows are walked outside and blocks inside, so that memory
// is read in its order.
struct Group {
  const ScanArgs &a;
  const Sequence s;
  const int64_t first_block;
  const int blocks;

  Group(const ScanArgs &args, int64_t sequence, int64_t first, int count)
      : a(args), s(args, sequence), first_block(first), blocks(count) {}

  Block block(int i) const { return Block(a, first_block + i); }

  Rows rows(const Span &span) const {
    int64_t first = s.row(span.begin);
    Rows r;
    r.steps = span.steps;
    r.B = a.B + first * a.B_stride, r.B_step = s.step * a.B_stride;
    r.C = a.C + first * a.C_stride, r.C_step = s.step * a.C_stride;
    r.repeats = a.repeats ? a.repeats + first : nullptr, r.repeats_step = s.step;
    return r;
  }

  template <typename Visit>
  void for_rows(int64_t begin, int steps, Visit visit) const {
    for (int t = 0; t < steps; ++t) {
      int64_t row = s.row(begin + t);
      for (int i = 0; i < blocks; ++i) {
        Block b = block(i);
        if (b.lanes == LANES)
          visit(t, row, i, b.channel, std::integral_constant<int, LANES>());
        else
          visit(t, row, i, b.channel, b.lanes);
      }
    }
  }

  // Asks for the group's channels of one row ahead of their use, to read or to write.
  template <bool WRITE>
  void prefetch_row(const float *row) const {
    const int64_t channel = first_block * LANES;
    const int64_t end = std::min(a.dim, channel + (int64_t)blocks * LANES);
    for (int64_t c = channel; c < end; c += 16) __builtin_prefetch(row + c, WRITE, 3);
  }
  template <bool WRITE>
  void prefetch(const float *base, int64_t stride, int64_t begin) const {
    if (!base || begin < 0) return;
    const int64_t end = std::min(begin + TILE, s.length);
    for (int64_t t = begin; t < end; ++t) prefetch_row<WRITE>(base + s.row(t) * stride);
  }
  template <bool WRITE>
  void prefetch_checkpoint(int64_t span) const {
    if (!a.checkpoints) return;
    const float *slot = a.checkpoints + span * a.state * a.dim;
    for (int64_t n = 0; n < a.state; ++n) prefetch_row<WRITE>(slot + n * a.dim);
  }

  // Δ: delta with its bias, through softplus.
  template <typename Lanes>
  Vec step_size(int64_t row, int64_t channel, Lanes lanes) const {
    Vec raw = load(a.delta + row * a.delta_stride + channel, lanes);
    if (a.delta_bias) raw += load(a.delta_bias + channel, lanes);
    return a.delta_softplus ? softplus(raw) : raw;
  }
};

void load_A(const ScanArgs &a, const Block &b, Vec *A2) {
  gather_states(a.A, b, a.state, A2);
  for (int64_t n = 0; n < a.state; ++n) A2[n] *= LOG2E;
}

// Applies one event to the group's states h, (blocks, state).
void pass_node(const Group &group, const Event &event, Vec *h, Vec *slot) {
  const ScanArgs &a = group.a;
  const int64_t N = a.state;
  if (event.operation != MIX) {
    for (int64_t k = 0; k < group.blocks * N; ++k) {
      Vec held = slot[k];
      slot[k] = h[k];
      if (event.operation == SWAP) h[k] = held;
    }
    return;
  }
  for (int i = 0; i < group.blocks; ++i) {
    Block b = group.block(i);
    Vec alpha = load(a.alpha + event.node * a.dim + b.channel, b.lanes);
    for (int64_t n = 0; n < N; ++n) {
      Vec &after = h[i * N + n], held = slot[i * N + n];
      if (a.gap) store(a.gap + (event.node * N + n) * a.dim + b.channel, after - held, b.lanes);
      after = alpha * after + (1.0f - alpha) * held;
    }
  }
}

template <bool REPEATS>
void forward_item(const ScanArgs &a, const Walk &walk, int64_t sequence, int64_t first_block,
                  int blocks) {
  const int64_t N = a.state;
  const Group group(a, sequence, first_block, blocks);
  const Sequence &s = group.s;
  Scratch scratch((2 + a.slots) * N * blocks);
  Vec *A2 = scratch.get(), *h = A2 + N * blocks, *slots = h + N * blocks;
  Tile tiles[MAX_BLOCKS];
  for (int i = 0; i < blocks; ++i) {
    Block b = group.block(i);
    load_A(a, b, A2 + i * N);
    if (a.initial_state)
      gather_states(a.initial_state + sequence * a.dim * N, b, N, h + i * N);
    else
      std::fill_n(h + i * N, N, Vec{});
  }
  for (int64_t k = walk.bounds[sequence]; k < walk.bounds[sequence + 1]; ++k) {
    const Span &span = walk.spans[k];
    for (int64_t e = span.first_event; e < span.last_event; ++e)
      pass_node(group, a.events[e], h, slots + a.events[e].slot * N * blocks);
    if (!span.steps) break;
    const int64_t begin = span.begin;
    const Rows rows = group.rows(span);
    group.for_rows(begin, rows.steps, [&](int t, int64_t row, int i, int64_t channel, auto lanes) {
      Vec u = load(a.u + row * a.u_stride + channel, lanes);
      Vec delta = group.step_size(row, channel, lanes);
      tiles[i].u[t] = u, tiles[i].delta[t] = delta, tiles[i].input[t] = delta * u;
      tiles[i].y[t] = Vec{};
    });
    group.prefetch<false>(a.u, a.u_stride, begin + TILE);
    group.prefetch<false>(a.delta, a.delta_stride, begin + TILE);
    group.prefetch<false>(a.z, a.z_stride, begin + TILE);
    group.prefetch<true>(a.out, a.dim, begin);
    if (k + 1 < walk.bounds[sequence + 1]) group.prefetch_checkpoint<true>(k + 1);
    for (int i = 0; i < blocks; ++i) {
      Block b = group.block(i);
      if (a.checkpoints) {
        float *slot = a.checkpoints + k * N * a.dim + b.channel;
        for (int64_t n = 0; n < N; ++n) store(slot + n * a.dim, h[i * N + n], b.lanes);
      }
      for_state_chunks(N, [&](auto size, int64_t n) {
        advance<size.value, true, false, REPEATS>(tiles[i], rows.from_state(n), A2 + i * N + n,
                                                  h + i * N + n, nullptr, nullptr);
      });
    }
    group.for_rows(begin, rows.steps, [&](int t, int64_t row, int i, int64_t channel, auto lanes) {
      Vec y = tiles[i].y[t];
      if (a.D) y += load(a.D + channel, lanes) * tiles[i].u[t];
      if (a.z) {
        Vec z = load(a.z + row * a.z_stride + channel, lanes);
        y *= z * sigmoid(z);
      }
      store(a.out + row * a.dim + channel, y, lanes);
    });
  }
  for (int i = 0; i < blocks; ++i)
    scatter_states(h + i * N, group.block(i), N, a.last_state + sequence * a.dim * N);
}

// Walks NB states back through a tile. dB and dC are kept per lane: lanes are summed once a tile.
template <int NB, bool REPEATS>
inline void retreat(BackwardTile &tile, const Rows &rows, const Vec *A2, Vec *dstate, Vec *dA_sum,
                    const Vec *kept_h, const Vec *kept_a, Vec *dB, Vec *dC) {
  Vec dh[NB], dA[NB], after[NB];  // after: the state after the step at hand
  for (int n = 0; n < NB; ++n)
    dh[n] = dstate[n], dA[n] = dA_sum[n], after[n] = kept_h[rows.steps * NB + n];
  for (int t = rows.steps - 1; t >= 0; --t) {
    const float *B = rows.B + t * rows.B_step, *C = rows.C + t * rows.C_step;
    Vec delta = tile.delta[t], input = tile.input[t], dy = tile.dy[t];
    Vec through_decay = tile.ddelta[t], through_input = tile.dinput[t];
    const Vec *h = kept_h + t * NB, *a = kept_a + t * NB;
    float m = 1;
    if (REPEATS) m = (float)rows.repeats[t * rows.repeats_step];
    if (REPEATS && m > 1) {
      PowerSums sums(m);
#pragma GCC unroll 1
      for (int n = 0; n < NB; ++n) {
        Vec x2 = delta * A2[n];
        Vec gain = repeat_gain(x2, sums), slope = repeat_gain_slope(x2, gain, sums);
        dC[t * NB + n] += dy * after[n];
        after[n] = h[n];
        Vec d = dh[n] + dy * C[n];
        through_input += d * B[n] * gain;
        dB[t * NB + n] += d * input * gain;
        Vec q = d * (h[n] * a[n] * m + input * B[n] * slope);
        through_decay += q * A2[n];
        dA[n] += q * delta;
        dh[n] = d * a[n];
      }
    } else {
#pragma GCC unroll 8
      for (int n = 0; n < NB; ++n) {
        dC[t * NB + n] += dy * after[n];
        after[n] = h[n];
        Vec d = dh[n] + dy * C[n];
        through_input += d * B[n];
        dB[t * NB + n] += d * input;
        d *= a[n];
        Vec q = d * after[n];
        through_decay += q * A2[n];
        dA[n] += q * delta;
        dh[n] = d;
      }
    }
    tile.ddelta[t] = through_decay, tile.dinput[t] = through_input;
  }
  for (int n = 0; n < NB; ++n) dstate[n] = dh[n], dA_sum[n] = dA[n];
}

// The adjoint of pass_node.
void unpass_node(const Group &group, const Event &event, Vec *dh, Vec *dslot) {
  const ScanArgs &a = group.a;
  const int64_t N = a.state;
  if (event.operation != MIX) {
    for (int64_t k = 0; k < group.blocks * N; ++k)
      if (event.operation == SWAP)
        std::swap(dh[k], dslot[k]);
      else
        dh[k] += dslot[k];
    return;
  }
  for (int i = 0; i < group.blocks; ++i) {
    Block b = group.block(i);
    Vec alpha = load(a.alpha + event.node * a.dim + b.channel, b.lanes), dalpha{};
    for (int64_t n = 0; n < N; ++n) {
      Vec &d = dh[i * N + n];
      dalpha += d * load(a.gap + (event.node * N + n) * a.dim + b.channel, b.lanes);
      dslot[i * N + n] = (1.0f - alpha) * d;
      d *= alpha;
    }
    store(a.dalpha + event.node * a.dim + b.channel, dalpha, b.lanes);
  }
}

template <bool REPEATS>
void backward_item(const ScanArgs &a, const Walk &walk, int64_t sequence, int64_t first_block,
                   int blocks, float *dB_out, float *dC_out, float *dA_out, float *dD_out,
                   float *dbias_out) {
  const int64_t N = a.state;
  const Group group(a, sequence, first_block, blocks);
  const Sequence &s = group.s;
  struct {
    Vec *A2, *h, *dh, *dA;  // (state,)
    Vec dD{}, dbias{};
  } sums[MAX_BLOCKS];
  BackwardTile tiles[MAX_BLOCKS];
  // The odd sizes keep the arrays from lying a multiple of 4 KiB apart, which would stall them.
  Vec kept_h[(TILE + 1) * CHUNK + 5], kept_a[TILE * CHUNK + 13], dB[TILE * CHUNK + 13], dC[TILE * CHUNK];
  Scratch scratch((4 + a.slots) * N * blocks);
  Vec *dstates = scratch.get(), *dslots = dstates + N * blocks;
  for (int i = 0; i < blocks; ++i) {
    Block b = group.block(i);
    auto &sum = sums[i];
    sum.dh = dstates + N * i;
    sum.A2 = dslots + a.slots * N * blocks + 3 * N * i;
    sum.h = sum.A2 + N, sum.dA = sum.h + N;
    load_A(a, b, sum.A2);
    std::fill_n(sum.dA, N, Vec{});
    if (a.dlast)
      gather_states(a.dlast + sequence * a.dim * N, b, N, sum.dh);
    else
      std::fill_n(sum.dh, N, Vec{});
  }

  auto pass_events = [&](const Span &span) {
    for (int64_t e = span.last_event - 1; e >= span.first_event; --e)
      unpass_node(group, a.events[e], dstates, dslots + a.events[e].slot * N * blocks);
  };
  for (int64_t k = walk.bounds[sequence + 1] - 1; k >= walk.bounds[sequence]; --k) {
    const Span &span = walk.spans[k];
    const int64_t begin = span.begin;
    const int steps = span.steps;
    if (!steps) {
      pass_events(span);
      continue;
    }
    const Rows rows = group.rows(span);
    group.for_rows(begin, steps, [&](int t, int64_t row, int i, int64_t channel, auto lanes) {
      BackwardTile &tile = tiles[i];
      Vec u = load(a.u + row * a.u_stride + channel, lanes);
      Vec delta = group.step_size(row, channel, lanes);
      // The slope of softplus is the sigmoid, 1 - e^-Δ.
      tile.slope[t] = a.delta_softplus ? -exp2m1(delta * -LOG2E) : splat(1.0f);
      Vec g = load(a.dout + row * a.dout_stride + channel, lanes);
      if (a.z) {
        Vec z = load(a.z + row * a.z_stride + channel, lanes), open = sigmoid(z);
        tile.dgate[t] = g * open * (1.0f + z * (1.0f - open));
        g *= z * open;
        tile.y[t] = Vec{};
      }
      tile.u[t] = u, tile.delta[t] = delta, tile.input[t] = delta * u, tile.dy[t] = g;
      tile.ddelta[t] = Vec{}, tile.dinput[t] = Vec{};
    });
    group.prefetch<false>(a.u, a.u_stride, begin - TILE);
    group.prefetch<false>(a.delta, a.delta_stride, begin - TILE);
    group.prefetch<false>(a.dout, a.dout_stride, begin - TILE);
    group.prefetch<false>(a.z, a.z_stride, begin - TILE);
    if (k > walk.bounds[sequence]) group.prefetch_checkpoint<false>(k - 1);
    group.prefetch<true>(a.du, a.dim, begin);
    group.prefetch<true>(a.ddelta, a.dim, begin);
    group.prefetch<true>(a.dz, a.dim, begin);
    for (int i = 0; i < blocks; ++i) {
      Block b = group.block(i);
      const float *slot = a.checkpoints + k * N * a.dim + b.channel;
      for (int64_t n = 0; n < N; ++n) sums[i].h[n] = load(slot + n * a.dim, b.lanes);
    }
    // States outside, channel blocks inside: what a chunk keeps stays in the first-level cache.
    for_state_chunks(N, [&](auto size, int64_t n) {
      constexpr int NB = size.value;
      const Rows part = rows.from_state(n);
      std::fill_n(dB, steps * NB, Vec{});
      std::fill_n(dC, steps * NB, Vec{});
      for (int i = 0; i < blocks; ++i) {
        auto &sum = sums[i];
        if (a.z)
          advance<NB, true, true, REPEATS>(tiles[i], part, sum.A2 + n, sum.h + n, kept_h, kept_a);
        else
          advance<NB, false, true, REPEATS>(tiles[i], part, sum.A2 + n, sum.h + n, kept_h, kept_a);
        retreat<NB, REPEATS>(tiles[i], part, sum.A2 + n, sum.dh + n, sum.dA + n, kept_h, kept_a, dB, dC);
      }
      for (int t = 0; t < steps; ++t) {
        int64_t at_row = s.row(begin + t) * N + n;
        for (int j = 0; j < NB; ++j) {
          dB_out[at_row + j] = sum_lanes(dB[t * NB + j]);
          dC_out[at_row + j] = sum_lanes(dC[t * NB + j]);
        }
      }
    });
    group.for_rows(begin, steps, [&](int t, int64_t row, int i, int64_t channel, auto lanes) {
      const BackwardTile &tile = tiles[i];
      Vec D = a.D ? load(a.D + channel, lanes) : Vec{};
      if (a.z) {
        Vec y = tile.y[t] + D * tile.u[t];
        store(a.dz + row * a.dim + channel, tile.dgate[t] * y, lanes);
      }
      Vec du = tile.dinput[t] * tile.delta[t] + D * tile.dy[t];
      Vec draw = (tile.ddelta[t] * LN2 + tile.dinput[t] * tile.u[t]) * tile.slope[t];
      store(a.du + row * a.dim + channel, du, lanes);
      store(a.ddelta + row * a.dim + channel, draw, lanes);
      sums[i].dbias += draw;
      sums[i].dD += tile.dy[t] * tile.u[t];
    });
    pass_events(span);
  }
  for (int i = 0; i < blocks; ++i) {
    Block b = group.block(i);
    scatter_states(sums[i].dA, b, N, dA_out + sequence * a.dim * N);
    store(dD_out + sequence * a.dim + b.channel, sums[i].dD, b.lanes);
    store(dbias_out + sequence * a.dim + b.channel, sums[i].dbias, b.lanes);
    if (a.dinitial) scatter_states(sums[i].dh, b, N, a.dinitial + sequence * a.dim * N);
  }
}

// out[i] = sum over parts of parts[p][i], in the order of the parts.
void sum_parts(const float *parts, int64_t count, int64_t size, float *out, int threads) {
  threads = worthwhile(threads, size, count * size);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < size; ++i) {
    float total = 0;
    for (int64_t p = 0; p < count; ++p) total += parts[p * size + i];
    out[i] = total;
  }
}

}  // namespace

extern "C" {

void flexbench_scan_forward(const ScanArgs *args) {
  const ScanArgs &a = *args;
  const int size = group_blocks(a);
  const int64_t blocks = (a.dim + LANES - 1) / LANES, groups = (blocks + size - 1) / size;
  const int64_t items = a.sequences * groups;
  const Walk walk(a);
  const int threads = worthwhile(a.threads, items, a.cu_seqlens[a.sequences] * a.dim * a.state);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t item = 0; item < items; ++item) {
    int64_t sequence = item / groups, first = item % groups * size;
    int count = (int)std::min<int64_t>(size, blocks - first);
    (a.repeats ? forward_item<true> : forward_item<false>)(a, walk, sequence, first, count);
  }
  if (!a.checkpoints) return;
  int64_t room = a.cu_seqlens[a.sequences] / TILE + a.sequences;
  if (a.events) room += a.event_bounds[a.sequences];
  const int64_t used = (int64_t)walk.spans.size(), one = a.state * a.dim;
  for (int64_t k = 0; k < used; ++k)
    if (!walk.spans[k].steps) std::fill_n(a.checkpoints + k * one, one, 0.0f);
  std::fill(a.checkpoints + used * one, a.checkpoints + room * one, 0.0f);
}

void flexbench_scan_backward(const ScanArgs *args) {
  const ScanArgs &a = *args;
  const int size = group_blocks(a);
  const int64_t blocks = (a.dim + LANES - 1) / LANES, groups = (blocks + size - 1) / size;
  const int64_t tokens = a.cu_seqlens[a.sequences], N = a.state, per_group = tokens * N;
  std::unique_ptr<float[]> dBC(groups > 1 ? new float[2 * groups * per_group] : nullptr);
  std::unique_ptr<float[]> dA(new float[a.sequences * a.dim * N]);
  std::unique_ptr<float[]> dD(new float[2 * a.sequences * a.dim]);
  float *dB_parts = groups > 1 ? dBC.get() : a.dB;
  float *dC_parts = groups > 1 ? dBC.get() + groups * per_group : a.dC;
  float *dbias = dD.get() + a.sequences * a.dim;
  const int64_t items = a.sequences * groups;
  const Walk walk(a);
  const int threads = worthwhile(a.threads, items, a.cu_seqlens[a.sequences] * a.dim * a.state);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t item = 0; item < items; ++item) {
    int64_t sequence = item / groups, group = item % groups, first = group * size;
    int count = (int)std::min<int64_t>(size, blocks - first);
    (a.repeats ? backward_item<true> : backward_item<false>)(
        a, walk, sequence, first, count, dB_parts + group * per_group, dC_parts + group * per_group, dA.get(),
        dD.get(), dbias);
  }
  if (groups > 1) {
    sum_parts(dB_parts, groups, per_group, a.dB, a.threads);
    sum_parts(dC_parts, groups, per_group, a.dC, a.threads);
  }
  sum_parts(dA.get(), a.sequences, a.dim * N, a.dA, a.threads);
  if (a.dD) sum_parts(dD.get(), a.sequences, a.dim, a.dD, a.threads);
  if (a.ddelta_bias) sum_parts(dbias, a.sequences, a.dim, a.ddelta_bias, a.threads);
}
}
