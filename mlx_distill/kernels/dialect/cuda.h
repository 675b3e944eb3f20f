// The dialect in CUDA: a simdgroup is a warp, threadgroup memory is shared memory.
#define FUNCTION __device__ __forceinline__
#define SHARED(T, name, count) __shared__ T name[count]
#define SHARED_ARG(T) T*
#define PRIVATE_ARG(T) T*
#define SHARED_COUNTERS(name, count) __shared__ uint name[count]
#define COUNTERS_ARG uint*

typedef unsigned int uint;

#define thread_position_in_threadgroup (make_uint3(threadIdx.x, threadIdx.y, threadIdx.z))
#define threadgroup_position_in_grid (make_uint3(blockIdx.x, blockIdx.y, blockIdx.z))
#define threads_per_threadgroup (make_uint3(blockDim.x, blockDim.y, blockDim.z))
#define threadgroups_per_grid (make_uint3(gridDim.x, gridDim.y, gridDim.z))
#define thread_position_in_grid                \
  (make_uint3(                                 \
      blockIdx.x * blockDim.x + threadIdx.x,   \
      blockIdx.y * blockDim.y + threadIdx.y,   \
      blockIdx.z * blockDim.z + threadIdx.z))
#define thread_index_in_threadgroup \
  (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z))
#define thread_index_in_simdgroup ((thread_index_in_threadgroup) % 32)
#define simdgroup_index_in_threadgroup ((thread_index_in_threadgroup) / 32)
#define simdgroups_per_threadgroup ((blockDim.x * blockDim.y * blockDim.z + 31) / 32)

FUNCTION void barrier() {
  __syncthreads();
}
FUNCTION void device_barrier() {
  __threadfence_block();
  __syncthreads();
}
FUNCTION void simd_barrier() {
  __syncwarp();
}

FUNCTION void set_counter(uint* counters, uint place, uint value) {
  atomicExch(&counters[place], value);
}
FUNCTION uint get_counter(uint* counters, uint place) {
  return atomicAdd(&counters[place], 0);
}
FUNCTION uint add_to_counter(uint* counters, uint place, uint value) {
  return atomicAdd(&counters[place], value);
}

FUNCTION uint bits_of(float value) {
  return __float_as_uint(value);
}
FUNCTION float float_of(uint bits) {
  return __uint_as_float(bits);
}
FUNCTION float infinity() {
  return __uint_as_float(0x7f800000u);
}
FUNCTION uint ones_in(uint bits) {
  return __popc(bits);
}

#define WHOLE_WARP 0xffffffffu
template <typename T>
FUNCTION T simd_shuffle(T value, uint lane) {
  return __shfl_sync(WHOLE_WARP, value, lane);
}
template <typename T>
FUNCTION T simd_broadcast(T value, uint lane) {
  return __shfl_sync(WHOLE_WARP, value, lane);
}
template <typename T>
FUNCTION T simd_shuffle_xor(T value, uint mask) {
  return __shfl_xor_sync(WHOLE_WARP, value, mask);
}
template <typename T>
FUNCTION T simd_shuffle_down(T value, uint delta) {
  return __shfl_down_sync(WHOLE_WARP, value, delta);
}
template <typename T>
FUNCTION T simd_sum(T value) {
  for (uint mask = 16; mask; mask /= 2) {
    value += simd_shuffle_xor(value, mask);
  }
  return value;
}
template <typename T>
FUNCTION T simd_max(T value) {
  for (uint mask = 16; mask; mask /= 2) {
    T other = simd_shuffle_xor(value, mask);
    value = value < other ? other : value;
  }
  return value;
}
template <typename T>
FUNCTION T simd_min(T value) {
  for (uint mask = 16; mask; mask /= 2) {
    T other = simd_shuffle_xor(value, mask);
    value = other < value ? other : value;
  }
  return value;
}
template <typename T>
FUNCTION T simd_prefix_exclusive_sum(T value) {
  T sum = value;
  for (uint delta = 1; delta < 32; delta *= 2) {
    T below = __shfl_up_sync(WHOLE_WARP, sum, delta);
    if (thread_index_in_simdgroup >= delta) {
      sum += below;
    }
  }
  return sum - value;
}
FUNCTION bool simd_any(bool value) {
  return __any_sync(WHOLE_WARP, value);
}
FUNCTION bool simd_all(bool value) {
  return __all_sync(WHOLE_WARP, value);
}

// Lane l holds the two values of row l / 4 in columns 2 (l % 4) and the next. CUDA's own tiles are
// other sizes, so this is plain code, for being compared.
template <typename T>
struct Tile {
  T values[2];
};
template <typename T>
FUNCTION void tile_fill(Tile<T>& tile, T value) {
  tile.values[0] = tile.values[1] = value;
}
template <typename T>
FUNCTION void tile_load(Tile<T>& tile, T* from, uint stride, uint lane) {
  for (uint i = 0; i < 2; i++) {
    tile.values[i] = from[lane / 4 * stride + 2 * (lane % 4) + i];
  }
}
template <typename T>
FUNCTION void tile_store(Tile<T>& tile, T* to, uint stride, uint lane) {
  for (uint i = 0; i < 2; i++) {
    to[lane / 4 * stride + 2 * (lane % 4) + i] = tile.values[i];
  }
}
template <typename T>
FUNCTION void tile_multiply_add(Tile<float>& sum, Tile<T>& a, Tile<T>& b, uint lane) {
  for (uint k = 0; k < 8; k++) {
    float left[2], right[2];
    for (uint i = 0; i < 2; i++) {
      left[i] = simd_shuffle(float(a.values[i]), lane / 4 * 4 + k / 2);
      right[i] = simd_shuffle(float(b.values[i]), 4 * k + lane % 4);
    }
    for (uint i = 0; i < 2; i++) {
      sum.values[i] += left[k % 2] * right[i];
    }
  }
}
