// Pass 1: AdamW, and c_i = sum over the factors k of anchor i of left_k s right_k^T.
#pragma once

#include "amx_lists.h"

namespace {

struct Proposed {
  const Scalars &scalars;
  int64_t anchors, width;
  double *c, *squared_norm;
  Halves factors;
  Buffer<double> sums;  // a row for every strip of a group: c_k, and ||s||^2 at the end
  int64_t most_cols;

  void add_up(const Group &group) {
    const double *row = sums.at(0);
    for (const Group::Part &part : group.parts) {
      for (int64_t i = 0; i < part.strips; i++, row += width) {
        for (int64_t k = 0; k < part.matrix->rank; k++) {
          c[k / (part.matrix->rank / anchors)] += row[k];
        }
        *squared_norm += row[width - 1];
      }
    }
  }
};

class Propose {
 public:
  static constexpr bool is_forward = true;

  explicit Propose(Proposed &shared)
      : shared_(shared), now_(shared.most_cols * kApart), before_(shared.most_cols * kApart) {}

  static int64_t deep(const Matrix &x) { return blocks(x.cols, 32); }
  static int64_t tiles(const Matrix &x) { return blocks(x.rank, 64) * 4; }  // four at a time

  static Group::Part part(const Matrix &x) {
    if (is_flat(x)) return {nullptr, 0, 0, blocks(x.rows * x.cols, kFlat), 0};
    return {nullptr, deep(x) * tiles(x) * kTile, deep(x), blocks(x.rows, kSide), 0};
  }

  // Right factors as second operands: 16 pairs of columns times 16 factors a tile.
  static void pack(const Group::Part &part, int64_t d, Halves &factors) {
    const Matrix &x = *part.matrix;
    for (int64_t t = 0; t < tiles(x); t++) {
      Pair columns[kSide];
      for (int i = 0; i < kSide; i++) {
        const int64_t k = t * kSide + i, left = k < x.rank ? x.cols - d * 32 : 0;
        const float *row = x.right + k * x.cols + d * 32;
        ask(row + kNext), ask(row + kNext + kSide);
        columns[i] = split(_mm512_maskz_loadu_ps(mask(left), row),
                           _mm512_maskz_loadu_ps(mask(left - kSide), row + kSide));
      }
      store_tile(columns, factors, part.at + (d * tiles(x) + t) * kTile);
    }
  }

  static void ask_for(const Matrix &x, int64_t strip) {
    if (is_flat(x)) return;
    for (int64_t k = 0; k < x.rank; k++) ask(x.left + k * x.rows + strip * kSide);
  }

  void strip(const Group::Part &part, int64_t number, int64_t slot) {
    double *sums = shared_.sums.at(slot * shared_.width);
    if (is_flat(*part.matrix)) return flat(*part.matrix, number, sums);
    const Matrix &x = *part.matrix;
    const int64_t first = number * kSide, rows = std::min(kSide, x.rows - first);
    const int64_t chunks = rows * deep(x);
    const int64_t steps = steps_;  // the products of the strip before, spread over these chunks
    int64_t owed = 0;
    double squared_norm = 0;
    for (int64_t r = 0; r < kSide; r++) {
      __m512 squares = _mm512_setzero_ps();
      for (int64_t d = 0; d < deep(x); d++) {
        const int64_t at = d * kApart + r * 32;
        const Pair step = r < rows ? chunk(x, (first + r) * x.cols, d * 32, squares) : Pair{};
        now_.store(at, step.hi, step.lo);
        for (owed += steps; owed >= chunks && steps_ > 0; owed -= chunks) multiply();
      }
      squared_norm += _mm512_reduce_add_ps(squares);
    }
    finish();
    sums[shared_.width - 1] = squared_norm;
    begin(part, first, sums);
  }

  // The products of the last strip.
  void finish() {
    while (steps_ > 0) multiply();
  }

 private:
  static constexpr int kSteps = kSplit ? 6 : 4;  // in which four tiles are multiplied

  static void ask_ahead(const Matrix &x, int64_t at) {
    ask(x.p + at + kAhead), ask(x.g + at + kAhead), ask(x.m + at + kAhead), ask(x.v + at + kAhead);
  }

  Pair chunk(const Matrix &x, int64_t row, int64_t col, __m512 &squares) {
    const int64_t left = x.cols - col, at = row + col;
    ask_ahead(x, at), ask_ahead(x, at + kSide);
    const __m512 one = adamw(x, at, mask(left), shared_.scalars);
    const __m512 two = adamw(x, at + kSide, mask(left - kSide), shared_.scalars);
    squares = _mm512_fmadd_ps(one, one, squares);
    squares = _mm512_fmadd_ps(two, two, squares);
    return split(one, two);
  }

