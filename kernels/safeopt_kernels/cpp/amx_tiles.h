// Matrices, and what registers and tiles do with 16 rows or 16 numbers of them.
#pragma once

#include <immintrin.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <vector>

#include "matrices.h"

namespace {

constexpr int64_t kSide = 16;             // rows of a tile, and numbers of a vector
constexpr int64_t kTile = 512;            // bf16 numbers of a tile: 16 rows of 32
constexpr int64_t kApart = kTile + 32;    // between tiles that would else share cache sets
constexpr int64_t kRows = 512;            // of a chunk of a matrix
constexpr int64_t kAhead = 256;            // numbers that memory is asked for beforehand

__mmask16 mask(int64_t left) {
  return left >= kSide ? 0xffff : left <= 0 ? 0 : static_cast<__mmask16>((1u << left) - 1);
}

void ask(const void *address) {
  _mm_prefetch(static_cast<const char *>(address), _MM_HINT_T1);
}

void ask_closer(const void *address) {
  _mm_prefetch(static_cast<const char *>(address), _MM_HINT_T0);
}

#if defined(SAFEOPT_BF16)
constexpr bool kSplit = false;  // a number enters a product as bf16
#else
constexpr bool kSplit = true;  // as the sum of two
#endif

struct Pair {
  __m512i hi, lo;
};

// hi and, if numbers are split, lo of the same numbers.
struct Halves {
  explicit Halves(int64_t size) : hi(size), lo(kSplit ? size : 0) {}
  Buffer<uint16_t> hi, lo;

  void store(int64_t at, __m512i high, __m512i low) {
    _mm512_store_si512(hi.at(at), high);
    if (kSplit) _mm512_store_si512(lo.at(at), low);
  }
};

// The nearest bf16 number in the upper half of each word; the lower half is of no use. Of two as
// near the even one, as elsewhere, unless a second number takes up what is left.
__m512i rounded(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  if (kSplit) return _mm512_add_epi32(bits, _mm512_set1_epi32(0x8000));
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
}

// a0 b0 a1 b1 .. of the upper halves of words.
__m512i upper_halves(__m512i a, __m512i b) {
  return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(a, 16), b);
}

// What a bf16 number in the upper half of each word leaves of x.
__m512 rest(__m512 x, __m512i bf16) {
  const __m512i upper = _mm512_and_si512(bf16, _mm512_set1_epi32(0xffff0000));
  return _mm512_sub_ps(x, _mm512_castsi512_ps(upper));
}

// Numbers in pairs, one of each argument, as products along them want both operands.
Pair split(__m512 first, __m512 second) {
  const __m512i one = rounded(first), two = rounded(second), hi = upper_halves(one, two);
  if (!kSplit) return {hi, hi};
  return {hi, upper_halves(rounded(rest(first, one)), rounded(rest(second, two)))};
}

void transpose(__m512i r[kSide]) {  // 16 x 16 words
  __m512i t[kSide];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int k = 0; k < 2; k++) {
      r[i + 2 * k] = _mm512_unpacklo_epi64(t[i + k], t[i + k + 2]);
      r[i + 2 * k + 1] = _mm512_unpackhi_epi64(t[i + k], t[i + k + 2]);
    }
  }
  for (int i = 0; i < 4; i++) {
    for (int k = 0; k < 16; k += 8) {
      t[i + k] = _mm512_shuffle_i32x4(r[i + k], r[i + k + 4], 0x88);
      t[i + k + 4] = _mm512_shuffle_i32x4(r[i + k], r[i + k + 4], 0xdd);
    }
  }
  for (int i = 0; i < 8; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

// Sixteen columns as a tile of each half.
void store_tile(Pair columns[kSide], Halves &halves, int64_t at) {
  __m512i hi[kSide], lo[kSide];
  for (int i = 0; i < kSide; i++) hi[i] = columns[i].hi, lo[i] = columns[i].lo;
  transpose(hi);
  if (kSplit) transpose(lo);
  for (int i = 0; i < kSide; i++) halves.store(at + 32 * i, hi[i], lo[i]);
}

// Eight tiles of 16 rows of 64 bytes. A constant, since GCC takes the instruction to read no more
// than eight bytes of it and may set what a function fills in after them.
struct Tiles {
  uint8_t palette, start, unused[14];
  uint16_t width[16];
  uint8_t rows[16];
};
constexpr Tiles kTiles = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

void configure_tiles() { _tile_loadconfig(&kTiles); }

// One vector of AdamW; returns the step that was stored, p_after - p_before.
inline __m512 adamw(const Matrix &x, int64_t at, __mmask16 k, const Scalars &a) {
  const __m512 p = _mm512_maskz_loadu_ps(k, x.p + at), g = _mm512_maskz_loadu_ps(k, x.g + at);
  __m512 m = _mm512_maskz_loadu_ps(k, x.m + at), v = _mm512_maskz_loadu_ps(k, x.v + at);
  m = _mm512_fmadd_ps(m, _mm512_set1_ps(a.beta1),
                      _mm512_mul_ps(g, _mm512_set1_ps(a.one_minus_beta1)));
  v = _mm512_fmadd_ps(v, _mm512_set1_ps(a.beta2),
                      _mm512_mul_ps(_mm512_mul_ps(g, g), _mm512_set1_ps(a.one_minus_beta2)));
  const __m512 root = _mm512_mul_ps(_mm512_sqrt_ps(v), _mm512_set1_ps(1 / a.root_correction));
  const __m512 denominator = _mm512_add_ps(root, _mm512_set1_ps(a.eps));
  const __m512 step = _mm512_div_ps(_mm512_mul_ps(m, _mm512_set1_ps(-a.step_size)), denominator);
  const __m512 after = _mm512_add_ps(p, _mm512_fnmadd_ps(p, _mm512_set1_ps(a.decay), step));
  _mm512_mask_storeu_ps(x.m + at, k, m);
  _mm512_mask_storeu_ps(x.v + at, k, v);
  _mm512_mask_storeu_ps(x.p + at, k, after);
  return _mm512_maskz_sub_ps(k, after, p);
}

}  // namespace
