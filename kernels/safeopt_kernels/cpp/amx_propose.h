// Pass 1: AdamW, and c_i = sum over the factors k of anchor i of left_k s right_k^T.
#pragma once

#include "amx_lists.h"

namespace {

struct Proposed {
  const Scalars &scalars;
  int64_t anchors;
  Largest most;
  Buffer<double> sums;  // a row for every chunk: c_k, and ||s||^2 at the end

  double *at(int64_t chunk) { return sums.at(chunk * (most.rank + 1)); }
};

class Propose {
 public:
  explicit Propose(Proposed &shared)
      : shared_(shared),
        right_(shared.most.right),
        left_(kRows * (shared.most.rank + 1)),
        now_(blocks(shared.most.cols, 32) * kApart),
        before_(blocks(shared.most.cols, 32) * kApart) {}

  static bool takes(const Matrix &) { return true; }

  void chunk(const Chunk &chunk, int64_t number) {
    sums_ = shared_.at(number);
    std::fill(sums_, sums_ + shared_.most.rank + 1, 0.0);
    if (is_flat(*chunk.matrix)) return flat(chunk);
    if (x_ != chunk.matrix) pack_right(*chunk.matrix);
    x_ = chunk.matrix;
    pack_left(chunk);
    for (int64_t row = 0; row < chunk.size; row += kSide) {
      strip(chunk.first + row, std::min(kSide, chunk.size - row));
      begin(row);
    }
    while (steps_ > 0) multiply();
  }

 private:
  static constexpr int kSteps = kSplit ? 6 : 4;  // in which four tiles are multiplied

  static int64_t deep(const Matrix &x) { return blocks(x.cols, 32); }
  static int64_t tiles(const Matrix &x) { return blocks(x.rank, 64) * 4; }  // four at a time

  // Right factors as second operands: 16 pairs of columns times 16 factors a tile.
  void pack_right(const Matrix &x) {
    for (int64_t t = 0; t < tiles(x); t++) {  // few rows at a time, which memory brings on its own
      for (int64_t d = 0; d < deep(x); d++) {
        Pair columns[kSide];
        for (int i = 0; i < kSide; i++) {
          const int64_t k = t * kSide + i, left = k < x.rank ? x.cols - d * 32 : 0;
          const float *row = x.right + k * x.cols + d * 32;
          columns[i] = split(_mm512_maskz_loadu_ps(mask(left), row),
                             _mm512_maskz_loadu_ps(mask(left - kSide), row + kSide));
        }
        store_tile(columns, right_, (d * tiles(x) + t) * kTile);
      }
    }
  }

  // Left factors of 16 rows next to one another, which elsewhere have a page each.
  void pack_left(const Chunk &chunk) {
    const Matrix &x = *chunk.matrix;
    for (int64_t k = 0; k < x.rank; k++) {
      const float *from = x.left + k * x.rows + chunk.first;
      for (int64_t row = 0; row < chunk.size; row += kSide) {
        const __m512 some = _mm512_maskz_loadu_ps(mask(chunk.size - row), from + row);
        _mm512_store_ps(lefts(row) + k * kSide, some);
      }
    }
  }

  float *lefts(int64_t row) { return left_.at(row * (shared_.most.rank + 1)); }

  // Step 16 rows, and meanwhile take the products of the 16 rows before.
  void strip(int64_t first, int64_t rows) {
    const Matrix &x = *x_;
    const int64_t parts = rows * deep(x), steps = steps_;
    int64_t owed = 0;
    for (int64_t r = 0; r < kSide; r++) {
      __m512 squares = _mm512_setzero_ps();
      for (int64_t d = 0; d < deep(x); d++) {
        const int64_t at = d * kApart + r * 32;
        const Pair step = r < rows ? some(x, (first + r) * x.cols, d * 32, squares) : Pair{};
        now_.store(at, step.hi, step.lo);
        for (owed += steps; owed >= parts && steps_ > 0; owed -= parts) multiply();
      }
      sums_[shared_.most.rank] += _mm512_reduce_add_ps(squares);
    }
    while (steps_ > 0) multiply();
  }

