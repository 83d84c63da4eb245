// Launch of the fused write; the kernel of each head size is compiled on its own (store_kv_instance.cu).
#include <cuda_runtime.h>

#include <algorithm>

#include "store_kv.cuh"

namespace tq {

// Returns a cudaError_t. TQ_HEAD_DIMS lists the head sizes of the page.
#define TQ_HEAD_DIMS(X) X(64) X(80) X(96) X(112) X(128) X(192) X(256)
#define TQ_DECLARE(D) int launch_store_kv_##D(const StoreParams& params, int multiprocessors, int shared_bytes, cudaStream_t stream);
TQ_HEAD_DIMS(TQ_DECLARE)

}  // namespace tq

// Enqueues the write of params->num_slots tokens on `stream`. Returns a cudaError_t, 0 for success.
extern "C" int tq_store_kv(const tq::StoreParams* params, cudaStream_t stream) {
  using namespace tq;
  if (params->num_slots == 0) return cudaSuccess;
  int device = 0, multiprocessors = 0, table_rows = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device)) return error;
  for (const StoreRole& role : params->role) table_rows = std::max(table_rows, role.table_rows);
  const int shared_bytes = table_rows * static_cast<int>(TABLE_ROW_BYTES);
  switch (params->head_dim) {
#define TQ_CASE(D) case D: return launch_store_kv_##D(*params, multiprocessors, shared_bytes, stream);
    TQ_HEAD_DIMS(TQ_CASE)
  }
  return cudaErrorInvalidValue;
}
