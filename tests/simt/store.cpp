// The write kernel on a CPU: the sources of csrc with tests/simt/instructions.cuh and empty CUDA headers.
#include "simt.h"

namespace tq {
alignas(16) uint4 table[64 << 6];  // the kernel's dynamic shared memory
inline uint32_t load_shared(uint32_t address) { return *reinterpret_cast<const uint32_t*>(reinterpret_cast<char*>(table) + address); }
}  // namespace tq
inline uint64_t __cvta_generic_to_shared(const void* at) {
  return static_cast<const char*>(at) - reinterpret_cast<const char*>(tq::table);
}

#include "store_kv.cuh"

template <int D, bool WIDE> void run(const tq::StoreParams& params, int ctas) {
  for (unsigned role = 0; role < 2; role++)
    simt::launch(ctas, tq::STORE_THREADS / 32, [&] { tq::store_kv_kernel<D, WIDE>(params); }, role);
}

extern "C" int simt_store_params_bytes() { return sizeof(tq::StoreParams); }

extern "C" void simt_store_kv(const tq::StoreParams* params, int ctas, int wide) {
#define TQ_CASE(D) \
  if (params->head_dim == D) wide && tq::VectorShape<D, true>::LANES > tq::VectorShape<D, false>::LANES \
      ? run<D, tq::VectorShape<D, true>::BASE == 1>(*params, ctas) : run<D, false>(*params, ctas);
  TQ_CASE(64) TQ_CASE(80) TQ_CASE(96) TQ_CASE(112) TQ_CASE(128) TQ_CASE(192) TQ_CASE(256)
}
