// The dialect in Metal, most of which is Metal's own.
#define FUNCTION inline
#define SHARED(T, name, count) threadgroup T name[count]
#define SHARED_ARG(T) threadgroup T*
#define PRIVATE_ARG(T) thread T*
#define SHARED_COUNTERS(name, count) threadgroup atomic_uint name[count]
#define COUNTERS_ARG threadgroup atomic_uint*

FUNCTION void barrier() {
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
FUNCTION void device_barrier() {
  threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);
}
FUNCTION void simd_barrier() {
  simdgroup_barrier(mem_flags::mem_threadgroup);
}

FUNCTION void set_counter(COUNTERS_ARG counters, uint place, uint value) {
  atomic_store_explicit(&counters[place], value, memory_order_relaxed);
}
FUNCTION uint get_counter(COUNTERS_ARG counters, uint place) {
  return atomic_load_explicit(&counters[place], memory_order_relaxed);
}
FUNCTION uint add_to_counter(COUNTERS_ARG counters, uint place, uint value) {
  return atomic_fetch_add_explicit(&counters[place], value, memory_order_relaxed);
}

FUNCTION uint bits_of(float value) {
  return as_type<uint>(value);
}
FUNCTION float float_of(uint bits) {
  return as_type<float>(bits);
}
FUNCTION float infinity() {
  return INFINITY;
}
FUNCTION uint ones_in(uint bits) {
  return popcount(bits);
}

// An 8 x 8 matrix that a simdgroup holds together.
template <typename T>
struct Tile {
  simdgroup_matrix<T, 8, 8> values;
};
template <typename T>
FUNCTION void tile_fill(thread Tile<T>& tile, T value) {
  tile.values = simdgroup_matrix<T, 8, 8>(value);
}
template <typename T>
FUNCTION void tile_load(thread Tile<T>& tile, threadgroup T* from, uint stride, uint lane) {
  simdgroup_load(tile.values, from, stride);
}
template <typename T>
FUNCTION void tile_store(thread Tile<T>& tile, threadgroup T* to, uint stride, uint lane) {
  simdgroup_store(tile.values, to, stride);
}
template <typename T>
FUNCTION void tile_multiply_add(
    thread Tile<float>& sum, thread Tile<T>& a, thread Tile<T>& b, uint lane) {
  simdgroup_multiply_accumulate(sum.values, a.values, b.values, sum.values);
}
