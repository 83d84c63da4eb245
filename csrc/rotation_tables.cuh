// Written by csrc/generate_tables.py from tq_vllm/core; do not edit.
#pragma once

#include <cstdint>

namespace tq {

// Random signs of the rotation, KEY = head_dim: bit c % 32 of word c / 32 set = coordinate c is negated.
template <int KEY> struct SignTable;
template <> struct SignTable<64> {
  static constexpr int COUNT = 2;
  __host__ __device__ static constexpr uint32_t at(int i) {
    constexpr uint32_t table[] = {0x737afa89u, 0x9ecc3104u};
    return i < COUNT ? table[i] : 0;
  }
};
template <> struct SignTable<80> {
  static constexpr int COUNT = 3;
  __host__ __device__ static constexpr uint32_t at(int i) {
    constexpr uint32_t table[] = {0x737afa89u, 0x9ecc3104u, 0x00006ee8u};
    return i < COUNT ? table[i] : 0;
  }
};
template <> struct SignTable<96> {
  static constexpr int COUNT = 3;
  __host__ __device__ static constexpr uint32_t at(int i) {
    constexpr uint32_t table[] = {0x737afa89u, 0x9ecc3104u, 0x1ac16ee8u};
    return i < COUNT ? table[i] : 0;
  }
};
template <> struct SignTable<112> {
  static constexpr int COUNT = 4;
  __host__ __device__ static constexpr uint32_t at(int i) {
    constexpr uint32_t table[] = {0x737afa89u, 0x9ecc3104u, 0x1ac16ee8u, 0x000005b6u};
    return i < COUNT ? table[i] : 0;
  }
};
template <> struct SignTable<128> {
  static constexpr int COUNT = 4;
  __host__ __device__ static constexpr uint32_t at(int i) {
    constexpr uint32_t table[] = {0x737afa89u, 0x9ecc3104u, 0x1ac16ee8u, 0x365e05b6u};
    return i < COUNT ? table[i] : 0;
  }
};
template <> struct SignTable<192> {
  static constexpr int COUNT = 6;
  __host__ __device__ static constexpr uint32_t at(int i) {
    constexpr uint32_t table[] = {0x737afa89u, 0x9ecc3104u, 0x1ac16ee8u, 0x365e05b6u, 0xbe83866bu, 0x0b672b6eu};
    return i < COUNT ? table[i] : 0;
  }
};
template <> struct SignTable<256> {
  static constexpr int COUNT = 8;
  __host__ __device__ static constexpr uint32_t at(int i) {
    constexpr uint32_t table[] = {0x737afa89u, 0x9ecc3104u, 0x1ac16ee8u, 0x365e05b6u, 0xbe83866bu, 0x0b672b6eu, 0x53b8f652u, 0x3c995686u};
    return i < COUNT ? table[i] : 0;
  }
};

// The same of the second rotation, that of key sketches.
template <int KEY> struct SketchSignTable;
template <> struct SketchSignTable<64> {
  static constexpr int COUNT = 2;
  __host__ __device__ static constexpr uint32_t at(int i) {
    constexpr uint32_t table[] = {0xec0f2ae7u, 0xdd233bf8u};
    return i < COUNT ? table[i] : 0;
  }
};
template <> struct SketchSignTable<80> {
  static constexpr int COUNT = 3;
  __host__ __device__ static constexpr uint32_t at(int i) {
    constexpr uint32_t table[] = {0xec0f2ae7u, 0xdd233bf8u, 0x00007791u};
    return i < COUNT ? table[i] : 0;
  }
};
template <> struct SketchSignTable<96> {
  static constexpr int COUNT = 3;
  __host__ __device__ static constexpr uint32_t at(int i) {
    constexpr uint32_t table[] = {0xec0f2ae7u, 0xdd233bf8u, 0x66797791u};
    return i < COUNT ? table[i] : 0;
  }
};
template <> struct SketchSignTable<112> {
  static constexpr int COUNT = 4;
  __host__ __device__ static constexpr uint32_t at(int i) {
    constexpr uint32_t table[] = {0xec0f2ae7u, 0xdd233bf8u, 0x66797791u, 0x00003673u};
    return i < COUNT ? table[i] : 0;
  }
};
template <> struct SketchSignTable<128> {
  static constexpr int COUNT = 4;
  __host__ __device__ static constexpr uint32_t at(int i) {
    constexpr uint32_t table[] = {0xec0f2ae7u, 0xdd233bf8u, 0x66797791u, 0x07933673u};
    return i < COUNT ? table[i] : 0;
  }
};
template <> struct SketchSignTable<192> {
  static constexpr int COUNT = 6;
  __host__ __device__ static constexpr uint32_t at(int i) {
    constexpr uint32_t table[] = {0xec0f2ae7u, 0xdd233bf8u, 0x66797791u, 0x07933673u, 0x929df118u, 0x8d0c204cu};
    return i < COUNT ? table[i] : 0;
  }
};
template <> struct SketchSignTable<256> {
  static constexpr int COUNT = 8;
  __host__ __device__ static constexpr uint32_t at(int i) {
    constexpr uint32_t table[] = {0xec0f2ae7u, 0xdd233bf8u, 0x66797791u, 0x07933673u, 0x929df118u, 0x8d0c204cu, 0xcad84809u, 0x4cce8161u};
    return i < COUNT ? table[i] : 0;
  }
};

// Base Hadamard matrix, KEY = order: bit c of word r set = entry (r, c) is -1.
template <int KEY> struct BaseTable;
template <> struct BaseTable<12> {
  static constexpr int COUNT = 12;
  __host__ __device__ static constexpr uint32_t at(int i) {
    constexpr uint32_t table[] = {0x00000000u, 0x00000475u, 0x000008e9u, 0x000001d3u, 0x000003a5u, 0x00000749u, 0x00000e91u, 0x00000d23u, 0x00000a47u, 0x0000048fu, 0x0000091du, 0x0000023bu};
    return i < COUNT ? table[i] : 0;
  }
};
template <> struct BaseTable<20> {
  static constexpr int COUNT = 20;
  __host__ __device__ static constexpr uint32_t at(int i) {
    constexpr uint32_t table[] = {0x00000000u, 0x000615e5u, 0x000c2bc9u, 0x00085793u, 0x0000af27u, 0x00015e4du, 0x0002bc99u, 0x00057931u, 0x000af261u, 0x0005e4c3u, 0x000bc985u, 0x0007930bu, 0x000f2615u, 0x000e4c2bu, 0x000c9857u, 0x000930afu, 0x0002615fu, 0x0004c2bdu, 0x00098579u, 0x00030af3u};
    return i < COUNT ? table[i] : 0;
  }
};
template <> struct BaseTable<28> {
  static constexpr int COUNT = 28;
  __host__ __device__ static constexpr uint32_t at(int i) {
    constexpr uint32_t table[] = {0x00000002u, 0x0aaaaaabu, 0x030ff0c8u, 0x09a55a6eu, 0x0c3fc320u, 0x069569bau, 0x00ff0c8cu, 0x0a55a6e6u, 0x03fc3230u, 0x09569b9au, 0x0ff0c8c0u, 0x055a6e6au, 0x0fc3230cu, 0x0569b9a6u, 0x0f0c8c3cu, 0x05a6e696u, 0x0c3230fcu, 0x069b9a56u, 0x00c8c3fcu, 0x0a6e6956u, 0x03230ff0u, 0x09b9a55au, 0x0c8c3fc0u, 0x06e6956au, 0x0230ff0cu, 0x0b9a55a6u, 0x08c3fc30u, 0x0e69569au};
    return i < COUNT ? table[i] : 0;
  }
};

}  // namespace tq
