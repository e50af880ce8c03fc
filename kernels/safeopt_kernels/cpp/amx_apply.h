// Pass 2: p <- p - sum_k a_k left_k^T right_k.
#pragma once

#include "amx_lists.h"

namespace {

struct Applied {
  const float *weights;
  int64_t anchors, most_rank;
  Halves factors;

  void add_up(const Group &) {}
  float weight(const Matrix &x, int64_t k) const { return weights[k / (x.rank / anchors)]; }
};

class Apply {
 public:
  static constexpr bool is_forward = false;  // what pass 1 did last may still be in the cache

  explicit Apply(Applied &shared)
      : shared_(shared), left_(2 * blocks(shared.most_rank, 32) * kTile), changes_(4 * kTile) {}

  static int64_t deep(const Matrix &x) { return blocks(x.rank, 32); }

  static Group::Part part(const Matrix &x) {
    if (x.rank == 0) return {nullptr, 0, 0, 0, 0};
    if (is_flat(x)) return {nullptr, 0, 0, blocks(x.cols, kFlat), 0};
    const int64_t pairs = blocks(x.cols, 32);
    return {nullptr, 2 * pairs * deep(x) * kTile, pairs, blocks(x.rows, kRows), 0};
  }

  // Right factors as second operands: 16 pairs of factors times 16 columns a tile.
  static void pack(const Group::Part &part, int64_t pair, Halves &factors) {
    const Matrix &x = *part.matrix;
    for (int64_t k = 0; k < 32 * deep(x); k += 2) {
      for (int64_t c = 2 * pair; c < 2 * pair + 2; c++) {
        const __mmask16 cols = mask(x.cols - c * kSide);
        const float *row = x.right + k * x.cols + c * kSide;
        ask(row + kNext), ask(row + x.cols + kNext);
        const Pair halves = split(_mm512_maskz_loadu_ps(k < x.rank ? cols : 0, row),
                                  _mm512_maskz_loadu_ps(k + 1 < x.rank ? cols : 0, row + x.cols));
        const int64_t at = part.at + (c * deep(x) + k / 32) * kTile + k % 32 * kSide;
        factors.store(at, zipped(halves.hi), zipped(halves.lo));
      }
    }
  }

  // Factors and the first columns of a strip that comes later.
  static void ask_for(const Matrix &x, int64_t strip) {
    if (is_flat(x)) return;
    const int64_t first = strip * kRows, rows = std::min(kRows, x.rows - first);
    for (int64_t k = 0; k < x.rank; k++) {
      for (int64_t r = 0; r < rows; r += kSide) ask(x.left + k * x.rows + first + r);
    }
    for (int64_t r = 0; r < rows; r++) {
      for (int64_t c = 0; c < kSoon; c += kSide) ask(x.p + (first + r) * x.cols + c);
    }
  }

  void strip(const Group::Part &part, int64_t number, int64_t) {
    const Matrix &x = *part.matrix;
    if (is_flat(x)) return flat(x, number);
    const int64_t first = number * kRows, pairs = blocks(x.cols, 32);
    rows_ = std::min(kRows, x.rows - first);
    scale(x, first, 0);
    scale(x, first + kSide, deep(x) * kTile);
    for (int64_t pair = -1; pair < pairs; pair++) {
      r_ = pair < 0 ? rows_ : 0;  // before the first pair of columns nothing is known
      p_ = x.p + first * x.cols + pair * 32;
      const float *change = changes_.at(pair % 2 == 0 ? 0 : 2 * kTile);
      if (pair + 1 < pairs) {
        multiply(part, pair + 1, x, change, changes_.at(pair % 2 == 0 ? 2 * kTile : 0), pair);
      }
      add(x, change, pair, rows_);
    }
  }

  void finish() {}

 private:
  static constexpr int64_t kRows = 2 * kSide;  // of a strip: a right factor is loaded for all
  static constexpr int64_t kSoon = 64;         // columns that memory is asked for beforehand

