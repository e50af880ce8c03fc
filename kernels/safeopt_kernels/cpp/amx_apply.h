// Pass 2: p <- p - sum_k a_k left_k^T right_k.
#pragma once

#include "amx_lists.h"

namespace {

struct Applied {
  const float *weights;
  int64_t anchors;
  Largest most;

  float weight(const Matrix &x, int64_t k) const { return weights[k / (x.rank / anchors)]; }
};

// Columns of a strip that memory is asked for a few rows at a time, so that it is busy while tiles
// are: more requests at once than a core can hold make it wait.
class Soon {
 public:
  Soon(const float *first, int64_t apart, int64_t rows) : at_(first), apart_(apart), rows_(rows) {}

  void ask_for(int64_t some) {
    for (; some > 0 && rows_ > 0; some--, rows_--, at_ += apart_) {
      ask_closer(at_);
      ask_closer(at_ + kSide);
    }
  }

 private:
  const float *at_;
  int64_t apart_, rows_;
};

class Apply {
 public:
  explicit Apply(Applied &shared)
      : shared_(shared),
        right_(shared.most.right),
        left_(kRows * blocks(shared.most.rank, 32) * 32),
        changes_(kStrip * 32) {}

  static bool takes(const Matrix &x) { return x.rank > 0; }

  void chunk(const Chunk &chunk, int64_t) {
    const Matrix &x = *chunk.matrix;
    if (is_flat(x)) return flat(chunk);
    if (x_ != &x) pack_right(x);
    x_ = &x;
    for (int64_t d = 0; d < deep(x); d++) {
      for (int64_t row = 0; row < blocks(chunk.size, kStrip) * kStrip; row += kSide) {
        pack_left(chunk, row, d);
      }
    }
    for (int64_t row = 0; row < chunk.size; row += kStrip) {
      ask_for(x, chunk.first + row + kStrip);
      strip(row, std::min(kStrip, chunk.size - row), x.p + (chunk.first + row) * x.cols);
    }
  }

 private:
  static constexpr int64_t kStrip = 2 * kSide;  // rows: a right factor is loaded for all
  static constexpr int64_t kSoon = 64;          // columns that memory is asked for beforehand

  static int64_t deep(const Matrix &x) { return blocks(x.rank, 32); }

  // Right factors as second operands: 16 pairs of factors times 16 columns a tile.
  void pack_right(const Matrix &x) {
    for (int64_t k = 0; k < 32 * deep(x); k += 2) {
      for (int64_t c = 0; c < 2 * blocks(x.cols, 32); c++) {
        const __mmask16 cols = mask(x.cols - c * kSide);
        const float *row = x.right + k * x.cols + c * kSide;
        const Pair halves = split(_mm512_maskz_loadu_ps(k < x.rank ? cols : 0, row),
                                  _mm512_maskz_loadu_ps(k + 1 < x.rank ? cols : 0, row + x.cols));
        const int64_t at = (c * deep(x) + k / 32) * kTile + k % 32 * kSide;
        right_.store(at, halves.hi, halves.lo);
      }
    }
  }

  // -a_k left_k of 16 rows and 32 factors, as a first operand.
  void pack_left(const Chunk &chunk, int64_t row, int64_t d) {
    const Matrix &x = *chunk.matrix;
    const __mmask16 rows = mask(chunk.size - row);
    const auto scaled = [&](int64_t k) {
      if (k >= x.rank) return _mm512_setzero_ps();
      const float *from = x.left + k * x.rows + chunk.first + row;
      const __m512 left = _mm512_maskz_loadu_ps(rows, from);
      return _mm512_mul_ps(left, _mm512_set1_ps(-shared_.weight(x, k)));
    };
    Pair columns[kSide];
    for (int i = 0; i < kSide; i++) {
      columns[i] = split(scaled(d * 32 + 2 * i), scaled(d * 32 + 2 * i + 1));
    }
    store_tile(columns, left_, row * deep(x) * 32 + d * kTile);
  }

