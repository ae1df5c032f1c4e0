// Vectors of floats and integers for the instruction set that this file is compiled for, and numbers in 16 bits.
//
// Everything is in an unnamed namespace: one library contains the same functions for several instruction sets, and the
// linker must not replace one by another.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

// Floats per register; compilers spill wider vectors to memory.
#if defined(__AVX512F__)
constexpr long LANES = 16;
#elif defined(__AVX2__)
constexpr long LANES = 8;
#else
constexpr long LANES = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2)));
typedef int8_t Bytes __attribute__((vector_size(LANES), aligned(1)));

template <class T>
inline T larger(T a, T b) { return a < b ? b : a; }  // of a NaN and a number: the first
template <class T>
inline T smaller(T a, T b) { return b < a ? b : a; }

// An array that is not initialized, aligned to a cache line.
template <class T>
struct Array {
  T* p = nullptr;
  long size = 0;
  Array() = default;
  explicit Array(long n) { resize(n); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { free(p); }
  void resize(long n) {  // contents are lost
    if (n <= size) return;
    free(p);
    p = (T*)aligned_alloc(64, (n * sizeof(T) + 127) / 64 * 64);
    if (!p) abort();
    size = n;
  }
  T* data() { return p; }
  const T* data() const { return p; }
  T& operator[](long i) { return p[i]; }
  const T& operator[](long i) const { return p[i]; }
};

inline float widen(uint16_t half) {
  uint32_t bits = (uint32_t)half << 16;
  float number;
  memcpy(&number, &bits, 4);
  return number;
}

inline uint16_t narrow(float number) {  // round to nearest, ties to even; any NaN becomes the quiet NaN
  uint32_t bits;
  memcpy(&bits, &number, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline Floats load(const float* p) { return *(const Floats*)p; }
inline Floats load(const uint16_t* p) {
  Words words = __builtin_convertvector(*(const Halves*)p, Words) << 16;
  return (Floats)words;
}
inline Floats load(const int8_t* p) {  // g++ 12 compiles __builtin_convertvector to scalar code here
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  return __builtin_convertvector(*(const Bytes*)p, Floats);
#endif
}
inline float get(float number) { return number; }
inline float get(uint16_t number) { return widen(number); }
inline float get(int8_t number) { return number; }

inline float total(Floats v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float sum = 0;
  for (int i = 0; i < LANES; i++) sum += v[i];
  return sum;
#endif
}

// e^x with a relative error below 2e-7; unlike the library's, compilers can vectorize it. x = (whole + f) log 2: a Taylor
// polynomial for the fraction, and `whole` goes into the exponent bits.
inline float power_of_e(float x) {
  float t = smaller(larger(x, -87.f), 88.f) * 1.44269504f;
  float whole = floorf(t + 0.5f), f = (t - whole) * 0.69314718f;
  float p = 1.f + f * (1.f + f * (0.5f + f * (0.166666667f + f * (0.0416666667f + f * (0.00833333333f + f * 0.00138888889f)))));
  int32_t bits = ((int32_t)whole + 127) << 23;
  float scale;
  memcpy(&scale, &bits, 4);
  return p * scale;
}

inline float tanh_of(float x) { return 1.f - 2.f / (power_of_e(2.f * x) + 1.f); }

template <class Number>
float dot(const Number* w, const float* x, long n) {
  Floats a{}, b{}, c{}, d{};
  long i = 0;
  for (; i + 4 * LANES <= n; i += 4 * LANES) {
    a += load(w + i) * load(x + i);
    b += load(w + i + LANES) * load(x + i + LANES);
    c += load(w + i + 2 * LANES) * load(x + i + 2 * LANES);
    d += load(w + i + 3 * LANES) * load(x + i + 3 * LANES);
  }
  for (; i + LANES <= n; i += LANES) a += load(w + i) * load(x + i);
  float sum = total((a + b) + (c + d));
  for (; i < n; i++) sum += get(w[i]) * x[i];
  return sum;
}

inline float largest(const float* x, long n) {  // the largest magnitude
  int32_t most = 0;  // compared as integers, in which a NaN is larger than all numbers and propagates
  for (long i = 0; i < n; i++) {
    int32_t bits;
    memcpy(&bits, x + i, 4);
    most = larger(most, bits & 0x7fffffff);
  }
  float number;
  memcpy(&number, &most, 4);
  return number;
}

// Registers of bytes, of their products' int32 sums, and of as many floats: `Int` and `Real`. Products are of unsigned codes
// with signed inputs, four to a sum.
#if defined(__AVX512BW__)
#define INTEGERS 64
typedef __m512i Int;
typedef __m512 Real;
inline Int int_load(const void* p) { return _mm512_loadu_si512(p); }
inline Int int_zero() { return _mm512_setzero_si512(); }
inline Int int_all(int32_t word) { return _mm512_set1_epi32(word); }
inline Int low_nibbles(Int v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
inline Int high_nibbles(Int v) { return _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15)); }
inline Int add32(Int a, Int b) { return _mm512_add_epi32(a, b); }
inline Int add16(Int a, Int b) { return _mm512_add_epi16(a, b); }
inline Int pairs16(Int a, Int b) { return _mm512_madd_epi16(a, b); }
inline Int times_small(Int a, Int b) { return pairs16(a, b); }  // of int32 a below 2^15 with int16 b: faster than 32 bits
inline Int pairs8(Int u, Int s) { return _mm512_maddubs_epi16(u, s); }
inline Int widen_codes(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
inline Real real(Int v) { return _mm512_cvtepi32_ps(v); }
inline Real real_zero() { return _mm512_setzero_ps(); }
inline Real real_all(float x) { return _mm512_set1_ps(x); }
inline Real real_load(const float* p) { return _mm512_loadu_ps(p); }
inline void real_store(float* p, Real v) { _mm512_storeu_ps(p, v); }
inline Real widen_scales(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline Real times(Real a, Real b) { return _mm512_mul_ps(a, b); }
inline Real plus_product(Real a, Real b, Real sum) { return _mm512_fmadd_ps(a, b, sum); }
#if defined(__AVX512VNNI__)
#define FOURS
inline Int add_fours(Int sums, Int u, Int s) { return _mm512_dpbusd_epi32(sums, u, s); }
#else  // negates inputs instead of codes, of which products of bytes need the magnitude
inline Int int_signed(Int s, Int sign) {
  return _mm512_mask_sub_epi8(s, _mm512_movepi8_mask(sign), _mm512_setzero_si512(), s);
}
inline Int int_magnitude(Int v) { return _mm512_abs_epi8(v); }
inline Int flip_top_bits(Int v) { return _mm512_xor_si512(v, _mm512_set1_epi8(-128)); }
#endif
#elif defined(__AVX2__)
#define INTEGERS 32
typedef __m256i Int;
typedef __m256 Real;
inline Int int_load(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline Int int_zero() { return _mm256_setzero_si256(); }
inline Int int_all(int32_t word) { return _mm256_set1_epi32(word); }
inline Int low_nibbles(Int v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
inline Int high_nibbles(Int v) { return _mm256_and_si256(_mm256_srli_epi16(v, 4), _mm256_set1_epi8(15)); }
inline Int add32(Int a, Int b) { return _mm256_add_epi32(a, b); }
inline Int add16(Int a, Int b) { return _mm256_add_epi16(a, b); }
inline Int pairs16(Int a, Int b) { return _mm256_madd_epi16(a, b); }
inline Int times_small(Int a, Int b) { return pairs16(a, b); }  // of int32 a below 2^15 with int16 b: faster than 32 bits
inline Int pairs8(Int u, Int s) { return _mm256_maddubs_epi16(u, s); }
inline Int widen_codes(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
inline Real real(Int v) { return _mm256_cvtepi32_ps(v); }
inline Real real_zero() { return _mm256_setzero_ps(); }
inline Real real_all(float x) { return _mm256_set1_ps(x); }
inline Real real_load(const float* p) { return _mm256_loadu_ps(p); }
inline void real_store(float* p, Real v) { _mm256_storeu_ps(p, v); }
inline Real widen_scales(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline Real times(Real a, Real b) { return _mm256_mul_ps(a, b); }
#if defined(__FMA__)
inline Real plus_product(Real a, Real b, Real sum) { return _mm256_fmadd_ps(a, b, sum); }
#else
inline Real plus_product(Real a, Real b, Real sum) { return _mm256_add_ps(_mm256_mul_ps(a, b), sum); }
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define FOURS
inline Int add_fours(Int sums, Int u, Int s) { return _mm256_dpbusd_epi32(sums, u, s); }
#elif defined(__AVXVNNI__)
#define FOURS
inline Int add_fours(Int sums, Int u, Int s) { return _mm256_dpbusd_avx_epi32(sums, u, s); }
#else
inline Int int_signed(Int s, Int sign) { return _mm256_sign_epi8(s, sign); }
inline Int int_magnitude(Int v) { return _mm256_abs_epi8(v); }
inline Int flip_top_bits(Int v) { return _mm256_xor_si256(v, _mm256_set1_epi8(-128)); }
#endif
#elif defined(__ARM_NEON) && defined(__ARM_FEATURE_DOTPROD)
#define INTEGERS 16
#define FOURS
#define SIGNED_CODES  // products are of signed bytes: codes of 8 bits are used less 128
typedef int32x4_t Int;
typedef float32x4_t Real;
inline int8x16_t as_bytes(Int v) { return vreinterpretq_s8_s32(v); }
inline Int as_words(int8x16_t v) { return vreinterpretq_s32_s8(v); }
inline Int int_load(const void* p) { return as_words(vld1q_s8((const int8_t*)p)); }
inline Int int_zero() { return vdupq_n_s32(0); }
inline Int int_all(int32_t word) { return vdupq_n_s32(word); }
inline Int low_nibbles(Int v) { return as_words(vandq_s8(as_bytes(v), vdupq_n_s8(15))); }
inline Int high_nibbles(Int v) { return as_words(vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s32(v), 4))); }
inline Int flip_top_bits(Int v) { return veorq_s32(v, vdupq_n_s32((int32_t)0x80808080)); }
inline Int add32(Int a, Int b) { return vaddq_s32(a, b); }
inline Int times_small(Int a, Int b) { return vmulq_s32(a, b); }
inline Int widen_codes(const uint8_t* p) {
  uint32_t four;
  memcpy(&four, p, 4);
  return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four)))));
}
inline Real real(Int v) { return vcvtq_f32_s32(v); }
inline Real real_zero() { return vdupq_n_f32(0); }
inline Real real_all(float x) { return vdupq_n_f32(x); }
inline Real real_load(const float* p) { return vld1q_f32(p); }
inline void real_store(float* p, Real v) { vst1q_f32(p, v); }
inline Real widen_scales(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
inline Real times(Real a, Real b) { return vmulq_f32(a, b); }
inline Real plus_product(Real a, Real b, Real sum) { return vfmaq_f32(sum, a, b); }
inline Int add_fours(Int sums, Int u, Int s) { return vdotq_s32(sums, as_bytes(u), as_bytes(s)); }
#endif

}  // namespace
