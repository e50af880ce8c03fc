// AdamW less a low-rank part, for CPUs with AVX-512 or AVX2: two passes over memory, in float32.
//
// Pass 1 steps 24 rows of 512 columns and multiplies their step with the right factors while it is
// in the cache; pass 2 subtracts the low-rank part of 24 rows, some columns at a time. Meanwhile
// memory is asked for what comes next. Every strip of rows has sums of its own, added in their
// order afterwards: no bit depends on the number of threads.
//
// Plain C functions at the end, called through ctypes: compiling this takes a second.

#include "vectors.h"

namespace {

constexpr int64_t kRows = 4 * kTall;  // of a strip
constexpr int64_t kCols = 512;        // columns that are stepped, then multiplied
constexpr int64_t kSoon = 16;         // columns multiplied between two looks ahead

int64_t panels(int64_t size) { return blocks(size, kPanel); }

// Of all matrices the largest f.
template <class F>
int64_t largest(const Matrix *matrices, int64_t count, F f) {
  int64_t most = 0;
  for (int64_t i = 0; i < count; i++) most = std::max<int64_t>(most, f(matrices[i]));
  return most;
}

// Right factors (rank, cols) as panels of factors: panel q has its factors of a column together.
void pack_factors(const Matrix &x, int64_t q, float *panel) {
  const int64_t first = q * kPanel, count = std::min(kPanel, x.rank - first);
  memset(panel, 0, sizeof(float) * x.cols * kPanel);
  for (int64_t block = 0; block < x.cols; block += kLine) {
    const int64_t end = std::min(block + kLine, x.cols);
    for (int64_t k = 0; k < count; k++) {
      for (int64_t j = block; j < end; j++) panel[j * kPanel + k] = x.right[(first + k) * x.cols + j];
    }
  }
}

// Right factors as panels of columns: panel q has its columns of a factor together.
void pack_columns(const Matrix &x, int64_t q, float *panel) {
  const int64_t first = q * kPanel, count = std::min(kPanel, x.cols - first);
  memset(panel, 0, sizeof(float) * x.rank * kPanel);
  for (int64_t k = 0; k < x.rank; k++) {
    memcpy(panel + k * kPanel, x.right + k * x.cols + first, sizeof(float) * count);
  }
}

// -- pass 1 ------------------------------------------------------------------------------------

class Propose {
 public:
  Propose(const Scalars &scalars, int64_t most_rank)
      : scalars_(scalars), step_(kRows * kCols), image_(panels(most_rank) * kRows * kPanel) {}

  // Step a strip of rows; sums become sum_r left_kr (s right^T)_rk for all factors, then ||s||^2.
  void strip(const Matrix &x, int64_t number, const float *packed, double *sums) {
    const int64_t first = number * kRows, rows = std::min(kRows, x.rows - first);
    double squared_norm = 0;
    memset(image_.at(0), 0, sizeof(float) * panels(x.rank) * kRows * kPanel);
    for (int64_t col = 0; col < x.cols; col += kCols) {
      const int64_t cols = std::min(kCols, x.cols - col);
      for (int64_t r = 0; r < rows; r++) {
        squared_norm += adamw(x, (first + r) * x.cols + col, cols, scalars_, step_.at(r * kCols));
      }
      multiply(x, first, rows, col, cols, packed);
    }
    for (int64_t k = 0; k < x.rank; k++) sums[k] = along(x, first, rows, k);
    sums[x.rank] = squared_norm;
  }

  // The same of some numbers of a vector, or of a matrix without factors.
  void flat(const Matrix &x, int64_t number, double *sums) {
    const int64_t first = number * kFlat, size = std::min(kFlat, x.rows * x.cols - first);
    sums[x.rank] = adamw(x, first, size, scalars_, step_.at(0));
    for (int64_t k = 0; k < x.rank; k++) {
      sums[k] = double(dot(x.right + k * x.cols + first, step_.at(0), size)) * x.left[k];
    }
  }

