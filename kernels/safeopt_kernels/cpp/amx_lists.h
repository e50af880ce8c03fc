// Lists of matrices as pieces of work for several threads.
#pragma once

#include "amx_tiles.h"

namespace {

// Matrices whose factors are packed together, their work numbered through.
struct Group {
  struct Part {
    const Matrix *matrix;
    int64_t packed, packs, strips, at;  // sizes, number of pieces of work, where its factors lie
  };
  std::vector<Part> parts;
  int64_t packed = 0, packs = 0, strips = 0;

  void add(Part part) {
    part.at = packed;
    packed += part.packed, packs += part.packs, strips += part.strips;
    parts.push_back(part);
  }

  // The part that piece ``i`` of ``count`` belongs to; ``i`` becomes its number there.
  const Part *find(int64_t &i, int64_t Part::*count) const {
    for (const Part &part : parts) {
      if (i < part.*count) return &part;
      i -= part.*count;
    }
    return nullptr;
  }
};

template <class Pass>
std::vector<Group> grouped(const Matrix *matrices, int64_t count) {
  std::vector<Group> groups;
  for (int64_t i = 0; i < count; i++) {
    const Matrix &x = Pass::is_forward ? matrices[i] : matrices[count - 1 - i];
    if (x.rows * x.cols == 0) continue;
    Group::Part part = Pass::part(x);
    part.matrix = &x;
    if (groups.empty() || groups.back().packed + part.packed > kGroup) groups.emplace_back();
    groups.back().add(part);
  }
  return groups;
}

// Do all groups, one after another, on several threads.
template <class Pass, class Shared>
void run(const std::vector<Group> &groups, int threads, Shared &shared) {
  std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads)
  {
    configure_tiles();
    Pass pass(shared);
    for (const Group &group : groups) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < group.packs; i++) {
        int64_t number = i;
        const Group::Part *part = group.find(number, &Group::Part::packs);
        Pass::pack(*part, number, shared.factors);
      }
      for (int64_t i = next++; i < group.strips;) {
        const int64_t then = next++;
        int64_t number = i, following = then;
        const Group::Part *part = group.find(number, &Group::Part::strips);
        const Group::Part *later = group.find(following, &Group::Part::strips);
        if (later != nullptr) Pass::ask_for(*later->matrix, following);
        pass.strip(*part, number, i);
        i = then;
      }
      pass.finish();
#pragma omp barrier
#pragma omp single
      {
        shared.add_up(group);
        next = 0;
      }
    }
    _tile_release();
  }
}

int64_t largest(const std::vector<Group> &groups, int64_t Group::*what) {
  int64_t most = 0;
  for (const Group &group : groups) most = std::max(most, group.*what);
  return most;
}

}  // namespace
