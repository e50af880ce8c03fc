// What registers do with runs of numbers, and with six rows of a product.
#pragma once

#include <math.h>
#include <omp.h>

#include "matrices.h"

namespace {

#if defined(__AVX512F__)
constexpr int kLane = 16, kWide = 4;  // numbers of a vector, vectors of a row that registers hold
#else
constexpr int kLane = 8, kWide = 2;
#endif
constexpr int64_t kTall = 6;               // rows of a product that registers hold
constexpr int64_t kPanel = kLane * kWide;  // numbers of such a row
constexpr int64_t kLine = 16;              // numbers that memory brings together

typedef float Vector __attribute__((vector_size(4 * kLane)));

Vector load(const float *from) {
  Vector x;
  memcpy(&x, from, sizeof x);
  return x;
}

void store(float *to, Vector x) { memcpy(to, &x, sizeof x); }

void ask(const float *address) { __builtin_prefetch(address, 0, 2); }

// Lines of the rows of a matrix that are wanted soon, asked for a few at a time.
class Ahead {
 public:
  Ahead(const Matrix &x, int64_t row, int64_t rows, int64_t col, int64_t cols, bool moments)
      : x_(x), at_(row * x.cols + col), lines_(blocks(std::max<int64_t>(cols, 0), kLine)),
        left_(lines_ * std::max<int64_t>(rows, 0)), moments_(moments) {}

  int64_t left() const { return left_; }

  void ask_for(int64_t lines) {
    for (lines = std::min(lines, left_), left_ -= lines; lines > 0; lines--) {
      const int64_t at = at_ + line_ * kLine;
      ask(x_.p + at);
      if (moments_) ask(x_.g + at), ask(x_.m + at), ask(x_.v + at);
      if (++line_ == lines_) line_ = 0, at_ += x_.cols;
    }
  }

 private:
  const Matrix &x_;
  int64_t at_, line_ = 0, lines_, left_;
  bool moments_;
};

// Six rows of a panel's width, in registers.
struct Sums {
  Vector at[kTall][kWide] = {};

  static Sums of(const float *image) {
    Sums sums;
    for (int64_t r = 0; r < kTall; r++) {
      for (int w = 0; w < kWide; w++) sums.at[r][w] = load(image + r * kPanel + w * kLane);
    }
    return sums;
  }

  void keep(float *image) const {
    for (int64_t r = 0; r < kTall; r++) {
      for (int w = 0; w < kWide; w++) store(image + r * kPanel + w * kLane, at[r][w]);
    }
  }

  // Add sum_j a_rj panel_j, j < depth, where a_rj lies at a + r * row + j * col.
  void add(const float *a, int64_t row, int64_t col, const float *panel, int64_t depth) {
    for (int64_t j = 0; j < depth; j++, a += col, panel += kPanel) {
      Vector b[kWide];
      for (int w = 0; w < kWide; w++) b[w] = load(panel + w * kLane);
      for (int64_t r = 0; r < kTall; r++) {
        for (int w = 0; w < kWide; w++) at[r][w] += a[r * row] * b[w];
      }
    }
  }
};

// AdamW of some numbers; puts the step that was stored, p_after - p_before, into ``step`` and
// returns its squared length.
float adamw(const Matrix &x, int64_t at, int64_t size, const Scalars &a, float *__restrict step) {
  float *__restrict p = x.p + at, *__restrict m = x.m + at, *__restrict v = x.v + at;
  const float *__restrict g = x.g + at;
  const float scale = 1 / a.root_correction;
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < size; i++) {
    m[i] = a.beta1 * m[i] + a.one_minus_beta1 * g[i];
    v[i] = a.beta2 * v[i] + a.one_minus_beta2 * (g[i] * g[i]);
    const float exact = -a.step_size * m[i] / (sqrtf(v[i]) * scale + a.eps);
    const float before = p[i], after = before + (exact - a.decay * before);
    p[i] = after;
    step[i] = after - before;
    squares += step[i] * step[i];
  }
  return squares;
}

// sum_i a_i b_i.
float dot(const float *a, const float *b, int64_t size) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; i++) sum += a[i] * b[i];
  return sum;
}

// NaN if a number is infinite or NaN, else 0.
float nothing(const float *x, int64_t size) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; i++) sum += x[i] * 0.0f;
  return sum;
}

}  // namespace