  static void ask_ahead(const Matrix &x, int64_t at) {
    ask_closer(x.p + at + kAhead), ask_closer(x.g + at + kAhead);
    ask_closer(x.m + at + kAhead), ask_closer(x.v + at + kAhead);
  }

  Pair some(const Matrix &x, int64_t row, int64_t col, __m512 &squares) {
    const int64_t left = x.cols - col, at = row + col;
    ask_ahead(x, at), ask_ahead(x, at + kSide);
    const __m512 one = adamw(x, at, mask(left), shared_.scalars);
    const __m512 two = adamw(x, at + kSide, mask(left - kSide), shared_.scalars);
    squares = _mm512_fmadd_ps(one, one, squares);
    squares = _mm512_fmadd_ps(two, two, squares);
    return split(one, two);
  }

  // From now on the products are those of the rows that have just been stepped.
  void begin(int64_t row) {
    std::swap(now_, before_);
    row_ = row, d_ = quad_ = step_ = 0;
    steps_ = deep(*x_) * tiles(*x_) / 4 * kSteps;
  }

  // One of the steps in which 16 rows times 32 columns of s meet 64 factors.
  void multiply() {
    const Matrix &x = *x_;
    const int64_t at = (d_ * tiles(x) + quad_ * 4) * kTile;
    const uint16_t *hi = right_.hi.at(at), *lo = right_.lo.at(at);
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

  // c_k of 16 rows r: the sum of left_kr (s R^T)_rk.
  void sum_rows(const Matrix &x) {
    alignas(64) float image[4][kSide * kSide];
    _tile_stored(0, image[0], 64);
    _tile_stored(1, image[1], 64);
    _tile_stored(2, image[2], 64);
    _tile_stored(3, image[3], 64);
    const float *left = lefts(row_);
    for (int64_t k = quad_ * 64, t = 0; t < 4; t++) {
      __m512i columns[kSide];
      for (int i = 0; i < kSide; i++) columns[i] = _mm512_load_si512(image[t] + kSide * i);
      transpose(columns);
      for (int i = 0; i < kSide && k < x.rank; i++, k++) {
        const __m512 by_row = _mm512_castsi512_ps(columns[i]);
        sums_[k] += _mm512_reduce_add_ps(_mm512_mul_ps(by_row, _mm512_load_ps(left + k * kSide)));
      }
    }
  }

  void flat(const Chunk &chunk) {
    alignas(64) float step[kFlat];
    const Matrix &x = *chunk.matrix;
    const int64_t first = chunk.first, size = chunk.size;
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < size; i += kSide) {
      ask_ahead(x, first + i);
      const __m512 s = adamw(x, first + i, mask(size - i), shared_.scalars);
      squares = _mm512_fmadd_ps(s, s, squares);
      _mm512_store_ps(step + i, s);
    }
    sums_[shared_.most.rank] = _mm512_reduce_add_ps(squares);
    for (int64_t k = 0; k < x.rank; k++) {
      __m512 along = _mm512_setzero_ps();
      const float *right = x.right + k * x.cols + first;
      for (int64_t i = 0; i < size; i += kSide) {
        const __m512 factor = _mm512_maskz_loadu_ps(mask(size - i), right + i);
        along = _mm512_fmadd_ps(factor, _mm512_load_ps(step + i), along);
      }
      sums_[k] = double(_mm512_reduce_add_ps(along)) * x.left[k];
    }
  }

  Proposed &shared_;
  Halves right_;
  Buffer<float> left_;   // of a chunk: for every 16 rows all factors
  Halves now_, before_;  // steps of 16 rows, as tiles
  const Matrix *x_ = nullptr;
  int64_t row_ = 0, d_ = 0, quad_ = 0, steps_ = 0;
  int step_ = 0;
  double *sums_ = nullptr;
};

}  // namespace
