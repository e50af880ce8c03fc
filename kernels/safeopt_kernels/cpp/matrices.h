// What the C++ here works on, and how it is split up.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <utility>

extern "C" {

// A matrix p (rows, cols) of a list, row by row, with factors left (rank, rows), right (rank, cols).
struct Matrix {
  float *p;
  const float *g;
  float *m, *v;
  const float *left, *right;
  int64_t rows, cols, rank;  // rank: of all anchors together, N q
};

struct Scalars {
  float decay, step_size, beta1, one_minus_beta1, beta2, one_minus_beta2, root_correction, eps;
};
}

namespace {

constexpr int64_t kFlat = 16384;  // numbers of a block of what has no matrix products

int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

// Norms and biases, and what has no factors, are done as rows.
bool is_flat(const Matrix &x) { return x.rows == 1 || x.rank == 0; }

// Numbers whose values nobody has set yet.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) {
    const size_t bytes = blocks(size * sizeof(T) + 1, 4096) * 4096;
    data_ = static_cast<T *>(aligned_alloc(4096, bytes));
    if (data_ == nullptr) abort();
#if defined(SAFEOPT_POISON)
    memset(data_, 0xff, bytes);  // NaN in every type that is used here
#endif
  }
  Buffer(Buffer &&other) : data_(std::exchange(other.data_, nullptr)) {}
  Buffer &operator=(Buffer &&other) {
    std::swap(data_, other.data_);
    return *this;
  }
  ~Buffer() { free(data_); }
  T *at(int64_t i) { return data_ + i; }

 private:
  T *data_;
};

}  // namespace