 private:
  void multiply(const Matrix &x, int64_t first, int64_t rows, int64_t col, int64_t cols,
                const float *packed) {
    const int64_t groups = blocks(rows, kTall);
    const bool is_last = col + cols == x.cols;  // then this thread's next strip is likely
    const int64_t row = is_last ? first + omp_get_num_threads() * kRows : first;
    const int64_t next = is_last ? 0 : col + kCols;
    Ahead ahead(x, row, std::min(kRows, x.rows - row), next, std::min(kCols, x.cols - next), true);
    const int64_t share = blocks(ahead.left(), panels(x.rank) * groups * blocks(cols, kSoon));
    for (int64_t q = 0; q < panels(x.rank); q++) {
      const float *panel = packed + (q * x.cols + col) * kPanel;
      for (int64_t group = 0; group < groups; group++) {
        float *image = image_.at((q * kRows + group * kTall) * kPanel);
        Sums sums = Sums::of(image);
        for (int64_t j = 0; j < cols; j += kSoon) {
          ahead.ask_for(share);
          sums.add(step_.at(group * kTall * kCols + j), kCols, 1, panel + j * kPanel,
                   std::min(kSoon, cols - j));
        }
        sums.keep(image);
      }
    }
  }

  double along(const Matrix &x, int64_t first, int64_t rows, int64_t k) {
    const float *image = image_.at(k / kPanel * kRows * kPanel + k % kPanel);
    double sum = 0;
    for (int64_t r = 0; r < rows; r++) sum += double(x.left[k * x.rows + first + r]) * image[r * kPanel];
    return sum;
  }

  const Scalars &scalars_;
  Buffer<float> step_, image_;  // (kRows, kCols); for every panel (kRows, kPanel)
};

// -- pass 2 ------------------------------------------------------------------------------------

class Apply {
 public:
  Apply(const float *weights, int64_t anchors, int64_t most_rank)
      : weights_(weights), anchors_(anchors), left_(most_rank * kRows) {}

  // Subtract the low-rank part of a strip of rows.
  void strip(const Matrix &x, int64_t number, const float *packed) {
    const int64_t first = number * kRows, rows = std::min(kRows, x.rows - first);
    for (int64_t k = 0; k < x.rank; k++) {
      for (int64_t r = 0; r < rows; r++) {
        *left_.at(k * kRows + r) = -weight(x, k) * x.left[k * x.rows + first + r];
      }
    }
    for (int64_t q = 0; q < panels(x.cols); q++) {
      const int64_t next = (q + 2) * kPanel;
      Ahead ahead(x, first, rows, next, std::min(kPanel, x.cols - next), false);
      for (int64_t r = 0; r < rows; r += kTall) {
        Sums change;
        for (int64_t k = 0; k < x.rank; k += kSoon) {
          ahead.ask_for(blocks(kTall * kPanel / kLine, blocks(x.rank, kSoon)));
          change.add(left_.at(k * kRows + r), 1, kRows, packed + (q * x.rank + k) * kPanel,
                     std::min(kSoon, x.rank - k));
        }
        add(change, x, first + r, std::min(kTall, rows - r), q * kPanel);
      }
    }
  }

  void flat(const Matrix &x, int64_t number) {
    const int64_t first = number * kFlat, size = std::min(kFlat, x.cols - first);
    for (int64_t k = 0; k < x.rank; k++) {
      const float factor = weight(x, k) * x.left[k];
      const float *right = x.right + k * x.cols + first;
#pragma omp simd
      for (int64_t i = 0; i < size; i++) x.p[first + i] -= factor * right[i];
    }
  }

 private:
  float weight(const Matrix &x, int64_t k) const { return weights_[k / (x.rank / anchors_)]; }

  static void add(const Sums &change, const Matrix &x, int64_t row, int64_t rows, int64_t col) {
    const int64_t cols = std::min(kPanel, x.cols - col);
    alignas(64) float image[kTall * kPanel];
    const bool is_whole = rows == kTall && cols == kPanel;
    if (!is_whole) change.keep(image);
    for (int64_t r = 0; r < rows; r++) {
      float *p = x.p + (row + r) * x.cols + col;
      for (int w = 0; is_whole && w < kWide; w++) {
        store(p + w * kLane, load(p + w * kLane) + change.at[r][w]);
      }
      for (int64_t i = is_whole ? cols : 0; i < cols; i++) p[i] += image[r * kPanel + i];
    }
  }

