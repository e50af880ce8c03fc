// AMX tiles in plain C++, for CPUs without them: put before amx.cpp by the compiler's -include.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace emulated {

struct Tile {  // 16 rows of 64 bytes
  float at[16][16];
};

thread_local Tile tiles[8];
thread_local bool configured = false;

inline Tile &tile(int i) {
  if (!configured) __builtin_trap();  // as the CPU would
  return tiles[i];
}

inline void zero(int i) { tile(i) = {}; }

inline void load(int i, const void *from, int64_t stride) {
  for (int r = 0; r < 16; r++) memcpy(tile(i).at[r], (const char *)from + r * stride, 64);
}

inline void keep(int i, void *to, int64_t stride) {
  for (int r = 0; r < 16; r++) memcpy((char *)to + r * stride, tile(i).at[r], 64);
}

// c_mn += sum_k a_mk b_kn, k < 32: row m of a has 32 numbers, row k / 2 of b has pairs of them.
inline void multiply(int c, int a, int b) {
  const auto half = [](float pair, bool high) {
    uint32_t bits;
    memcpy(&bits, &pair, 4);
    bits = high ? bits & 0xffff0000u : bits << 16;
    float number;
    memcpy(&number, &bits, 4);
    return number;
  };
  for (int m = 0; m < 16; m++) {
    for (int n = 0; n < 16; n++) {
      float sum = tile(c).at[m][n];
      for (int k = 0; k < 32; k++) {
        sum += half(tile(a).at[m][k / 2], k % 2) * half(tile(b).at[k / 2][n], k % 2);
      }
      tile(c).at[m][n] = sum;
    }
  }
}

}  // namespace emulated

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_zero(i) emulated::zero(i)
#define _tile_loadd(i, from, stride) emulated::load(i, from, stride)
#define _tile_stored(i, to, stride) emulated::keep(i, to, stride)
#define _tile_dpbf16ps(c, a, b) emulated::multiply(c, a, b)
#define _tile_loadconfig(from) (void)(from), emulated::configured = true
#define _tile_release() emulated::configured = false
#define syscall(...) 0
