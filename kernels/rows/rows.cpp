// Gathering runs of rows as their means, and putting a row back on all rows of its run.
#include "../simd.h"

constexpr int64_t CHUNK = 64;  // runs of a work item

extern "C" {

struct RowsArgs {
  int64_t runs, dim;
  const int64_t *start, *count;  // (runs,) rows of the long side; no two runs share a row
  float *packed, *rows;          // (runs, dim) and (rows, dim)
  int32_t mean, threads;         // mean: divide by the run's length
};
}

namespace {

template <typename Visit>
void for_runs(const RowsArgs &a, Visit visit) {
  const int64_t chunks = (a.runs + CHUNK - 1) / CHUNK;
  const int threads = worthwhile(a.threads, chunks, a.runs * a.dim);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < chunks; ++i)
    for (int64_t r = i * CHUNK; r < std::min(a.runs, (i + 1) * CHUNK); ++r)
      visit(a.rows + a.start[r] * a.dim, a.count[r], a.packed + r * a.dim,
            a.mean ? 1.0f / (float)a.count[r] : 1.0f);
}

}  // namespace

extern "C" {

void flexbench_rows_gather(const RowsArgs *args) {
  const RowsArgs &a = *args;
  for_runs(a, [&](const float *rows, int64_t count, float *packed, float scale) {
    if (count == 1) {
      std::memcpy(packed, rows, sizeof(float) * a.dim);
      return;
    }
    for (int64_t c = 0; c < a.dim; c += LANES) {
      const int lanes = (int)std::min<int64_t>(LANES, a.dim - c);
      Vec sum{};
      for (int64_t j = 0; j < count; ++j) sum += load(rows + j * a.dim + c, lanes);
      store(packed + c, sum * scale, lanes);
    }
  });
}

// Writes the rows of all runs and no others.
void flexbench_rows_scatter(const RowsArgs *args) {
  const RowsArgs &a = *args;
  for_runs(a, [&](float *rows, int64_t count, const float *packed, float scale) {
    if (scale == 1.0f) {
      for (int64_t j = 0; j < count; ++j) std::memcpy(rows + j * a.dim, packed, sizeof(float) * a.dim);
      return;
    }
    for (int64_t c = 0; c < a.dim; c += LANES) {
      const int lanes = (int)std::min<int64_t>(LANES, a.dim - c);
      const Vec x = load(packed + c, lanes) * scale;
      for (int64_t j = 0; j < count; ++j) store(rows + j * a.dim + c, x, lanes);
    }
  });
}
}