  void begin(const Group::Part &part, int64_t first, double *sums) {
    std::swap(now_, before_);
    part_ = &part, first_ = first, sums_ = sums, d_ = quad_ = step_ = 0;
    steps_ = deep(*part.matrix) * tiles(*part.matrix) / 4 * kSteps;
  }

  // One of the steps in which 16 rows times 32 columns of s meet 64 factors.
  void multiply() {
    const Matrix &x = *part_->matrix;
    const int64_t at = part_->at + (d_ * tiles(x) + quad_ * 4) * kTile;
    const uint16_t *hi = shared_.factors.hi.at(at), *lo = shared_.factors.lo.at(at);
    steps_--;
    switch (step_++) {
      case 0:
        if (d_ == 0) {
          _tile_zero(0);
          _tile_zero(1);
          _tile_zero(2);
          _tile_zero(3);
        }
        _tile_loadd(4, before_.hi.at(d_ * kApart), 64);
        if (kSplit) _tile_loadd(5, before_.lo.at(d_ * kApart), 64);
        _tile_loadd(6, hi, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (kSplit) _tile_dpbf16ps(0, 5, 6);
        break;
      case 1:
        _tile_loadd(7, hi + kTile, 64);
        _tile_dpbf16ps(1, 4, 7);
        if (kSplit) _tile_dpbf16ps(1, 5, 7);
        break;
      case 2:
        _tile_loadd(6, hi + 2 * kTile, 64);
        _tile_dpbf16ps(2, 4, 6);
        if (kSplit) _tile_dpbf16ps(2, 5, 6);
        break;
      case 3:
        _tile_loadd(7, hi + 3 * kTile, 64);
        _tile_dpbf16ps(3, 4, 7);
        if (kSplit) _tile_dpbf16ps(3, 5, 7);
        break;
      case 4:
        _tile_loadd(6, lo, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, lo + kTile, 64);
        _tile_dpbf16ps(1, 4, 7);
        break;
      default:
        _tile_loadd(6, lo + 2 * kTile, 64);
        _tile_dpbf16ps(2, 4, 6);
        _tile_loadd(7, lo + 3 * kTile, 64);
        _tile_dpbf16ps(3, 4, 7);
    }
    if (step_ < kSteps) return;
    step_ = 0;
    if (++d_ == deep(x)) sum_rows(x), d_ = 0, quad_++;
  }

  // c_k of a strip: the sum over its rows r of left_kr (s R^T)_rk.
  void sum_rows(const Matrix &x) {
    alignas(64) float image[4][kSide * kSide];
    _tile_stored(0, image[0], 64);
    _tile_stored(1, image[1], 64);
    _tile_stored(2, image[2], 64);
    _tile_stored(3, image[3], 64);
    const __mmask16 rows = mask(x.rows - first_);
    for (int64_t k = quad_ * 64, t = 0; t < 4; t++) {
      __m512i columns[kSide];
      for (int i = 0; i < kSide; i++) columns[i] = _mm512_load_si512(image[t] + kSide * i);
      transpose(columns);
      for (int i = 0; i < kSide && k < x.rank; i++, k++) {
        const __m512 left = _mm512_maskz_loadu_ps(rows, x.left + k * x.rows + first_);
        sums_[k] = _mm512_reduce_add_ps(_mm512_mul_ps(_mm512_castsi512_ps(columns[i]), left));
      }
    }
  }

  void flat(const Matrix &x, int64_t number, double *sums) {
    alignas(64) float step[kFlat];
    const int64_t first = number * kFlat, size = std::min(kFlat, x.rows * x.cols - first);
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < size; i += kSide) {
      ask_ahead(x, first + i);
      const __m512 s = adamw(x, first + i, mask(size - i), shared_.scalars);
      squares = _mm512_fmadd_ps(s, s, squares);
      _mm512_store_ps(step + i, s);
    }
    sums[shared_.width - 1] = _mm512_reduce_add_ps(squares);
    for (int64_t k = 0; k < x.rank; k++) {
      __m512 along = _mm512_setzero_ps();
      const float *right = x.right + k * x.cols + first;
      for (int64_t i = 0; i < size; i += kSide) {
        const __m512 factor = _mm512_maskz_loadu_ps(mask(size - i), right + i);
        along = _mm512_fmadd_ps(factor, _mm512_load_ps(step + i), along);
      }
      sums[k] = double(_mm512_reduce_add_ps(along)) * x.left[k];
    }
  }

  Proposed &shared_;
  Halves now_, before_;  // steps of a strip, as tiles
  const Group::Part *part_ = nullptr;
  int64_t first_ = 0, d_ = 0, quad_ = 0, steps_ = 0;
  int step_ = 0;
  double *sums_ = nullptr;
};

}  // namespace
