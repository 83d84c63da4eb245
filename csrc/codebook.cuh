// Written by csrc/generate_tables.py from tq_vllm/core; do not edit.
#pragma once

#include <cstdint>

namespace tq {

// m of each magnitude, KEY = width: magnitude = (2m + 1) * Unit<KEY>::VALUE.
template <int KEY> struct LevelTable;
template <> struct LevelTable<2> {
  static constexpr int COUNT = 2;
  __host__ __device__ static constexpr int at(int i) {
    constexpr int table[] = {35, 118};
    return i < COUNT ? table[i] : 0;
  }
};
template <> struct LevelTable<3> {
  static constexpr int COUNT = 4;
  __host__ __device__ static constexpr int at(int i) {
    constexpr int table[] = {12, 38, 68, 109};
    return i < COUNT ? table[i] : 0;
  }
};
template <> struct LevelTable<4> {
  static constexpr int COUNT = 8;
  __host__ __device__ static constexpr int at(int i) {
    constexpr int table[] = {5, 16, 27, 39, 52, 67, 86, 114};
    return i < COUNT ? table[i] : 0;
  }
};
template <> struct LevelTable<5> {
  static constexpr int COUNT = 16;
  __host__ __device__ static constexpr int at(int i) {
    constexpr int table[] = {2, 7, 12, 17, 22, 27, 33, 39, 45, 52, 59, 67, 76, 87, 101, 122};
    return i < COUNT ? table[i] : 0;
  }
};
template <> struct LevelTable<18> {
  static constexpr int COUNT = 4;
  __host__ __device__ static constexpr int at(int i) {
    constexpr int table[] = {11, 35, 63, 111};
    return i < COUNT ? table[i] : 0;
  }
};
template <> struct LevelTable<19> {
  static constexpr int COUNT = 8;
  __host__ __device__ static constexpr int at(int i) {
    constexpr int table[] = {5, 14, 25, 36, 49, 65, 87, 123};
    return i < COUNT ? table[i] : 0;
  }
};

// Thresholds between magnitudes in units, KEY = bits; on a threshold goes up.
template <int KEY> struct StepTable;
template <> struct StepTable<2> {
  static constexpr int COUNT = 1;
  __host__ __device__ static constexpr int at(int i) {
    constexpr int table[] = {154};
    return i < COUNT ? table[i] : 0;
  }
};
template <> struct StepTable<3> {
  static constexpr int COUNT = 3;
  __host__ __device__ static constexpr int at(int i) {
    constexpr int table[] = {51, 107, 178};
    return i < COUNT ? table[i] : 0;
  }
};
template <> struct StepTable<4> {
  static constexpr int COUNT = 7;
  __host__ __device__ static constexpr int at(int i) {
    constexpr int table[] = {22, 44, 67, 92, 120, 154, 201};
    return i < COUNT ? table[i] : 0;
  }
};
template <> struct StepTable<5> {
  static constexpr int COUNT = 15;
  __host__ __device__ static constexpr int at(int i) {
    constexpr int table[] = {10, 20, 30, 40, 50, 61, 73, 85, 98, 112, 127, 144, 164, 189, 224};
    return i < COUNT ? table[i] : 0;
  }
};

// The unit of a width: 12 significant bits.
template <int BITS> struct Unit;
template <> struct Unit<2> { static constexpr float VALUE = 0x1.a1a0000000000p-8f; };
template <> struct Unit<3> { static constexpr float VALUE = 0x1.41e0000000000p-7f; };
template <> struct Unit<4> { static constexpr float VALUE = 0x1.8760000000000p-7f; };
template <> struct Unit<5> { static constexpr float VALUE = 0x1.b2e0000000000p-7f; };
template <> struct Unit<18> { static constexpr float VALUE = 0x1.11f0000000000p-7f; };
template <> struct Unit<19> { static constexpr float VALUE = 0x1.4680000000000p-7f; };

}  // namespace tq
