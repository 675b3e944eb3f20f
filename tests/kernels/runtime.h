// Executes a kernel's source: the dialect in C++, with every thread of the grid a fibre.
//
// Threads run until they have to wait for others, and go on in random order. Every access to memory
// is checked: bounds, values that nobody wrote, and races, which are two accesses to one place, one
// of them a write, by threads between which no barrier stands. A fault ends the run with a sentence.
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <math.h>
#include <new>

typedef unsigned int uint;
struct uint3 {
  uint x, y, z;
};

#define FUNCTION inline
#define SHARED(T, name, count) Shared<T> name = shared_memory<T>(#name, count)
#define SHARED_ARG(T) Shared<T>
#define PRIVATE_ARG(T) T*
#define SHARED_COUNTERS(name, count) Counters name = shared_memory<uint>(#name, count)
#define COUNTERS_ARG Counters
// Metal's words, for what the dialect leaves as it is.
#define thread
#define device
#define constant const

// ------------------------------------------------------------------------------- half precision

static inline uint bits_of(float value) {
  uint bits;
  memcpy(&bits, &value, 4);
  return bits;
}
static inline float float_of(uint bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
static inline float infinity() {
  return INFINITY;
}
static inline uint ones_in(uint bits) {
  return (uint)__builtin_popcount(bits);
}

struct bfloat16_t {
  uint16_t bits;
  bfloat16_t() = default;
  bfloat16_t(float value) {
    uint x = bits_of(value);
    bits = value != value ? 0x7fc0 : (uint16_t)((x + 0x7fff + (x >> 16 & 1)) >> 16);
  }
  operator float() const {
    return float_of((uint)bits << 16);
  }
};

struct float16_t {
  uint16_t bits;
  float16_t() = default;
  float16_t(float value) {
    uint sign = bits_of(value) >> 16 & 0x8000, x = bits_of(value) & 0x7fffffff;
    if (x > 0x7f800000) {
      bits = (uint16_t)(sign | 0x7e00);
    } else if (x >= 0x477ff000) {  // rounds to infinity
      bits = (uint16_t)(sign | 0x7c00);
    } else if (x < 0x38800000) {  // less than the smallest normal one: multiples of 2^-24
      bits = (uint16_t)(sign | (uint)nearbyintf(float_of(x) * 16777216.0f));
    } else {
      uint rounded = x + 0xfff + (x >> 13 & 1);
      bits = (uint16_t)(sign | ((rounded - 0x38000000) >> 13));
    }
  }
  operator float() const {
    uint sign = (uint)(bits & 0x8000) << 16, x = bits & 0x7fff;
    if (x >= 0x7c00) {
      return float_of(sign | 0x7f800000 | (x & 0x3ff) << 13);
    }
    if (x < 0x400) {
      float value = (float)x / 16777216.0f;
      return sign ? -value : value;
    }
    return float_of(sign | ((x << 13) + 0x38000000));
  }
};
typedef float16_t half;
typedef bfloat16_t bfloat;

// --------------------------------------------------------------------------------------- fibres

#if defined(__x86_64__) && !defined(PLAIN_FIBRES)
struct Stack {
  void* top;
};
extern "C" void switch_stacks(void** from, void* to);
asm(".text\n.p2align 4\nswitch_stacks:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");
static inline void prepare(Stack& stack, char* memory, size_t size, void (*entry)()) {
  void** top = (void**)(((uintptr_t)memory + size) & ~(uintptr_t)15);
  *--top = nullptr;  // the entry never returns; the stack is aligned as after a call
  *--top = (void*)entry;
  top -= 6;
  memset(top, 0, 48);
  stack.top = top;
}
static inline void go(Stack& from, Stack& to) {
  switch_stacks(&from.top, to.top);
}
#else
#include <ucontext.h>
struct Stack {
  ucontext_t context;
};
static inline void prepare(Stack& stack, char* memory, size_t size, void (*entry)()) {
  getcontext(&stack.context);
  stack.context.uc_stack.ss_sp = memory;
  stack.context.uc_stack.ss_size = size;
  stack.context.uc_link = nullptr;
  makecontext(&stack.context, entry, 0);
}
static inline void go(Stack& from, Stack& to) {
  swapcontext(&from.context, &to.context);
}
#endif

const uint MOST_THREADS = 1024, LANES = 32, STACK_BYTES = 1 << 16, SHARED_BYTES = 32768;
const uint NOBODY = 0xffffffff, MANY = 0xfffffffe, OUTSIDE = 0xfffffffd;

struct Simdgroup {
  uint size, arrived, op, parity, epoch;
  uint64_t slots[2][LANES], result[2];
  bool valid[2][LANES];
};
enum Waits { RUNS, AT_BARRIER, AT_SIMD, DONE };
struct Thread {
  Stack stack;
  uint index, lane, simdgroup;
  Waits waits;
};

// One run of a grid. The threadgroups run one after the other, in random order.
static struct Machine {
  Stack outside;
  Thread threads[MOST_THREADS];
  Simdgroup simdgroups[MOST_THREADS / LANES];
  Thread* current;
  uint size, done, at_barrier, barrier_op;
  uint epoch, device_epoch, group;
  Thread* runnable[MOST_THREADS];
  uint num_runnable;
  uint64_t random;
  bool failed;
  char message[512];
  uint3 group_position, grid, whole_group, group_size;  // the size as it was cut
  char* stacks;
} machine;

static inline uint random_below(uint count) {
  machine.random ^= machine.random << 13;
  machine.random ^= machine.random >> 7;
  machine.random ^= machine.random << 17;
  return (uint)(((machine.random >> 32) * count) >> 32);
}

static void fault(const char* format, ...) __attribute__((noreturn, cold, format(printf, 1, 2)));
static void fault(const char* format, ...) {
  machine.failed = true;
  va_list args;
  va_start(args, format);
  int length = vsnprintf(machine.message, sizeof machine.message, format, args);
  va_end(args);
  if (machine.current && length > 0 && (size_t)length < sizeof machine.message) {
    uint3 at = machine.group_position;
    snprintf(machine.message + length, sizeof machine.message - length,
        " (thread %u of group %u,%u,%u)", machine.current->index, at.x, at.y, at.z);
  }
  Stack abandoned;
  go(abandoned, machine.outside);
  __builtin_unreachable();
}

static inline void make_runnable(Thread* other) {
  other->waits = RUNS;
  machine.runnable[machine.num_runnable++] = other;
}

// Leave the current thread; some other one that can run goes on.
static void leave() {
  Thread* self = machine.current;
  if (machine.num_runnable == 0) {
    if (machine.done == machine.size) {
      go(self->stack, machine.outside);
    }
    uint counts[4] = {0, 0, 0, 0};
    for (uint i = 0; i < machine.size; i++) {
      counts[machine.threads[i].waits]++;
    }
    fault("deadlock: %u threads wait at a barrier, %u at a simd operation, %u have returned",
        counts[AT_BARRIER], counts[AT_SIMD], counts[DONE]);
  }
  uint place = random_below(machine.num_runnable);
  Thread* next = machine.runnable[place];
  machine.runnable[place] = machine.runnable[--machine.num_runnable];
  machine.current = next;
  if (next != self) {
    go(self->stack, next->stack);
  }
}

static void wait_for_group(uint op) {
  Thread* self = machine.current;
  if (machine.at_barrier == 0) {
    machine.barrier_op = op;
  } else if (machine.barrier_op != op) {
    fault("threads of a group wait at different kinds of barriers");
  }
  self->waits = AT_BARRIER;
  if (++machine.at_barrier == machine.size) {
    machine.at_barrier = 0;
    machine.epoch++;
    machine.device_epoch += op;
    for (uint i = 0; i < machine.size; i++) {
      make_runnable(&machine.threads[i]);
    }
  }
  leave();
}
static inline void barrier() {
  wait_for_group(0);
}
static inline void device_barrier() {
  wait_for_group(1);
}

// --------------------------------------------------------------------------------------- memory

// Who touched a place last, and when; a barrier begins a new time. Lanes of one simdgroup have a
// time of their own beside it, in threadgroup memory.
struct Shadow {
  uint writer = NOBODY, written, writer_simd;
  uint reader = NOBODY, read, reader_simd, reader_group;
};

static inline bool at_once(
    uint other, uint time, uint group, uint simd_time, uint self, uint now, bool in_group) {
  if (other == NOBODY || other == OUTSIDE || other == self || time != now) {
    return false;
  }
  uint own = machine.current->simdgroup;
  return !in_group || group != own || simd_time == machine.simdgroups[own].epoch;
}

static inline bool write_races(const Shadow& shadow, uint self, uint now, bool in_group) {
  uint group = shadow.writer < OUTSIDE ? shadow.writer / LANES : MANY;
  return at_once(shadow.writer, shadow.written, group, shadow.writer_simd, self, now, in_group);
}

static inline void note_read(
    Shadow& shadow, const char* name, long place, uint self, uint now, bool in_group) {
  if (__builtin_expect(shadow.writer == NOBODY, 0)) {
    fault("%s[%ld] is read before anything is written there", name, place);
  }
  if (write_races(shadow, self, now, in_group)) {
    fault("race: %s[%ld] is read here and written by another thread with no barrier between", name,
        place);
  }
  uint group = machine.current->simdgroup, simd_now = machine.simdgroups[group].epoch;
  if (shadow.reader == NOBODY || shadow.reader == self || shadow.read != now) {
    shadow.reader = self;
    shadow.reader_group = group;
  } else {
    bool ordered_before = shadow.reader_group == group && shadow.reader_simd != simd_now;
    shadow.reader = ordered_before ? self : MANY;
    shadow.reader_group = shadow.reader_group == group ? group : MANY;
  }
  shadow.read = now;
  shadow.reader_simd = simd_now;
}

static inline void note_write(
    Shadow& shadow, const char* name, long place, uint self, uint now, bool in_group) {
  if (write_races(shadow, self, now, in_group)) {
    fault("race: %s[%ld] is written here and by another thread with no barrier between", name,
        place);
  }
  if (at_once(shadow.reader, shadow.read, shadow.reader_group, shadow.reader_simd, self, now,
          in_group)) {
    fault("race: %s[%ld] is written here and read by another thread with no barrier between", name,
        place);
  }
  shadow.writer = self;
  shadow.written = now;
  shadow.writer_simd = machine.simdgroups[machine.current->simdgroup].epoch;
}

// Whom a thread is to memory that all groups see.
static inline uint in_grid() {
  return machine.group * MOST_THREADS + machine.current->index;
}

template <typename T>
struct Input {
  const T* data;
  long place, size;
  const char* name;
  Input operator+(long offset) const {
    return {data, place + offset, size, name};
  }
  T operator[](long offset) const {
    long at = place + offset;
    if (__builtin_expect((unsigned long)at >= (unsigned long)size, 0)) {
      fault("%s[%ld] is read, which has %ld values", name, at, size);
    }
    return data[at];
  }
  T operator*() const {
    return (*this)[0];
  }
};

// A place in memory that the harness watches: read as a value, written by assignment.
template <typename Memory, typename T>
struct Cell {
  const Memory& memory;
  long at;
  operator T() const {
    return memory.read(at);
  }
  void operator=(T value) const {
    memory.write(at, value);
  }
  void operator=(const Cell& other) const {
    memory.write(at, other.memory.read(other.at));
  }
  void operator+=(T value) const {
    memory.write(at, T(memory.read(at) + value));
  }
};

template <typename T>
struct Output {
  T* data;
  long place, size;
  const char* name;
  Shadow* shadow;
  Output operator+(long offset) const {
    return {data, place + offset, size, name, shadow};
  }
  Cell<Output, T> operator[](long offset) const {
    return {*this, place + offset};
  }
  void check(long at, const char* done) const {
    if (__builtin_expect((unsigned long)at >= (unsigned long)size, 0)) {
      fault("%s[%ld] is %s, which has %ld values", name, at, done, size);
    }
  }
  // Groups never wait for each other, so what one wrote is out of bounds for the others.
  void same_group(long at) const {
    const Shadow& x = shadow[at];
    if (x.writer < OUTSIDE && x.writer / MOST_THREADS != machine.group) {
      fault("race: %s[%ld] is used here and written by another threadgroup", name, at);
    }
  }
  T read(long at) const {
    check(at, "read");
    same_group(at);
    note_read(shadow[at], name, at, in_grid(), machine.device_epoch, false);
    return data[at];
  }
  void write(long at, T value) const {
    check(at, "written");
    same_group(at);
    note_write(shadow[at], name, at, in_grid(), machine.device_epoch, false);
    data[at] = value;
  }
};

static struct SharedMemory {
  const char* names[32];
  uint offsets[32], counts[32], num_names, bytes;
  alignas(16) char data[SHARED_BYTES];
  Shadow shadows[SHARED_BYTES];
} shared;

template <typename T>
struct Shared {
  T* data;
  Shadow* shadow;
  long place, size;
  const char* name;
  Shared operator+(long offset) const {
    return {data, shadow, place + offset, size, name};
  }
  Cell<Shared, T> operator[](long offset) const {
    return {*this, place + offset};
  }
  void check(long at) const {
    if (__builtin_expect((unsigned long)at >= (unsigned long)size, 0)) {
      fault("%s[%ld] is used, which has %ld values", name, at, size);
    }
  }
  T read(long at) const {
    check(at);
    note_read(shadow[at], name, at, machine.current->index, machine.epoch, true);
    return data[at];
  }
  void write(long at, T value) const {
    check(at);
    note_write(shadow[at], name, at, machine.current->index, machine.epoch, true);
    data[at] = value;
  }
};
typedef Shared<uint> Counters;

template <typename T>
static Shared<T> shared_memory(const char* name, uint count) {
  uint found = 0;
  while (found < shared.num_names && strcmp(shared.names[found], name)) {
    found++;
  }
  if (found == shared.num_names) {
    uint begin = (shared.bytes + 15) & ~15u;
    if (found == 32 || begin + count * sizeof(T) > SHARED_BYTES) {
      fault("%s does not fit: a threadgroup has %u bytes of memory", name, SHARED_BYTES);
    }
    shared.names[found] = name;
    shared.offsets[found] = begin;
    shared.counts[found] = count;
    shared.bytes = begin + (uint)(count * sizeof(T));
    shared.num_names++;
    memset(shared.data + begin, 0xff, count * sizeof(T));
    for (uint i = 0; i < count; i++) {
      shared.shadows[begin + i] = Shadow();
    }
  }
  uint begin = shared.offsets[found];
  return {(T*)(shared.data + begin), shared.shadows + begin, 0, (long)count, name};
}

// What is atomic races with what is not, but not with its like.
static inline void counter_time(Counters counters, uint place) {
  counters.check(counters.place + place);
  Shadow& shadow = counters.shadow[counters.place + place];
  if (shadow.written != machine.epoch && shadow.writer != NOBODY) {
    shadow.writer = OUTSIDE;
  }
}
static inline void set_counter(Counters counters, uint place, uint value) {
  counter_time(counters, place);
  counters[place] = value;
}
static inline uint get_counter(Counters counters, uint place) {
  counter_time(counters, place);
  return counters[place];
}
static inline uint add_to_counter(Counters counters, uint place, uint value) {
  counter_time(counters, place);
  Shadow& shadow = counters.shadow[counters.place + place];
  uint& count = counters.data[counters.place + place];
  uint before = count;
  if (shadow.writer == NOBODY) {
    fault("%s[%u] is added to before it is set", counters.name, place);
  }
  if (shadow.writer < OUTSIDE && shadow.writer != machine.current->index &&
      shadow.written == machine.epoch) {
    fault("race: %s[%u] is added to and set by another thread with no barrier between",
        counters.name, place);
  }
  if (shadow.reader != NOBODY && shadow.read == machine.epoch &&
      shadow.reader != machine.current->index) {
    fault("race: %s[%u] is added to and read with no barrier between", counters.name, place);
  }
  // Whoever reads in this time races: the sum is not done.
  shadow.writer = MANY;
  shadow.written = machine.epoch;
  count += value;
  return before;
}

// ----------------------------------------------------------------------------- simd operations

enum SimdOp { SUM = 1, MAX, MIN, SHUFFLE, PREFIX, ANY, ALL, ONLY_WAIT };

template <typename T>
static inline uint64_t packed(T value) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return bits;
}
template <typename T>
static inline T unpacked(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// All lanes bring a value; the last one combines them, in random order. Returns which half is used.
template <typename T, typename Combine>
static uint exchange(T value, uint op, Combine combine) {
  Thread* self = machine.current;
  Simdgroup& group = machine.simdgroups[self->simdgroup];
  uint parity = group.parity;
  if (group.arrived == 0) {
    group.op = op;
  } else if (group.op != op) {
    fault("lanes of a simdgroup are at different simd operations");
  }
  group.slots[parity][self->lane] = packed(value);
  self->waits = AT_SIMD;
  if (++group.arrived == group.size) {
    uint first = self->simdgroup * LANES, order[LANES];
    for (uint i = 0; i < group.size; i++) {
      make_runnable(&machine.threads[first + i]);
      uint place = random_below(i + 1);
      order[i] = order[place];
      order[place] = i;
    }
    combine(group, parity, order);
    group.arrived = 0;
    group.parity ^= 1;
  }
  leave();
  return parity;
}

template <typename T, typename Combine>
static inline T reduced(T value, uint op, Combine combine) {
  uint parity = exchange(value, op, [combine](Simdgroup& group, uint half, const uint* order) {
    T found = unpacked<T>(group.slots[half][order[0]]);
    for (uint i = 1; i < group.size; i++) {
      found = combine(found, unpacked<T>(group.slots[half][order[i]]));
    }
    group.result[half] = packed(found);
  });
  return unpacked<T>(machine.simdgroups[machine.current->simdgroup].result[parity]);
}

template <typename T>
static inline T simd_sum(T value) {
  return reduced(value, SUM, [](T a, T b) { return T(a + b); });
}
template <typename T>
static inline T simd_max(T value) {
  return reduced(value, MAX, [](T a, T b) { return a < b ? b : a; });
}
template <typename T>
static inline T simd_min(T value) {
  return reduced(value, MIN, [](T a, T b) { return b < a ? b : a; });
}
static inline bool simd_any(bool value) {
  return reduced(value, ANY, [](bool a, bool b) { return a || b; });
}
static inline bool simd_all(bool value) {
  return reduced(value, ALL, [](bool a, bool b) { return a && b; });
}
static inline void simd_barrier() {
  exchange(0u, ONLY_WAIT, [](Simdgroup& group, uint, const uint*) { group.epoch++; });
}

template <typename T>
static inline T from_lane(T value, uint lane) {
  uint parity = exchange(value, SHUFFLE, [](Simdgroup&, uint, const uint*) {});
  Simdgroup& group = machine.simdgroups[machine.current->simdgroup];
  if (lane >= group.size) {
    fault("a value is taken from lane %u of a simdgroup of %u", lane, group.size);
  }
  return unpacked<T>(group.slots[parity][lane]);
}
template <typename T>
static inline T simd_shuffle(T value, uint lane) {
  return from_lane(value, lane);
}
template <typename T>
static inline T simd_broadcast(T value, uint lane) {
  return from_lane(value, lane);
}
template <typename T>
static inline T simd_shuffle_xor(T value, uint mask) {
  return from_lane(value, machine.current->lane ^ mask);
}
// Beyond the last lane Metal leaves the value open: here it is one that shows.
template <typename T>
static inline T simd_shuffle_down(T value, uint delta) {
  uint lane = machine.current->lane + delta;
  bool within = lane < machine.simdgroups[machine.current->simdgroup].size;
  T found = from_lane(value, within ? lane : machine.current->lane);
  if (!within) {
    memset((void*)&found, 0xfe, sizeof found);
  }
  return found;
}
template <typename T>
static inline T simd_prefix_exclusive_sum(T value) {
  uint parity = exchange(value, PREFIX, [](Simdgroup&, uint, const uint*) {});
  Simdgroup& group = machine.simdgroups[machine.current->simdgroup];
  T sum = T(0);
  for (uint lane = 0; lane < machine.current->lane; lane++) {
    sum = T(sum + unpacked<T>(group.slots[parity][lane]));
  }
  return sum;
}

// As in CUDA: two values of a row in each lane. Metal's own layout is another, and not to be used.
template <typename T>
struct Tile {
  T values[2];
};
template <typename T>
static inline void tile_fill(Tile<T>& tile, T value) {
  tile.values[0] = tile.values[1] = value;
}
template <typename T>
static inline void tile_load(Tile<T>& tile, Shared<T> from, uint stride, uint lane) {
  for (uint i = 0; i < 2; i++) {
    tile.values[i] = from[lane / 4 * stride + 2 * (lane % 4) + i];
  }
}
template <typename T>
static inline void tile_store(Tile<T>& tile, Shared<T> to, uint stride, uint lane) {
  for (uint i = 0; i < 2; i++) {
    to[lane / 4 * stride + 2 * (lane % 4) + i] = tile.values[i];
  }
}
template <typename T>
static inline void tile_multiply_add(Tile<float>& sum, Tile<T>& a, Tile<T>& b, uint lane) {
  for (uint k = 0; k < 8; k++) {
    float left = simd_shuffle(float(a.values[k % 2]), lane / 4 * 4 + k / 2), right[2];
    for (uint i = 0; i < 2; i++) {
      right[i] = simd_shuffle(float(b.values[i]), 4 * k + lane % 4);
    }
    for (uint i = 0; i < 2; i++) {
      sum.values[i] += left * right[i];
    }
  }
}

// Functions that Metal and CUDA have under these names.
template <typename T>
static inline T max(T a, T b) {
  return a < b ? b : a;
}
template <typename T>
static inline T min(T a, T b) {
  return b < a ? b : a;
}

// ------------------------------------------------------------------------------------- the grid

static void (*kernel_of_thread)();

static void thread_main() {
  kernel_of_thread();
  machine.current->waits = DONE;
  machine.done++;
  leave();
}

// What a kernel's thread is told of its place.
static inline uint3 position_in_group() {
  uint index = machine.current->index;
  uint3 size = machine.group_size;
  return {index % size.x, index / size.x % size.y, index / (size.x * size.y)};
}
static inline uint3 position_in_grid() {
  uint3 at = position_in_group(), group = machine.group_position, size = machine.whole_group;
  return {group.x * size.x + at.x, group.y * size.y + at.y, group.z * size.z + at.z};
}

static void run_group() {
  shared.num_names = shared.bytes = 0;
  machine.epoch++;
  machine.device_epoch++;
  machine.done = machine.at_barrier = machine.num_runnable = 0;
  for (uint i = 0; i < machine.size; i++) {
    Thread& thread_ = machine.threads[i];
    thread_.index = i;
    thread_.lane = i % LANES;
    thread_.simdgroup = i / LANES;
    prepare(thread_.stack, machine.stacks + (size_t)i * STACK_BYTES, STACK_BYTES, thread_main);
    make_runnable(&thread_);
    Simdgroup& group = machine.simdgroups[i / LANES];
    group.size = i % LANES + 1;
    group.arrived = group.parity = 0;
  }
  uint place = random_below(machine.num_runnable);
  machine.current = machine.runnable[place];
  machine.runnable[place] = machine.runnable[--machine.num_runnable];
  go(machine.outside, machine.current->stack);
}

// Run all groups. Metal cuts the groups at the end of the grid; CUDA does not.
static bool run_grid(uint3 grid, uint3 group, bool cut, uint64_t seed, void (*kernel)(), char* out) {
  machine.random = seed * 0x9e3779b97f4a7c15ull + 0x1234567;
  machine.failed = false;
  machine.current = nullptr;
  machine.epoch = machine.device_epoch = 1;
  kernel_of_thread = kernel;
  machine.grid = grid;
  if (!machine.stacks) {
    machine.stacks = (char*)operator new((size_t)MOST_THREADS * STACK_BYTES);
  }
  uint3 count = {(grid.x + group.x - 1) / group.x, (grid.y + group.y - 1) / group.y,
      (grid.z + group.z - 1) / group.z};
  uint total = count.x * count.y * count.z;
  uint* order = (uint*)operator new(total * sizeof(uint));
  for (uint i = 0; i < total; i++) {
    uint place = random_below(i + 1);
    order[i] = order[place];
    order[place] = i;
  }
  for (uint i = 0; i < total && !machine.failed; i++) {
    machine.group = order[i];
    uint3 at = {order[i] % count.x, order[i] / count.x % count.y, order[i] / (count.x * count.y)};
    machine.group_position = at;
    machine.whole_group = machine.group_size = group;
    if (cut) {
      machine.group_size = {min(group.x, grid.x - at.x * group.x),
          min(group.y, grid.y - at.y * group.y), min(group.z, grid.z - at.z * group.z)};
    }
    uint3 size = machine.group_size;
    machine.size = size.x * size.y * size.z;
    run_group();
  }
  operator delete(order);
  machine.current = nullptr;
  snprintf(out, sizeof machine.message, "%s", machine.failed ? machine.message : "");
  return !machine.failed;
}

template <typename T>
static Output<T> output_of(T* data, long size, const char* name) {
  Shadow* shadow = new Shadow[size];
  memset((void*)data, 0xff, size * sizeof(T));
  return {data, 0, size, name, shadow};
}
template <typename T>
static void check_written(const Output<T>& output, char* out) {
  for (long i = 0; i < output.size && !*out; i++) {
    if (output.shadow[i].writer == NOBODY) {
      snprintf(out, sizeof machine.message, "%s[%ld] is never written", output.name, i);
    }
  }
  delete[] output.shadow;
}
