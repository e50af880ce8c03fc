// Lists of matrices as pieces of work for several threads.
#pragma once

#include "amx_tiles.h"

namespace {

// Rows of a matrix, or numbers of what is done as rows, that one thread does. It packs the factors
// for itself: lines that another core has just written come slower than memory.
struct Chunk {
  const Matrix *matrix;
  int64_t first, size;
};

// The largest of a list of matrices, for buffers that take any of them.
struct Largest {
  int64_t rank = 0, cols = 0, right = 0;

  Largest(const Matrix *matrices, int64_t count) {
    for (const Matrix *x = matrices; x < matrices + count; x++) {
      rank = std::max(rank, x->rank);
      if (is_flat(*x)) continue;
      cols = std::max(cols, x->cols);
      right = std::max(right, blocks(x->cols, 32) * blocks(x->rank, 64) * 4 * kTile);
    }
  }
};

template <class Pass>
std::vector<Chunk> chunks_of(const Matrix *matrices, int64_t count) {
  std::vector<Chunk> chunks;
  for (const Matrix *x = matrices; x < matrices + count; x++) {
    if (x->rows * x->cols == 0 || !Pass::takes(*x)) continue;
    const int64_t size = is_flat(*x) ? x->rows * x->cols : x->rows;
    const int64_t most = is_flat(*x) ? kFlat : kRows;
    for (int64_t first = 0; first < size; first += most) {
      chunks.push_back({x, first, std::min(most, size - first)});
    }
  }
  return chunks;
}

// Where that begins which a thread does at a time: a matrix, whose factors it then packs once, and
// towards the end a chunk, so that no thread waits long for another.
std::vector<int64_t> turns_of(const std::vector<Chunk> &chunks, int threads) {
  std::vector<int64_t> starts;
  const int64_t count = chunks.size();
  for (int64_t i = 0, end; i < count; i = end) {
    for (end = i + 1; end < count && chunks[end].matrix == chunks[i].matrix;) end++;
    const int64_t some = count - i < 2 * threads * (end - i) ? 1 : end - i;
    for (int64_t at = i; at < end; at += some) starts.push_back(at);
  }
  starts.push_back(count);
  return starts;
}

// Do all chunks, each on one of several threads.
template <class Pass, class Shared>
void run(const std::vector<Chunk> &chunks, int threads, Shared &shared) {
  std::atomic<int64_t> next{0};
  const auto starts = turns_of(chunks, threads);
  const int64_t count = starts.size() - 1;
#pragma omp parallel num_threads(threads)
  {
    configure_tiles();
    Pass pass(shared);
    for (int64_t turn = next++; turn < count; turn = next++) {
      for (int64_t i = starts[turn]; i < starts[turn + 1]; i++) pass.chunk(chunks[i], i);
    }
    _tile_release();
  }
}

}  // namespace
