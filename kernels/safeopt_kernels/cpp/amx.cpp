// AdamW less a low-rank part, for CPUs with AVX-512 and AMX tiles: two passes over memory.
//
// Pass 1 steps a strip of 16 rows and puts the step aside in bf16, and meanwhile multiplies the
// strip before it with the right factors; pass 2 subtracts the low-rank part of 32 rows, 32 columns
// at a time, while memory brings the next ones. So the tile unit does not wait for memory.
// A float32 number x goes into a product as hi + lo with hi = bf16(x), lo = bf16(x - hi), and a
// product is hi hi + lo hi + hi lo, summed in float32: 16 bits of each factor count. With
// SAFEOPT_BF16 it is hi hi alone. Every 512 rows have sums of their own, added in their order
// afterwards: no bit depends on the number of threads.
//
// Plain C functions at the end, called through ctypes: compiling this takes a second or two.

#include "amx_apply.h"
#include "amx_propose.h"

extern "C" {

// Ask the kernel for the tile registers; 0 if it gives them.
int prepare() { return static_cast<int>(syscall(SYS_arch_prctl, 0x1023, 18)); }

// Update m and v, p <- p + s; add <G_i, s> to c (anchors,) and the squared length of s to the last.
void propose(const Matrix *matrices, int64_t count, int64_t anchors, const Scalars *scalars,
             int threads, double *c, double *squared_norm) {
  const auto chunks = chunks_of<Propose>(matrices, count);
  const Largest most(matrices, count);
  Proposed shared{*scalars, anchors, most, Buffer<double>(chunks.size() * (most.rank + 1))};
  run<Propose>(chunks, threads, shared);
  for (size_t i = 0; i < chunks.size(); i++) {
    const double *sums = shared.at(i);
    const int64_t rank = chunks[i].matrix->rank;
    for (int64_t k = 0; k < rank; k++) c[k / (rank / anchors)] += sums[k];
    *squared_norm += sums[most.rank];
  }
}

// p <- p - sum_i a_i G_i.
void apply(const Matrix *matrices, int64_t count, int64_t anchors, const float *weights,
           int threads) {
  auto chunks = chunks_of<Apply>(matrices, count);
  std::reverse(chunks.begin(), chunks.end());  // what pass 1 did last may still be in the cache
  Applied shared{weights, anchors, Largest(matrices, count)};
  run<Apply>(chunks, threads, shared);
}

// 1 if every number of all arrays is finite.
int all_finite(const float *const *arrays, const int64_t *sizes, int64_t count, int threads) {
  int found = 0;
#pragma omp parallel num_threads(threads) reduction(| : found)
  for (int64_t i = count; i-- > 0;) {  // the first ones are wanted next
    __m512 sum = _mm512_setzero_ps();
#pragma omp for schedule(static) nowait
    for (int64_t block = 0; block < blocks(sizes[i], kFlat); block++) {
      const int64_t end = std::min(sizes[i], (block + 1) * kFlat);
      for (int64_t j = block * kFlat; j < end; j += kSide) {
        const __m512 x = _mm512_maskz_loadu_ps(mask(end - j), arrays[i] + j);
        ask_closer(arrays[i] + j + 2048);
        sum = _mm512_fmadd_ps(x, _mm512_setzero_ps(), sum);  // 0, or NaN
      }
    }
    found |= _mm512_cmp_ps_mask(sum, sum, _CMP_UNORD_Q) != 0;
  }
  return found == 0;
}
}
