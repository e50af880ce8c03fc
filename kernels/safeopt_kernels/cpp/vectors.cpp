// AdamW less a low-rank part, for CPUs with AVX-512 or AVX2: two passes over memory.
//
// Pass 1 steps 24 whole rows, so that the CPU sees one stream of memory and fetches ahead, and then
// multiplies their step, which waits in the L2 cache, with the right factors. Pass 2 subtracts the
// low-rank part of six rows at a time. Products are in float32, or with SAFEOPT_BF16 of bf16 numbers
// summed in float32. Every strip of rows has sums of its own, added in their order afterwards: no bit
// depends on the number of threads.
//
// Plain C functions at the end, called through ctypes: compiling this takes a second.

#include "vectors.h"

namespace {

constexpr int64_t kRows = 4 * kTall;  // of a strip
constexpr int64_t kCols = 2048;       // columns of a row that are stepped, then multiplied

int64_t panels(int64_t size) { return blocks(size, kPanel); }

// Terms of a sum, with room for zeros up to what is multiplied at a time.
int64_t padded(int64_t terms) { return blocks(terms, kLine) * kLine; }

// Of all matrices the largest f.
template <class F>
int64_t largest(const Matrix *matrices, int64_t count, F f) {
  int64_t most = 0;
  for (int64_t i = 0; i < count; i++) most = std::max<int64_t>(most, f(matrices[i]));
  return most;
}

// Right factors (rank, cols) as panels of factors: panel q has its factors of a column together.
void pack_factors(const Matrix &x, int64_t block, Number *packed) {
  const int64_t first = block * kLine, end = std::min(first + kLine, x.cols);
  for (int64_t k = 0; k < x.rank; k++) {
    Number *panel = packed + k / kPanel * padded(x.cols) * kPanel;
    Number terms[kLine] = {};
    narrow(x.right + k * x.cols + first, end - first, terms);
    for (int64_t j = 0; j < kLine; j += kDeep) {
      const int64_t at = (first + j) * kPanel + k % kPanel * kDeep;
      memcpy(panel + at, terms + j, sizeof(Number) * kDeep);
    }
  }
}

// Scaled rows of at most N numbers, those together that are multiplied at a time; zeros behind.
template <int64_t N, class Scale>
void weave(const float *rows, int64_t apart, int64_t count, int64_t size, Scale scale, Number *to) {
  for (int64_t k = 0; k < count; k += kDeep, to += kDeep * N) {
    float scaled[N];
    Number terms[kDeep][N] = {};
    for (int64_t d = 0; d < std::min(kDeep, count - k); d++) {
      const float *row = rows + (k + d) * apart, factor = scale(k + d);
      for (int64_t i = 0; i < size; i++) scaled[i] = factor * row[i];
      narrow(scaled, size, terms[d]);
    }
    for (int64_t i = 0; i < N; i++) {
      for (int64_t d = 0; d < kDeep; d++) to[i * kDeep + d] = terms[d][i];
    }
  }
}

// -- pass 1 ------------------------------------------------------------------------------------

class Propose {
 public:
  Propose(const Scalars &scalars, int64_t most_rank)
      : scalars_(scalars),
        exact_(std::max(kFlat, kCols)),
        step_(kRows * kCols),
        image_(panels(most_rank) * kRows * kPanel) {}

  // Step a strip of rows; sums become sum_r left_kr (s right^T)_rk for all factors, then ||s||^2.
  void strip(const Matrix &x, int64_t number, const Number *packed, double *sums) {
    const int64_t first = number * kRows, rows = std::min(kRows, x.rows - first);
    double squared_norm = 0;
    for (int64_t k = 0; k < x.rank; k++) {  // wanted at the end
      for (int64_t r = 0; r < rows; r += kLine) ask(x.left + k * x.rows + first + r);
    }
    memset(image_.at(0), 0, sizeof(float) * panels(x.rank) * kRows * kPanel);
    for (int64_t col = 0; col < x.cols; col += kCols) {
      const int64_t cols = std::min(kCols, x.cols - col);
      for (int64_t r = 0; r < rows; r++) {
        squared_norm += adamw(x, (first + r) * x.cols + col, cols, scalars_, exact_.at(0));
        narrow(exact_.at(0), cols, step_.at(r * kCols));
      }
      multiply(x, rows, col, cols, packed);
    }
    for (int64_t k = 0; k < x.rank; k += kLane) {
      along(x.left + k * x.rows + first, x.rows, rows, k, std::min<int64_t>(kLane, x.rank - k), sums + k);
    }
    sums[x.rank] = squared_norm;
  }

