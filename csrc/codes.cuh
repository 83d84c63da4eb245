// Codes of a tile record as operands of int8 MMAs.
//
// A code's centroid is unit * (b + 1/2) with a signed byte b (widths 2 to 5: a magnitude from a table of bytes, inverted
// for negative codes) or the byte itself (width 8). So eight codes become two registers of four bytes each with prmt
// and xor, and the halves are one sum, added where the product is scaled.
#pragma once
#include <cstdint>
#include <type_traits>

#include "codebook.cuh"
#include "layout.cuh"
#include "instructions.cuh"

namespace tq {

// 0xff in every byte of x whose top bit is set, 0 elsewhere.
__device__ __forceinline__ uint32_t spread_top_bits(uint32_t x) { return prmt(x, 0, 0xBA98); }

__host__ __device__ constexpr uint32_t bytes(int a, int b, int c, int d) {
  return uint32_t(a) | uint32_t(b) << 8 | uint32_t(c) << 16 | uint32_t(d) << 24;
}

template <int BITS> constexpr bool HAS_HALF = BITS != 8;

// Width 1 is the signs of a key sketch: +1 and -1 are 2 * (b + 1/2) with b = 0 and -1.
constexpr int SIGNS = 1;

// What a centroid is in units of: b + 1/2, or b.
template <int BITS> __host__ __device__ constexpr float centroid_unit() {
  if constexpr (BITS == SIGNS)
    return 2.0f;
  else if constexpr (HAS_HALF<BITS>)
    return 2 * Unit<BITS>::VALUE;
  else
    return 1.0f;
}

// Four levels of a width from index `first`, `step` apart.
template <int BITS> __host__ __device__ constexpr uint32_t levels(int first, int step = 1) {
  using T = LevelTable<BITS>;
  return bytes(T::at(first), T::at(first + step), T::at(first + 2 * step), T::at(first + 3 * step));
}

// Four levels of a trellis codebook, in rising order from index `first` on; negative ones are inverted magnitudes.
template <int BITS> __host__ __device__ constexpr uint32_t rising_levels(int first) {
  using T = LevelTable<BITS>;
  constexpr int N = T::COUNT;
  return first < N ? bytes(255 - T::at(N - 1 - first), 255 - T::at(N - 2 - first), 255 - T::at(N - 3 - first),
                           255 - T::at(N - 4 - first))
                   : levels<BITS>(first - N);
}

// Bytes of the eight codes of a coordinate group: coordinates 0..3 in `low`, 4..7 in `high`.
//   a   width 8: the first word; 4 and 5: the plane-4 word; 2 and 3: the plane-2 word, shifted so that the group's
//       fields are the low two bits of the nibbles; trellis codes: what `trellis_groups` gives
//   b   width 8: the second word; 1, 3 and 5: the plane-1 word, shifted so that bit 7 of byte k is coordinate 4 + k and
//       bit 6 coordinate k
template <int BITS>
__device__ __forceinline__ void expand(uint32_t a, uint32_t b, uint32_t& low, uint32_t& high) {
  if constexpr (BITS == 8) {
    low = a;
    high = b;
  } else if constexpr (BITS == SIGNS) {
    low = spread_top_bits(b << 1);
    high = spread_top_bits(b);
  } else if constexpr (BITS == 4) {
    constexpr uint32_t t0 = levels<4>(0), t1 = levels<4>(4);
    const uint32_t index = a & 0x77777777u;
    low = prmt(t0, t1, index) ^ spread_top_bits(a);
    high = prmt(t0, t1, index >> 16) ^ spread_top_bits(a << 4);
  } else if constexpr (BITS == 5) {
    constexpr uint32_t t0 = levels<5>(0, 2), t1 = levels<5>(8, 2);
    constexpr uint32_t x0 = t0 ^ levels<5>(1, 2), x1 = t1 ^ levels<5>(9, 2);
    const uint32_t index = a & 0x77777777u;
    low = prmt(t0, t1, index) ^ (prmt(x0, x1, index) & spread_top_bits(b << 1)) ^ spread_top_bits(a);
    high = prmt(t0, t1, index >> 16) ^ (prmt(x0, x1, index >> 16) & spread_top_bits(b)) ^ spread_top_bits(a << 4);
  } else if constexpr (BITS == 3) {
    constexpr uint32_t t = levels<3>(0);
    const uint32_t index = a & 0x33333333u;
    low = prmt(t, t, index) ^ spread_top_bits(b << 1);
    high = prmt(t, t, index >> 16) ^ spread_top_bits(b);
  } else if constexpr (BITS == TRELLIS + 3) {
    constexpr uint32_t t0 = rising_levels<BITS>(0), t1 = rising_levels<BITS>(4);
    constexpr uint32_t x0 = t0 ^ rising_levels<BITS>(8), x1 = t1 ^ rising_levels<BITS>(12);
    const uint32_t index = a & 0x77777777u;
    low = prmt(t0, t1, index) ^ (prmt(x0, x1, index) & spread_top_bits(a));
    high = prmt(t0, t1, index >> 16) ^ (prmt(x0, x1, index >> 16) & spread_top_bits(a << 4));
  } else if constexpr (BITS == TRELLIS + 2) {
    constexpr uint32_t t0 = rising_levels<BITS>(0), t1 = rising_levels<BITS>(4);
    low = prmt(t0, t1, a);
    high = prmt(t0, t1, a >> 16);
  } else {
    constexpr int m0 = LevelTable<2>::at(0), m1 = LevelTable<2>::at(1);
    constexpr uint32_t t = bytes(m0, m1, 255 - m0, 255 - m1);
    const uint32_t index = a & 0x33333333u;
    low = prmt(t, t, index);
    high = prmt(t, t, index >> 16);
  }
}

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Words a vector takes in the planes of a width.
template <int BITS, int D> struct Planes {
  static constexpr int first = words_per_token(plane_bits(BITS, 0), D);
  static constexpr int second = num_planes(BITS) == 2 ? words_per_token(1, D) : 0;
};
template <int D> struct Planes<SIGNS, D> {
  static constexpr int first = 0, second = words_per_token(1, D);
};

__device__ __forceinline__ uint32_t rotate_left(uint32_t x, int n) { return x << n | x >> (32 - n); }

// Groups j = half and j = half + 2 of a trellis block as nibbles that count levels, the fourth bits standing as the signs of
// plane 4. `uncoded`: the block's word of plane 1 (2 bits), or its word `half` of plane 2 (3 bits).
template <int BITS>
__device__ __forceinline__ void trellis_groups(uint32_t coded, uint32_t uncoded, int half, uint32_t& first, uint32_t& second) {
  const uint32_t c0 = rotate_left(coded, 2), c1 = coded ^ rotate_left(coded, 1) ^ rotate_left(coded, 3);
  const uint32_t subsets = (c0 >> half & 0x55555555u) | (c1 >> half << 1 & 0xaaaaaaaau);
  const uint32_t below = BITS == TRELLIS + 3 ? uncoded << 2 : rotate_left(uncoded, 2 - half);
  const uint32_t above = BITS == TRELLIS + 3 ? uncoded : uncoded >> half;
  constexpr uint32_t upper = BITS == TRELLIS + 3 ? 0xccccccccu : 0x44444444u;
  first = (subsets & 0x33333333u) | (below & upper);
  second = (subsets >> 2 & 0x33333333u) | (above & upper);
}

// Keys: operand A of m16n8k32, rows = tokens. In k-step s lane q = lane % 4 holds the coordinate group
// group_of(q, s): any order will do as long as the query uses the same, and this one makes the loads wide.
template <int BITS, int D> struct KeyCodes {
  using P = Planes<BITS, D>;
  static constexpr int GROUPS = D / 8, STEPS = ceil_div(D, 32);
  static constexpr bool WHOLE = D % 32 == 0;
  static constexpr int CHUNK = WHOLE && STEPS % 4 == 0 && BITS != 8 ? 4 : WHOLE && STEPS % 2 == 0 ? 2 : 1;  // k-steps of a load

  static __device__ __forceinline__ int group_of(int q, int step) {
    return step / CHUNK * 4 * CHUNK + q * CHUNK + step % CHUNK;
  }
  static __device__ __forceinline__ int lane_of(int group) { return group % (4 * CHUNK) / CHUNK; }  // the q of group_of
  static __device__ __forceinline__ int step_of(int group) { return group / (4 * CHUNK) * CHUNK + group % CHUNK; }

  uint32_t a[BITS == 8 ? 2 * CHUNK : CHUNK], b[CHUNK];

  // Load CHUNK k-steps of `token` from the key section of a tile record.
  __device__ __forceinline__ void load(const uint8_t* section, int token, int chunk, int q) {
    const uint32_t* row = reinterpret_cast<const uint32_t*>(section) + token * P::first;
    if constexpr (BITS == SIGNS) {
    } else if constexpr (BITS == 8) {
      if constexpr (CHUNK == 2) {
        const uint4 w = *reinterpret_cast<const uint4*>(row + chunk * 16 + q * 4);
        a[0] = w.x, a[1] = w.y, a[2] = w.z, a[3] = w.w;
      } else {
        const uint2 w = *reinterpret_cast<const uint2*>(row + 2 * min(chunk * 4 + q, GROUPS - 1));
        a[0] = w.x, a[1] = w.y;
      }
    } else if constexpr (BITS >= 4) {
      if constexpr (CHUNK == 4) {
        const uint4 w = *reinterpret_cast<const uint4*>(row + chunk * 16 + q * 4);
        a[0] = w.x, a[1] = w.y, a[2] = w.z, a[3] = w.w;
      } else if constexpr (CHUNK == 2) {
        const uint2 w = *reinterpret_cast<const uint2*>(row + chunk * 8 + q * 2);
        a[0] = w.x, a[1] = w.y;
      } else {
        a[0] = row[min(chunk * 4 + q, GROUPS - 1)];
      }
    } else {
      if constexpr (CHUNK == 4) {
        const uint2 w = *reinterpret_cast<const uint2*>(row + chunk * 8 + q * 2);
        a[0] = w.x, a[1] = w.x >> 2, a[2] = w.y, a[3] = w.y >> 2;
      } else if constexpr (CHUNK == 2) {
        a[0] = row[chunk * 4 + q], a[1] = a[0] >> 2;
      } else {
        a[0] = row[min(chunk * 2 + (q >> 1), P::first - 1)] >> 2 * (q & 1);
      }
    }
    if constexpr (P::second > 0) {
      const uint32_t* bits = reinterpret_cast<const uint32_t*>(section) + 16 * P::first + token * P::second;
      if constexpr (CHUNK == 4) {
        const uint32_t w = bits[chunk * 4 + q];
        b[0] = w << 6, b[1] = w << 4, b[2] = w << 2, b[3] = w;
      } else if constexpr (CHUNK == 2) {
        const uint32_t w = bits[chunk * 2 + (q >> 1)] >> 4 * (q & 1);
        b[0] = w << 6, b[1] = w << 4;
      } else {
        b[0] = bits[min(chunk, P::second - 1)] << 6 - 2 * q;
      }
    }
  }

  __device__ __forceinline__ void get(int i, uint32_t& low, uint32_t& high) const {
    if constexpr (BITS == 8)
      expand<8>(a[2 * i], a[2 * i + 1], low, high);
    else
      expand<BITS>(a[i], b[i], low, high);
  }
};

// Values: operand A of m16n8k32, rows = coordinate groups; lane (g, q) holds group min(8 * m_tile + g, groups - 1) of
// tokens 2q, 2q+1, 2q+8, 2q+9 in words 0..3.
template <int BITS, int D> struct ValueCodes {
  using P = Planes<BITS, D>;
  static constexpr int GROUPS = D / 8, M_TILES = ceil_div(D, 64);
  uint32_t a[4], b[4];

  static __device__ __forceinline__ void words(uint32_t (&x)[4], const uint8_t* section, int word, int q) {
    const uint4 w = *reinterpret_cast<const uint4*>(section + word * 64 + q * 16);
    x[0] = w.x, x[1] = w.y, x[2] = w.z, x[3] = w.w;
  }

  __device__ __forceinline__ void load(const uint8_t* section, int m_tile, int g, int q) {
    int group = 8 * m_tile + g;
    if (GROUPS % 8) group = min(group, GROUPS - 1);
    if constexpr (BITS == 8) {
      words(a, section, 2 * group, q);
      words(b, section, 2 * group + 1, q);
    } else if constexpr (BITS == 4) {
      words(a, section, group, q);
    } else {
      words(a, section, group >> 1, q);
      const int shift = 2 * (group & 1);
#pragma unroll
      for (int i = 0; i < 4; i++) a[i] >>= shift;
    }
    if constexpr (P::second > 0) {
      words(b, section + 64 * P::first, group >> 2, q);
      const int shift = 6 - 2 * (group & 3);
#pragma unroll
      for (int i = 0; i < 4; i++) b[i] <<= shift;
    }
  }

  __device__ __forceinline__ void get(int i, uint32_t& low, uint32_t& high) const { expand<BITS>(a[i], b[i], low, high); }
};

// Keys in trellis codes, as KeyCodes; a lane takes whole blocks or, at head size 64, groups j = h and h + 2 of one.
template <int BITS, int D> struct TrellisKeyCodes {
  using P = Planes<BITS, D>;
  static constexpr int BLOCKS = D / 32, STEPS = D / 32, CHUNK = D == 64 ? 2 : 4;

  static __device__ __forceinline__ int group_of(int q, int step) {
    return D == 64 ? (q & 1) + BLOCKS * ((q >> 1) + 2 * step) : step / 4 * 4 + q + BLOCKS * (step % 4);
  }
  static __device__ __forceinline__ int lane_of(int group) { return group % 4; }
  static __device__ __forceinline__ int step_of(int group) {
    return D == 64 ? group / 4 : group % BLOCKS / 4 * 4 + group / BLOCKS;
  }

  uint32_t nibbles[CHUNK];

  __device__ __forceinline__ void load(const uint8_t* section, int token, int chunk, int q) {
    const uint32_t* row = reinterpret_cast<const uint32_t*>(section) + token * P::first;
    const int block = D == 64 ? q & 1 : chunk * 4 + q;
    const uint32_t coded = reinterpret_cast<const uint32_t*>(section)[16 * P::first + token * P::second + block];
    if constexpr (D == 64) {
      const uint32_t uncoded = BITS == TRELLIS + 3 ? row[2 * block + (q >> 1)] : row[block];
      trellis_groups<BITS>(coded, uncoded, q >> 1, nibbles[0], nibbles[1]);
    } else {
      uint2 uncoded;
      if constexpr (BITS == TRELLIS + 3)
        uncoded = *reinterpret_cast<const uint2*>(row + 2 * block);
      else
        uncoded.x = uncoded.y = row[block];
      trellis_groups<BITS>(coded, uncoded.x, 0, nibbles[0], nibbles[2]);
      trellis_groups<BITS>(coded, uncoded.y, 1, nibbles[1], nibbles[3]);
    }
  }

  __device__ __forceinline__ void get(int i, uint32_t& low, uint32_t& high) const { expand<BITS>(nibbles[i], 0, low, high); }
};

// Values in trellis codes, as ValueCodes. What the groups of a lane's block have in common is computed once for all m_tile.
template <int BITS, int D> struct TrellisValueCodes {
  using P = Planes<BITS, D>;
  static constexpr int BLOCKS = D / 32;
  uint32_t nibbles[4];

  __device__ __forceinline__ void load(const uint8_t* section, int m_tile, int g, int q) {
    const int block = g % BLOCKS, j = g / BLOCKS + 8 / BLOCKS * m_tile, half = D == 256 ? m_tile % 2 : D == 128 ? g >> 2 : j & 1;
    uint32_t coded[4], uncoded[4];
    ValueCodes<BITS, D>::words(coded, section + 64 * P::first, block, q);
    ValueCodes<BITS, D>::words(uncoded, section, BITS == TRELLIS + 3 ? 2 * block + half : block, q);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      uint32_t first, second;
      trellis_groups<BITS>(coded[i], uncoded[i], half, first, second);
      nibbles[i] = (D == 128 ? m_tile : j >> 1) ? second : first;
    }
  }

  __device__ __forceinline__ void get(int i, uint32_t& low, uint32_t& high) const { expand<BITS>(nibbles[i], 0, low, high); }
};

template <int BITS, int D> using KeysOf = std::conditional_t<(BITS > TRELLIS), TrellisKeyCodes<BITS, D>, KeyCodes<BITS, D>>;
template <int BITS, int D> using ValuesOf = std::conditional_t<(BITS > TRELLIS), TrellisValueCodes<BITS, D>, ValueCodes<BITS, D>>;

}  // namespace tq