  // -a_k left_k of 16 rows, as first operands.
  void scale(const Matrix &x, int64_t first, int64_t at) {
    const __mmask16 rows = mask(x.rows - first);
    const auto scaled = [&](int64_t k) {
      if (k >= x.rank) return _mm512_setzero_ps();
      const __m512 left = _mm512_maskz_loadu_ps(rows, x.left + k * x.rows + first);
      return _mm512_mul_ps(left, _mm512_set1_ps(-shared_.weight(x, k)));
    };
    for (int64_t d = 0; d < deep(x); d++) {
      Pair columns[kSide];
      for (int i = 0; i < kSide; i++) {
        const Pair pair = split(scaled(d * 32 + 2 * i), scaled(d * 32 + 2 * i + 1));
        columns[i] = {zipped(pair.hi), zipped(pair.lo)};
      }
      store_tile(columns, left_, at + d * kTile);
    }
  }

  // Multiply the next 32 columns while the change of these ones is added.
  void multiply(const Group::Part &part, int64_t next, const Matrix &x, const float *change,
                float *target, int64_t pair) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const int64_t below = deep(x) * kTile, parts = (kSplit ? 3 : 1) * deep(x);
    for (int64_t d = 0, done = 0; d < deep(x); d++) {
      const int64_t one = part.at + (2 * next * deep(x) + d) * kTile, two = one + deep(x) * kTile;
      _tile_loadd(6, shared_.factors.hi.at(one), 64);
      _tile_loadd(7, shared_.factors.hi.at(two), 64);
      if (kSplit) {
        multiply_by(left_.lo.at(d * kTile), below);
        add(x, change, pair, ++done * rows_ / parts);
      }
      multiply_by(left_.hi.at(d * kTile), below);
      add(x, change, pair, ++done * rows_ / parts);
      if (!kSplit) continue;
      _tile_loadd(6, shared_.factors.lo.at(one), 64);
      _tile_loadd(7, shared_.factors.lo.at(two), 64);
      multiply_all();
      add(x, change, pair, ++done * rows_ / parts);
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

  // Add the change of 32 columns, up to row ``end``.
  void add(const Matrix &x, const float *change, int64_t pair, int64_t end) {
    const __mmask16 k0 = mask(x.cols - pair * 32), k1 = mask(x.cols - pair * 32 - kSide);
    for (; r_ < end; r_++) {
      float *p = p_ + r_ * x.cols;
      const float *d = change + r_ * 32;
      ask(p + kSoon), ask(p + kSoon + kSide);
      _mm512_mask_storeu_ps(p, k0, _mm512_add_ps(_mm512_maskz_loadu_ps(k0, p), _mm512_load_ps(d)));
      _mm512_mask_storeu_ps(p + kSide, k1, _mm512_add_ps(_mm512_maskz_loadu_ps(k1, p + kSide),
                                                         _mm512_load_ps(d + kSide)));
    }
  }

  void flat(const Matrix &x, int64_t number) {
    const int64_t first = number * kFlat, end = std::min(x.cols, first + kFlat);
    for (int64_t i = first; i < end; i += kSide) {
      const __mmask16 m = mask(end - i);
      __m512 change = _mm512_setzero_ps();
      for (int64_t k = 0; k < x.rank; k++) {
        const __m512 factor = _mm512_set1_ps(shared_.weight(x, k) * x.left[k]);
        change = _mm512_fmadd_ps(factor, _mm512_maskz_loadu_ps(m, x.right + k * x.cols + i), change);
      }
      _mm512_mask_storeu_ps(x.p + i, m, _mm512_sub_ps(_mm512_maskz_loadu_ps(m, x.p + i), change));
    }
  }

  Applied &shared_;
  Halves left_;
  Buffer<float> changes_;
  int64_t rows_ = 0, r_ = 0;
  float *p_ = nullptr;
};

}  // namespace
