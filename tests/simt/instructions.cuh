// csrc/instructions.cuh for a CPU.
#pragma once
#include "simt.h"

namespace tq {

constexpr int MAGIC_BITS = 0x4B400000;
constexpr float MAGIC = 12582912.0f;

inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = uint64_t(b) << 32 | a;
  uint32_t d = 0;
  for (int i = 0; i < 4; i++) {
    const int pick = selector >> 4 * i & 15;
    const uint32_t byte = both >> 8 * (pick & 7) & 255;
    d |= (pick & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
  }
  return d;
}

struct Operands {
  uint32_t a[4], b[2];
};

// PTX ISA, "Matrix fragments for mma.m16n8k32" with .s8.
inline void mma_s8(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  const int g = simt::current->lane >> 2, q = simt::current->lane & 3;
  simt::exchange(Operands{{a0, a1, a2, a3}, {b0, b1}}, [&](auto at) {
    for (int i = 0; i < 4; i++) {
      const int row = g + i / 2 * 8, column = 2 * q + i % 2;
      for (int k = 0; k < 32; k++) {
        const int a = int8_t(at(row % 8 * 4 + k % 16 / 4).a[k / 16 * 2 + row / 8] >> 8 * (k % 4));
        const int b = int8_t(at(column * 4 + k % 16 / 4).b[k / 16] >> 8 * (k % 4));
        d[i] += a * b;
      }
    }
    return 0;
  });
}

inline void mma_s8_first(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  for (int& x : d) x = MAGIC_BITS;
  mma_s8(d, a0, a1, a2, a3, b0, b1);
}

// PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type".
inline void mma_16bit(float (&d)[4], bool bfloat16, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                      uint32_t b1) {
  const int g = simt::current->lane >> 2, q = simt::current->lane & 3;
  simt::exchange(Operands{{a0, a1, a2, a3}, {b0, b1}}, [&](auto at) {
    auto number = [&](uint32_t pair, int k) {
      const uint16_t bits = pair >> 16 * (k % 2);
      return bfloat16 ? __uint_as_float(uint32_t(bits) << 16) : float(simt_bits<_Float16>(bits));
    };
    for (int i = 0; i < 4; i++) {
      const int row = g + i / 2 * 8, column = 2 * q + i % 2;
      for (int k = 0; k < 16; k++)
        d[i] += number(at(row % 8 * 4 + k % 8 / 2).a[k / 8 * 2 + row / 8], k) * number(at(column * 4 + k % 8 / 2).b[k / 8], k);
    }
    return 0;
  });
}

inline uint32_t half_bytes(uint32_t x) {
  uint32_t y = 0;
  for (int i = 0; i < 2; i++)
    y |= uint32_t(simt_bits<uint16_t>(_Float16(simt_bits<_Float16>(uint16_t(x >> 16 * i)) - _Float16(1152)))) << 16 * i;
  return y;
}

// PTX ISA, movmatrix .trans: lane (g, q) has elements (g, 2q) and (g, 2q + 1).
inline uint32_t transpose_8x8(uint32_t x) {
  const int g = simt::current->lane >> 2, q = simt::current->lane & 3;
  return simt::exchange(x, [&](auto at) {
    auto element = [&](int row, int column) { return at(row * 4 + column / 2) >> 16 * (column % 2) & 0xffff; };
    return element(2 * q, g) | element(2 * q + 1, g) << 16;
  });
}

inline float exp2_fast(float x) { return std::exp2(x); }
inline float load_fresh(const float* at) { return *at; }
inline float4 load_fresh_4(const float* at) { return {at[0], at[1], at[2], at[3]}; }

inline void prefetch_l2(const void*) {}

inline void wait_for_earlier_kernels() {}
inline void let_next_kernel_start() {}
template <class Arguments> void touch_arguments(const Arguments&) {}

struct Copier {
  static void init(uint64_t*) {}
  static void fence_init() {}
  static void publish() {}
  static void nothing() {}
  template <int BYTES> static void copy(uint8_t* to, const uint8_t* from, bool valid, uint64_t*, int) {
    if (valid) std::memcpy(to, from, BYTES);
  }
  template <int BYTES> static void copy_whole(uint8_t* to, const uint8_t* from, uint64_t*, int lane) {
    if (lane == 0) std::memcpy(to, from, BYTES);
  }
  template <int STAGES> static void wait(uint64_t*, uint32_t) { __syncwarp(); }
};

}  // namespace tq