  // The first columns of the rows that come next.
  static void ask_for(const Matrix &x, int64_t first) {
    for (int64_t r = first; r < std::min(first + kStrip, x.rows); r++) {
      for (int64_t c = 0; c < kSoon; c += kSide) ask(x.p + r * x.cols + c);
    }
  }

  void strip(int64_t row, int64_t rows, float *p) {
    const int64_t pairs = blocks(x_->cols, 32);
    for (int64_t pair = 0; pair < pairs; pair++) {
      multiply(row, pair, Soon(p + pair * 32 + kSoon, x_->cols, rows));
      add(*x_, p, pair, rows);
    }
  }

  // The change of 32 columns. It is taken while memory brings those that come soon.
  void multiply(int64_t row, int64_t pair, Soon soon) {
    float *target = changes_.at(0);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const int64_t tiles = deep(*x_), below = tiles * kTile;
    const int64_t some = blocks(kStrip, tiles * (kSplit ? 3 : 1));
    for (int64_t d = 0; d < tiles; d++) {
      const int64_t left = row * tiles * 32 + d * kTile;
      const int64_t one = (2 * pair * tiles + d) * kTile, two = one + below;
      _tile_loadd(6, right_.hi.at(one), 64);
      _tile_loadd(7, right_.hi.at(two), 64);
      if (kSplit) {
        multiply_by(left_.lo.at(left), below);
        soon.ask_for(some);
      }
      multiply_by(left_.hi.at(left), below);
      soon.ask_for(some);
      if (!kSplit) continue;
      _tile_loadd(6, right_.lo.at(one), 64);
      _tile_loadd(7, right_.lo.at(two), 64);
      multiply_all();
      soon.ask_for(some);
    }
    _tile_stored(0, target, 128);
    _tile_stored(1, target + kSide, 128);
    _tile_stored(2, target + kTile, 128);
    _tile_stored(3, target + kTile + kSide, 128);
  }

  static void multiply_by(const uint16_t *left, int64_t below) {
    _tile_loadd(4, left, 64);
    _tile_loadd(5, left + below, 64);
    multiply_all();
  }

  // Tiles 0 to 3, rows by columns, are what 4 and 5 (rows) and 6 and 7 (columns) make.
  static void multiply_all() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }

  void add(const Matrix &x, float *p, int64_t pair, int64_t rows) {
    const float *change = changes_.at(0);
    const __mmask16 k0 = mask(x.cols - pair * 32), k1 = mask(x.cols - pair * 32 - kSide);
    p += pair * 32;
    for (int64_t r = 0; r < rows; r++, p += x.cols, change += 32) {
      const __m512 one = _mm512_add_ps(_mm512_maskz_loadu_ps(k0, p), _mm512_load_ps(change));
      const __m512 two =
          _mm512_add_ps(_mm512_maskz_loadu_ps(k1, p + kSide), _mm512_load_ps(change + kSide));
      _mm512_mask_storeu_ps(p, k0, one);
      _mm512_mask_storeu_ps(p + kSide, k1, two);
    }
  }

  void flat(const Chunk &chunk) {
    const Matrix &x = *chunk.matrix;
    const int64_t end = chunk.first + chunk.size;
    for (int64_t i = chunk.first; i < end; i += kSide) {
      const __mmask16 m = mask(end - i);
      __m512 change = _mm512_setzero_ps();
      for (int64_t k = 0; k < x.rank; k++) {
        const __m512 factor = _mm512_set1_ps(shared_.weight(x, k) * x.left[k]);
        const __m512 right = _mm512_maskz_loadu_ps(m, x.right + k * x.cols + i);
        change = _mm512_fmadd_ps(factor, right, change);
      }
      _mm512_mask_storeu_ps(x.p + i, m, _mm512_sub_ps(_mm512_maskz_loadu_ps(m, x.p + i), change));
    }
  }

  Applied &shared_;
  Halves right_, left_;  // the latter of a chunk
  Buffer<float> changes_;
  const Matrix *x_ = nullptr;
};

}  // namespace