  // The same of some numbers of a vector, or of a matrix without factors.
  void flat(const Matrix &x, int64_t number, double *sums) {
    const int64_t first = number * kFlat, size = std::min(kFlat, x.rows * x.cols - first);
    sums[x.rank] = adamw(x, first, size, scalars_, exact_.at(0));
    for (int64_t k = 0; k < x.rank; k++) {
      sums[k] = double(dot(x.right + k * x.cols + first, exact_.at(0), size)) * x.left[k];
    }
  }

 private:
  void multiply(const Matrix &x, int64_t rows, int64_t col, int64_t cols, const Number *packed) {
    for (int64_t q = 0; q < panels(x.rank); q++) {
      const Number *panel = packed + (q * padded(x.cols) + col) * kPanel;
      for (int64_t r = 0; r < rows; r += kTall) {
        float *image = image_.at((q * kRows + r) * kPanel);
        Sums sums = Sums::of(image);
        sums.add(step_.at(r * kCols), kCols, kDeep, panel, cols);
        sums.keep(image);
      }
    }
  }

  // sum_r left_kr image_rk of some factors, side by side.
  void along(const float *left, int64_t apart, int64_t rows, int64_t k, int64_t count, double *sums) {
    const float *image = image_.at(k / kPanel * kRows * kPanel + k % kPanel);
    double sum[kLane] = {};
    for (int64_t r = 0; r < rows; r++) {
      for (int64_t i = 0; i < count; i++) sum[i] += double(left[i * apart + r]) * image[r * kPanel + i];
    }
    memcpy(sums, sum, sizeof(double) * count);
  }

  const Scalars &scalars_;
  Buffer<float> exact_;  // a row of the step
  Buffer<Number> step_;  // (kRows, kCols)
  Buffer<float> image_;  // for every panel (kRows, kPanel)
};

// -- pass 2 ------------------------------------------------------------------------------------

class Apply {
 public:
  Apply(const float *weights, int64_t anchors, int64_t most_rank)
      : weights_(weights), anchors_(anchors), left_(padded(most_rank) * kRows) {}

  // Subtract the low-rank part of a strip of rows.
  void strip(const Matrix &x, int64_t number, const Number *packed) {
    const int64_t first = number * kRows, rows = std::min(kRows, x.rows - first);
    const auto scale = [&](int64_t k) { return -weight(x, k); };
    weave<kRows>(x.left + first, x.rows, x.rank, rows, scale, left_.at(0));
    for (int64_t r = 0; r < rows; r += kTall) {
      for (int64_t q = 0; q < panels(x.cols); q++) {
        Sums change;
        change.add(left_.at(r * kDeep), kDeep, kDeep * kRows, packed + q * padded(x.rank) * kPanel,
                   x.rank);
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
  Buffer<Number> left_;  // -a_k left_k of a strip, (rank, kRows)
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
  Buffer<Number> packed(largest(matrices, count, [](const Matrix &x) {
    return is_flat(x) ? 0 : panels(x.rank) * padded(x.cols) * kPanel;
  }));
#pragma omp parallel num_threads(threads)
  {
    Propose pass(*scalars, rank);
    for (const Matrix *x = matrices; x < matrices + count; x++) {
      const int64_t width = x->rank + 1;
      if (!is_flat(*x)) {
#pragma omp for
        for (int64_t i = 0; i < blocks(x->cols, kLine); i++) pack_factors(*x, i, packed.at(0));
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
  Buffer<Number> packed(largest(matrices, count, [](const Matrix &x) {
    return is_flat(x) ? 0 : panels(x.cols) * padded(x.rank) * kPanel;
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
          weave<kPanel>(x->right + q * kPanel, x->cols, x->rank, std::min(kPanel, x->cols - q * kPanel),
                        [](int64_t) { return 1.0f; }, packed.at(q * padded(x->rank) * kPanel));
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
