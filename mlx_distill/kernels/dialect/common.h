// What kernels share, in the dialect alone.

// Sums over a threadgroup of whole simdgroups, at most 32; every thread has to come here.
FUNCTION float group_sum(
    float value, SHARED_ARG(float) scratch, uint lane, uint simdgroup, uint simdgroups) {
  float part = simd_sum(value);
  barrier();  // the scratch memory may still be read
  if (lane == 0) {
    scratch[simdgroup] = part;
  }
  barrier();
  // In one order for all: threads that branch on a sum must have the same bits.
  float sum = 0.0f;
  for (uint other = 0; other < simdgroups; other++) {
    sum += float(scratch[other]);
  }
  return sum;
}

FUNCTION float group_max(
    float value, SHARED_ARG(float) scratch, uint lane, uint simdgroup, uint simdgroups) {
  float part = simd_max(value);
  barrier();
  if (lane == 0) {
    scratch[simdgroup] = part;
  }
  barrier();
  return simd_max(lane < simdgroups ? float(scratch[lane]) : -infinity());
}

FUNCTION uint group_sum(
    uint value, SHARED_ARG(uint) scratch, uint lane, uint simdgroup, uint simdgroups) {
  uint part = simd_sum(value);
  barrier();
  if (lane == 0) {
    scratch[simdgroup] = part;
  }
  barrier();
  return simd_sum(lane < simdgroups ? uint(scratch[lane]) : 0u);
}

FUNCTION uint group_max(
    uint value, SHARED_ARG(uint) scratch, uint lane, uint simdgroup, uint simdgroups) {
  uint part = simd_max(value);
  barrier();
  if (lane == 0) {
    scratch[simdgroup] = part;
  }
  barrier();
  return simd_max(lane < simdgroups ? uint(scratch[lane]) : 0u);
}

FUNCTION uint group_min(
    uint value, SHARED_ARG(uint) scratch, uint lane, uint simdgroup, uint simdgroups) {
  uint part = simd_min(value);
  barrier();
  if (lane == 0) {
    scratch[simdgroup] = part;
  }
  barrier();
  return simd_min(lane < simdgroups ? uint(scratch[lane]) : 0xffffffffu);
}

// A number with the order of the float it is made of; what is no number is above all others.
FUNCTION uint ordered(float value) {
  uint bits = value == 0.0f ? 0 : bits_of(value);  // zeros are equal, whatever their signs
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
FUNCTION float unordered(uint rank) {
  return float_of(rank & 0x80000000u ? rank & 0x7fffffffu : ~rank);
}
