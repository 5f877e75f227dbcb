// Vectors of floats, as wide as the processor's registers, and the functions on them that the layers need.
//
// Every operation rounds as written: the file is compiled without permission to reorder or to contract, and a fused
// multiply-add is asked for by name where the processor has one.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
constexpr int FLOATS = 16, VECTORS = 4;  // FLOATS: of a register; VECTORS: registers of outputs in a block
#elif defined(__AVX__)
constexpr int FLOATS = 8, VECTORS = 2;
#elif defined(__aarch64__)
constexpr int FLOATS = 4, VECTORS = 4;
#else
constexpr int FLOATS = 4, VECTORS = 2;
#endif

typedef float Vec __attribute__((vector_size(4 * FLOATS)));
typedef int32_t IntVec __attribute__((vector_size(4 * FLOATS)));

inline Vec load(const float* from) {
  Vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline void store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }

inline Vec all(float x) { return x - Vec{}; }

// The larger and the smaller of two, b where one of them is NaN.
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

inline Vec smaller(Vec a, Vec b) { return a < b ? a : b; }

// a * b + c, rounded once where the processor can
inline Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX__) && defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

// Sum of the floats of a register, always in the same order.
inline float sum(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(v);
#elif defined(__AVX__)
  const __m128 halves = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  return (halves[0] + halves[2]) + (halves[1] + halves[3]);
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

inline float largest(Vec v) {
  float x[FLOATS];
  store(x, v);
  float most = x[0];
  for (int i = 1; i < FLOATS; i++) most = x[i] > most ? x[i] : most;
  return most;
}

// e^x to about one unit in the last place; x beyond the range of float counts as its end, and NaN stays.
inline Vec exponential(Vec x) {
  x = smaller(all(88.0f), larger(all(-87.0f), x));
  const Vec rounder = all(12582912.0f);  // 1.5 * 2^23: a sum with it keeps the nearest whole number in its last bits
  const Vec shifted = multiply_add(x, all(1.44269504f), rounder), whole = shifted - rounder;
  Vec r = multiply_add(whole, all(-0.693359375f), x);  // ln 2 in two parts, the first exact in few bits
  r = multiply_add(whole, all(2.12194440e-4f), r);
  Vec p = all(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = multiply_add(p, r, all(c));
  p = multiply_add(p, r * r, r) + all(1.0f);
  const IntVec exponent = (IntVec)shifted - (IntVec)rounder + 127;
  return p * (Vec)(exponent << 23);
}
