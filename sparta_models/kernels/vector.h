// L floats at a time, in and out of float32 or bfloat16, and the sigmoid.

#pragma once

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

#ifdef __AVX512F__
constexpr int L = 16;
#else
constexpr int L = 8;
#endif
typedef float vf __attribute__((vector_size(L * 4)));
typedef int32_t vi __attribute__((vector_size(L * 4)));
typedef uint32_t vu __attribute__((vector_size(L * 4)));
typedef uint16_t vh __attribute__((vector_size(L * 2)));

template <typename T, bool Full>
inline vf load(const T* p, int n) {
  if constexpr (std::is_same_v<T, float>) {
    vf v = {};
    std::memcpy(&v, p, (Full ? L : n) * sizeof(float));
    return v;
  } else {
    vh v = {};
    std::memcpy(&v, p, (Full ? L : n) * sizeof(uint16_t));
    return (vf)(__builtin_convertvector(v, vu) << 16);
  }
}

template <typename T, bool Full>
inline void store(T* p, vf v, int n) {
  if constexpr (std::is_same_v<T, float>) {
    std::memcpy(p, &v, (Full ? L : n) * sizeof(float));
  } else {
#ifdef __AVX512BF16__
    vh out = (vh)_mm512_cvtneps_pbh((__m512)v);
#else
    // Round to nearest even; a NaN keeps a bit of its mantissa.
    vu bits = (vu)v;
    vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    vu nan = (vu)(v != v);
    vh out = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), vh);
#endif
    std::memcpy(p, &out, (Full ? L : n) * sizeof(uint16_t));
  }
}

inline vf splat(float value) { return vf{} + value; }

// exp by 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes expf), to 2 ulp.
inline vf exp_of(vf v) {
  v = v > 88.0f ? splat(88.0f) : v;
  v = v < -87.0f ? splat(-87.0f) : v;
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  vf shifted = v * 1.44269504088896341f + magic;
  vf n = shifted - magic;
  vf r = v - n * 0.693359375f + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  vi scale = ((vi)shifted - 0x4b400000 + 127) << 23;
  return p * (vf)scale;
}

inline vf sigmoid(vf g) { return 1.0f / (1.0f + exp_of(-g)); }

}  // namespace