  const float *weights_;
  int64_t anchors_;
  Buffer<float> left_;  // -a_k left_k of a strip, (rank, kRows)
};

}  // namespace

extern "C" {

int prepare() { return 0; }

// Update m and v, p <- p + s; add <G_i, s> to c (anchors,) and the squared length of s to the last.
void propose(const Matrix *matrices, int64_t count, int64_t anchors, const Scalars *scalars,
             int threads, double *c, double *squared_norm) {
  const auto pieces = [](const Matrix &x) {
    return is_flat(x) ? blocks(x.rows * x.cols, kFlat) : blocks(x.rows, kRows);
  };
  const int64_t rank = largest(matrices, count, [](const Matrix &x) { return x.rank; });
  Buffer<double> sums(largest(matrices, count, pieces) * (rank + 1));
  Buffer<float> packed(largest(matrices, count, [](const Matrix &x) {
    return is_flat(x) ? 0 : panels(x.rank) * x.cols * kPanel;
  }));
#pragma omp parallel num_threads(threads)
  {
    Propose pass(*scalars, rank);
    for (const Matrix *x = matrices; x < matrices + count; x++) {
      const int64_t width = x->rank + 1;
      if (!is_flat(*x)) {
#pragma omp for
        for (int64_t q = 0; q < panels(x->rank); q++) {
          pack_factors(*x, q, packed.at(q * x->cols * kPanel));
        }
      }
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < pieces(*x); i++) {
        if (is_flat(*x)) pass.flat(*x, i, sums.at(i * width));
        else pass.strip(*x, i, packed.at(0), sums.at(i * width));
      }
#pragma omp single
      for (int64_t i = 0; i < pieces(*x); i++) {
        const double *row = sums.at(i * width);
        for (int64_t k = 0; k < x->rank; k++) c[k / (x->rank / anchors)] += row[k];
        *squared_norm += row[x->rank];
      }
    }
  }
}

// p <- p - sum_i a_i G_i; the last matrix first, of which the cache may still hold a part.
void apply(const Matrix *matrices, int64_t count, int64_t anchors, const float *weights,
           int threads) {
  const int64_t rank = largest(matrices, count, [](const Matrix &x) { return x.rank; });
  Buffer<float> packed(largest(matrices, count, [](const Matrix &x) {
    return is_flat(x) ? 0 : panels(x.cols) * x.rank * kPanel;
  }));
#pragma omp parallel num_threads(threads)
  {
    Apply pass(weights, anchors, rank);
    for (const Matrix *x = matrices + count; x-- > matrices;) {
      if (x->rank == 0) continue;
      const int64_t pieces = is_flat(*x) ? blocks(x->cols, kFlat) : blocks(x->rows, kRows);
      if (!is_flat(*x)) {
#pragma omp for
        for (int64_t q = 0; q < panels(x->cols); q++) {
          pack_columns(*x, q, packed.at(q * x->rank * kPanel));
        }
      }
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < pieces; i++) {
        if (is_flat(*x)) pass.flat(*x, i);
        else pass.strip(*x, i, packed.at(0));
      }
    }
  }
}

// 1 if every number of all arrays is finite.
int all_finite(const float *const *arrays, const int64_t *sizes, int64_t count, int threads) {
  int found = 0;
#pragma omp parallel num_threads(threads) reduction(| : found)
  for (int64_t i = count; i-- > 0;) {  // the first ones are wanted next
#pragma omp for schedule(static) nowait
    for (int64_t block = 0; block < blocks(sizes[i], kFlat); block++) {
      const int64_t first = block * kFlat;
      found |= nothing(arrays[i] + first, std::min(kFlat, sizes[i] - first)) != 0;
    }
  }
  return found == 0;
}
}
