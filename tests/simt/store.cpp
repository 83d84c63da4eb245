// The write kernel on a CPU: the sources of csrc with tests/simt/instructions.cuh and empty CUDA headers.
#include "simt.h"

namespace tq {
alignas(128) uint4 table[64 << 6];  // the kernel's dynamic shared memory
inline uint32_t load_shared(uint32_t address) { return *reinterpret_cast<const uint32_t*>(reinterpret_cast<char*>(table) + address); }
}  // namespace tq
inline uint64_t __cvta_generic_to_shared(const void* at) {
  return static_cast<const char*>(at) - reinterpret_cast<const char*>(tq::table);
}

#include "store_kv.cuh"

template <int D, tq::Spread SPREAD, bool SKETCH = false> void run(const tq::StoreParams& params, int ctas) {
  for (unsigned role = 0; role < 2; role++)
    simt::launch(ctas, tq::STORE_THREADS / 32, [&] { tq::store_kv_kernel<D, SPREAD, SKETCH>(params); }, role);
}

// As launch_store_kv (csrc/store_kv_instance.cu) chooses, but for `wide`.
template <int D> void choose(const tq::StoreParams& params, int ctas, bool wide) {
  using namespace tq;
  constexpr bool HAS_WIDE = VectorShape<D, WIDE>::LANES > VectorShape<D, NARROW>::LANES;
  if (params.role[0].bits > TRELLIS) {
    if constexpr (D == 64 || D == 128 || D == 256) run<D, BLOCKS>(params, ctas);
  } else if (params.role[0].sketch_gain > 0) {
    run<D, NARROW, true>(params, ctas);
  } else if (wide && HAS_WIDE) {
    run<D, HAS_WIDE ? WIDE : NARROW>(params, ctas);
  } else {
    run<D, NARROW>(params, ctas);
  }
}

extern "C" int simt_store_params_bytes() { return sizeof(tq::StoreParams); }

extern "C" void simt_store_kv(const tq::StoreParams* params, int ctas, int wide) {
#define TQ_CASE(D) if (params->head_dim == D) choose<D>(*params, ctas, wide);
  TQ_CASE(64) TQ_CASE(80) TQ_CASE(96) TQ_CASE(112) TQ_CASE(128) TQ_CASE(192) TQ_CASE(256)
}
