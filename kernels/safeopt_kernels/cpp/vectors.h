// What registers do with runs of numbers, and with six rows of a product.
#pragma once

#include <immintrin.h>
#include <math.h>

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

// How numbers go into products: as they are, or in bf16, two terms of a sum at a time.
#if defined(SAFEOPT_BF16)
typedef uint16_t Number;
constexpr int64_t kDeep = 2;  // terms at a time

void narrow(const float *from, int64_t size, Number *to) {
  for (int64_t i = 0; i < size; i += kLane) {
    const int64_t left = std::min(size - i, int64_t(kLane));
    const __m512 x = _mm512_maskz_loadu_ps((1u << left) - 1, from + i);
    _mm256_mask_storeu_epi16(to + i, (1u << (left + left % 2)) - 1, (__m256i)_mm512_cvtneps_pbh(x));
  }
}

// sum + a_0 b_0 + a_1 b_1, a number (pair) times a vector (of pairs).
Vector plus(Vector sum, const Number *a, const Number *b) {
  int pair;
  memcpy(&pair, a, sizeof pair);
  const __m512bh many = (__m512bh)_mm512_loadu_si512(b);
  return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), many);
}
#else
typedef float Number;
constexpr int64_t kDeep = 1;

void narrow(const float *from, int64_t size, Number *to) { memcpy(to, from, sizeof(float) * size); }

Vector plus(Vector sum, const Number *a, const Number *b) { return sum + *a * load(b); }
#endif

void ask(const float *address) { __builtin_prefetch(address, 0, 2); }

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

  // Add sum_j a_rj panel_j, j < depth, where the next kDeep a_rj lie at a + r * row + j / kDeep * col.
  void add(const Number *a, int64_t row, int64_t col, const Number *panel, int64_t depth) {
    for (int64_t j = 0; j < depth; j += kDeep, a += col, panel += kDeep * kPanel) {
      for (int64_t r = 0; r < kTall; r++) {
        for (int w = 0; w < kWide; w++) {
          at[r][w] = plus(at[r][w], a + r * row, panel + w * kDeep * kLane);
        }
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
