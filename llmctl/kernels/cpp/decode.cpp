// One decoding step through all layers of a decoder in one call; weights are quantized, bfloat16 or float32.
//
// 4-bit and 8-bit weights are used in the packed layout of the model's files: rows of codes, lowest bits first. Inputs of
// quantized weights are rounded to 8 bits in blocks of 64 (llama.cpp's Q8_0 uses blocks of 32), so that dot products are
// integer sums. There is one parallel region per token; every thread computes norms and rounded inputs redundantly, which
// is cheaper than synchronizing. Compiled for the machine it runs on; without its vector instructions, plain loops do the
// same.
//
// Shapes: B rows (sequences), D width, F feed-forward, N query heads, K key heads, H head width.

#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr long BLOCK = 64;  // inputs that are quantized with one scale

enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, INT4 = 3, BYTES = 4 };

struct Matrix {  // O outputs x I inputs
  int32_t kind;
  int32_t group;          // INT4, BYTES: inputs that share a scale; 32, 64 or 128
  int64_t n_out, n_in;
  const void* weight;     // unsigned codes; BYTES: one per byte, below 64, in each block of 64 the even inputs before the odd
  const uint16_t* scale;  // bfloat16: (O,) for INT8, (O, G) for INT4 and BYTES
  const uint8_t* zero;    // zero points (O, G) for INT4 and BYTES; null means 8 everywhere
  const float* bias;      // (O,) or null
};

enum NormKind : int32_t { NONE = 0, RMS = 1, MEAN_AND_VARIANCE = 2 };

struct Norm {
  int32_t kind;
  const float *weight, *bias;  // null: ones, zeros
};

enum Activation : int32_t { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3, RELU_SQUARED = 4 };
enum Parallel : int32_t { SEQUENTIAL = 0, SHARED = 1, SEPARATE = 2 };  // the feed-forward layer's input beside attention
enum HeadNorm : int32_t { NO_HEAD_NORM = 0, BEFORE_ROTATION = 1, AFTER_ROTATION = 2, ALL_HEADS = 3 };

struct Layer {
  Matrix qkv, out, up, down;
  Norm attention, mlp;                // of what a part reads
  Norm attention_output, mlp_output;  // of what it adds
  Norm attention_sum, mlp_sum;        // of the sum
  Norm query, key;                    // of each head, or of all heads together
  int64_t window;  // attention window in tokens; 0 is full attention
  int64_t rope;    // index of the tables of cosines and sines; -1: heads are not rotated
};

struct Model {
  int64_t n_layers, width, d_ff, n_heads, n_kv_heads, head_dim, rotated;  // rotated: channels of a head
  float eps, scale, residual_scale, softcap, logits_softcap;              // caps: 0 is none
  int32_t activation, gated, parallel, head_norm;
  int32_t cache_kind;  // FLOAT32, BFLOAT16 or INT8
  int32_t n_threads;
  const Layer* layers;
  const float* slopes;  // (N,): by how much a head's scores fall with distance; null: not
  Norm norm;
  Matrix head;
};

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
  float t = std::min(std::max(x, -87.f), 88.f) * 1.44269504f;
  float whole = std::floor(t + 0.5f), f = (t - whole) * 0.69314718f;
  float p = 1.f + f * (1.f + f * (0.5f + f * (0.166666667f + f * (0.0416666667f + f * (0.00833333333f + f * 0.00138888889f)))));
  int32_t bits = ((int32_t)whole + 127) << 23;
  float scale;
  memcpy(&scale, &bits, 4);
  return p * scale;
}

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

template <class Number>
void dots(const Number* w, const float* x, long n, float* y) {  // row by row: sequential memory access
  for (long r = 0; r < 4; r++) y[r] = dot(w + r * n, x, n);
}

inline float largest(const float* x, long n) {  // the largest magnitude
  int32_t most = 0;  // compared as integers, in which a NaN is larger than all numbers and propagates
  for (long i = 0; i < n; i++) {
    int32_t bits;
    memcpy(&bits, x + i, 4);
    most = std::max(most, bits & 0x7fffffff);
  }
  float number;
  memcpy(&number, &most, 4);
  return number;
}

// One thread's input row of a product, as float32 and, for quantized weights, in 8 bits.
struct Input {
  std::vector<float> x, scale, sum;            // scale: per block of 64; sum: per 32 inputs, of the dequantized values
  std::vector<float> tiled_scale, tiled_sum;   // both per group, repeated for each of the ROWS outputs computed together
  std::vector<float> scaled, shift;            // scratch, see rows4
  std::vector<int8_t> codes;
  float whole_sum = 0;
  void reserve(long n) {
    x.resize(n + 64), scale.resize(n / BLOCK + 8), sum.resize(n / 32 + 16), codes.resize(n + 64);
    for (auto* numbers : {&tiled_scale, &tiled_sum, &scaled, &shift}) numbers->resize(n / 8 + 64);
  }
};

// Quantize the input. `split`: store a block's even inputs before the odd ones, to match the low and high nibbles of weights.
void round_inputs(Input& in, long n, bool split) {
  for (long block = 0; block < n / BLOCK; block++) {
    const float* x = in.x.data() + block * BLOCK;
    float most = largest(x, BLOCK);
    float scale = most / 127.f, inverse = most == 0 ? 0.f : 127.f / most;
    int8_t q[BLOCK], *out = in.codes.data() + block * BLOCK;
    for (long i = 0; i < BLOCK; i++) q[i] = (int8_t)(int32_t)std::nearbyintf(x[i] * inverse);
    int32_t first = 0, second = 0;
    for (long i = 0; i < 32; i++) first += q[i], second += q[i + 32];
    in.scale[block] = scale, in.sum[2 * block] = scale * first, in.sum[2 * block + 1] = scale * second;
    if (split)
      for (long i = 0; i < 32; i++) out[i] = q[2 * i], out[32 + i] = q[2 * i + 1];
    else
      memcpy(out, q, BLOCK);
  }
}

#if defined(__AVX2__)
inline __m256i bytes(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
#if (defined(__AVX512VNNI__) && defined(__AVX512VL__)) || defined(__AVXVNNI__)
// Multiply unsigned by signed bytes and add each four products to one of 8 int32 sums.
inline __m256i add_products(__m256i sums, __m256i u, __m256i s) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  return _mm256_dpbusd_epi32(sums, u, s);
#else
  return _mm256_dpbusd_avx_epi32(sums, u, s);
#endif
}
// A block's 64 products as 8 int32 sums: lanes 0-3 from the first half of its bytes, lanes 4-7 from the second.
inline __m256i block4(const uint8_t* w, const int8_t* q) {
  const __m256i low = _mm256_set1_epi8(15);
  __m256i v = bytes(w);
  __m256i sums = add_products(_mm256_setzero_si256(), _mm256_and_si256(v, low), bytes(q));
  return add_products(sums, _mm256_and_si256(_mm256_srli_epi16(v, 4), low), bytes(q + 32));
}
inline __m256i block8(const uint8_t* w, const int8_t* q) {
  return add_products(add_products(_mm256_setzero_si256(), bytes(w), bytes(q)), bytes(w + 32), bytes(q + 32));
}
inline __m256i block6(const uint8_t* w, const int8_t* q) { return block8(w, q); }
#else  // via int16 sums of two products, which saturate: they stay below 4 * 63 * 127; 8-bit codes are made signed, for
       // at most 2 * 128 * 127
#define SIGNED_BYTES
inline __m256i in_fours(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }
inline __m256i block4(const uint8_t* w, const int8_t* q) {
  const __m256i low = _mm256_set1_epi8(15);
  __m256i v = bytes(w);
  __m256i even = _mm256_maddubs_epi16(_mm256_and_si256(v, low), bytes(q));
  return in_fours(_mm256_add_epi16(even, _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(v, 4), low), bytes(q + 32))));
}
inline __m256i block6(const uint8_t* w, const int8_t* q) {
  return in_fours(_mm256_add_epi16(_mm256_maddubs_epi16(bytes(w), bytes(q)), _mm256_maddubs_epi16(bytes(w + 32), bytes(q + 32))));
}
inline __m256i half8(const uint8_t* w, const int8_t* q) {
  __m256i s = _mm256_xor_si256(bytes(w), _mm256_set1_epi8(-128));
  return in_fours(_mm256_maddubs_epi16(_mm256_abs_epi8(s), _mm256_sign_epi8(bytes(q), s)));
}
inline __m256i block8(const uint8_t* w, const int8_t* q) { return _mm256_add_epi32(half8(w, q), half8(w + 32, q + 32)); }
#endif
inline __m256 multiply_add(__m256i whole, __m256 scale, __m256 sum) {
  return _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(whole), scale), sum);
}
inline __m256 pair(const float* p) {  // broadcast two scales to four lanes each
  double both;
  memcpy(&both, p, 8);
  return _mm256_permutevar_ps(_mm256_castpd_ps(_mm256_set1_pd(both)), _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
}
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
inline __m512 two_scales(const float* p) {  // broadcast two scales to eight lanes each
  double both;
  memcpy(&both, p, 8);
  const __m512i places = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  return _mm512_permutevar_ps(_mm512_castpd_ps(_mm512_set1_pd(both)), places);
}
inline __m512 four_scales(const float* p) {  // broadcast four scales to four lanes each
  const __m512i places = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  return _mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(p)), places);
}
#endif
inline __m128 totals(__m256 a, __m256 b, __m256 c, __m256 d) {
  __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}
inline __m256 first_lanes(const float* p, long n) {  // load the first n of 8 floats, and zeros for the rest
  const __m256i places = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), places));
}
#endif

#if defined(SIGNED_BYTES)
constexpr float ZERO8 = 0;
#else
constexpr float ZERO8 = 128;  // the zero point of 8-bit codes, which `sums8` does not subtract
#endif

constexpr long AHEAD = 4096;  // prefetch distance in bytes
constexpr long ROWS = 4;  // rows of a matrix that are computed together, so that inputs are loaded once

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
// Like `sums4<false>` below (two codes per byte), two blocks at a time.
void sums4_in_pairs(const uint8_t* w, long row_bytes, const int8_t* q, const float* scale, const float* shift, long n_scales,
                    long blocks, bool halves, float* y) {
  const __m512i low = _mm512_set1_epi8(15);
  __m512 sums[ROWS];
  for (long r = 0; r < ROWS; r++) {
    sums[r] = _mm512_setzero_ps();
    for (long g = 0; g < n_scales; g += 16) {
      __mmask16 mask = n_scales - g < 16 ? (1u << (n_scales - g)) - 1 : 0xffff;
      sums[r] = _mm512_sub_ps(sums[r], _mm512_maskz_loadu_ps(mask, shift + r * n_scales + g));
    }
  }
  for (long i = 0; i < blocks; i += 2) {
    bool alone = i + 1 == blocks;  // an odd last block: the register's upper half is zero
    __mmask64 mask = alone ? 0xffffffffu : ~0ull;
    __m512i a = _mm512_loadu_si512(q + 64 * i), b = alone ? _mm512_setzero_si512() : _mm512_loadu_si512(q + 64 * i + 64);
    __m512i even = _mm512_shuffle_i64x2(a, b, 0x44), odd = _mm512_shuffle_i64x2(a, b, 0xee);
#pragma GCC unroll 4
    for (long r = 0; r < ROWS; r++) {
      const uint8_t* p = w + r * row_bytes + 32 * i;
      const float* s = scale + r * n_scales;
      __builtin_prefetch(p + AHEAD);
      __m512i v = _mm512_maskz_loadu_epi8(mask, p);
      __m512i whole = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_and_si512(v, low), even);
      whole = _mm512_dpbusd_epi32(whole, _mm512_and_si512(_mm512_srli_epi16(v, 4), low), odd);
      __m512 scales = halves ? four_scales(s + 2 * i) : two_scales(s + i);
      sums[r] = _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(whole), scales), sums[r]);
    }
  }
  for (long r = 0; r < ROWS; r++) y[r] = _mm512_reduce_add_ps(sums[r]);
}
#endif

// y[r] = sum over blocks of scale[r][block] (codes . inputs) - sum over groups of shift[r][group]. Codes are two per byte, or
// one if `wide`. `halves`: scales are per 32 inputs, two per block.
template <bool wide>
void sums4(const uint8_t* w, long row_bytes, const int8_t* q, const float* scale, const float* shift, long n_scales,
           long blocks, bool halves, float* y) {
  constexpr long step = wide ? 64 : 32;  // bytes of a block
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
  if (!wide) return sums4_in_pairs(w, row_bytes, q, scale, shift, n_scales, blocks, halves, y);
#endif
#if defined(__AVX2__)
  auto block = [](const uint8_t* p, const int8_t* x) { return wide ? block6(p, x) : block4(p, x); };
  __m256 sums[ROWS];
#pragma GCC unroll 4
  for (long r = 0; r < ROWS; r++) {
    sums[r] = _mm256_setzero_ps();
    for (long g = 0; g < n_scales; g += 8) sums[r] = _mm256_sub_ps(sums[r], first_lanes(shift + r * n_scales + g, n_scales - g));
  }
  if (halves)
    for (long i = 0; i < blocks; i++)
#pragma GCC unroll 4
      for (long r = 0; r < ROWS; r++)
        __builtin_prefetch(w + r * row_bytes + step * i + AHEAD), sums[r] = multiply_add(block(w + r * row_bytes + step * i, q + 64 * i), pair(scale + r * n_scales + 2 * i), sums[r]);
  else
    for (long i = 0; i < blocks; i++)
#pragma GCC unroll 4
      for (long r = 0; r < ROWS; r++)
        __builtin_prefetch(w + r * row_bytes + step * i + AHEAD), sums[r] = multiply_add(block(w + r * row_bytes + step * i, q + 64 * i), _mm256_set1_ps(scale[r * n_scales + i]), sums[r]);
  _mm_storeu_ps(y, totals(sums[0], sums[1], sums[2], sums[3]));
#else
  for (long r = 0; r < ROWS; r++, w += row_bytes, scale += n_scales, shift += n_scales) {
    float sum = 0;
    for (long g = 0; g < n_scales; g++) sum -= shift[g];
    for (long i = 0; i < blocks; i++) {
      int32_t first = 0, second = 0;
      for (long j = 0; j < 32; j++) {
        const uint8_t* p = w + step * i + j;
        int32_t even = wide ? p[0] : p[0] & 15, odd = wide ? p[32] : p[0] >> 4;
        (j < 16 ? first : second) += even * q[64 * i + j] + odd * q[64 * i + 32 + j];
      }
      sum += halves ? scale[2 * i] * first + scale[2 * i + 1] * second : scale[i] * (first + second);
    }
    y[r] = sum;
  }
#endif
}

// y[r] = sum over blocks of scale[block] (codes . inputs), for 8-bit codes with one scale per row, applied by the caller.
void sums8(const uint8_t* w, long n_in, const int8_t* q, const float* scale, float* y) {
#if defined(__AVX2__)
  __m256 sums[ROWS] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
  for (long i = 0; i < n_in / BLOCK; i++)
#pragma GCC unroll 4
    for (long r = 0; r < ROWS; r++)
      __builtin_prefetch(w + r * n_in + 64 * i + AHEAD), sums[r] = multiply_add(block8(w + r * n_in + 64 * i, q + 64 * i), _mm256_set1_ps(scale[i]), sums[r]);
  _mm_storeu_ps(y, totals(sums[0], sums[1], sums[2], sums[3]));
#else
  for (long r = 0; r < ROWS; r++, w += n_in) {
    float sum = 0;
    for (long i = 0; i < n_in / BLOCK; i++) {
      int32_t whole = 0;
      for (long j = 0; j < 64; j++) whole += w[64 * i + j] * q[64 * i + j];
      sum += scale[i] * whole;
    }
    y[r] = sum;
  }
#endif
}

// ROWS outputs from row n of a grouped matrix. sum (code - zero) * scale * x is computed as scale * (codes . x) minus the
// shift scale * zero * sum(x), so that the inner loop needs no zero points.
void rows4(const Matrix& m, Input& in, long n, float* y) {
  bool halves = m.group == 32;
  long n_scales = m.n_in / (halves ? 32 : BLOCK), per_group = m.group / (halves ? 32 : BLOCK), n_groups = m.n_in / m.group;
  const uint16_t* scale = m.scale + n * n_groups;
  const uint8_t* zero = m.zero ? m.zero + n * n_groups : nullptr;
  float *scaled = in.scaled.data(), *shift = in.shift.data();
  const float *x_scale = in.tiled_scale.data(), *x_sum = in.tiled_sum.data();
  // The common cases, which compilers can vectorize: one scale per group, and the rows' groups are contiguous.
  if (per_group == 1 && zero)
    for (long i = 0; i < ROWS * n_scales; i++) {
      float s = widen(scale[i]);
      scaled[i] = s * x_scale[i];
      shift[i] = s * (float)zero[i] * x_sum[i];
    }
  else if (per_group == 1)
    for (long i = 0; i < ROWS * n_scales; i++) {
      float s = widen(scale[i]);
      scaled[i] = s * x_scale[i];
      shift[i] = s * 8.f * x_sum[i];
    }
  else
    for (long i = 0; i < ROWS * n_scales; i++) {
      float s = widen(scale[i / per_group]);
      scaled[i] = s * x_scale[i];
      shift[i] = s * (zero ? (float)zero[i / per_group] : 8.f) * x_sum[i];
    }
  const uint8_t* codes = (const uint8_t*)m.weight;
  if (m.kind == BYTES)
    sums4<true>(codes + n * m.n_in, m.n_in, in.codes.data(), scaled, shift, n_scales, m.n_in / BLOCK, halves, y);
  else
    sums4<false>(codes + n * m.n_in / 2, m.n_in / 2, in.codes.data(), scaled, shift, n_scales, m.n_in / BLOCK, halves, y);
}

void rows8(const Matrix& m, Input& in, long n, float* y) {
  sums8((const uint8_t*)m.weight + n * m.n_in, m.n_in, in.codes.data(), in.scale.data(), y);
  for (long r = 0; r < ROWS; r++) y[r] = widen(m.scale[n + r]) * (y[r] - ZERO8 * in.whole_sum);
}

// Quantize and tile the input as the kind of matrix needs it.
void prepare(const Matrix& m, Input& in) {
  if (m.kind == FLOAT32 || m.kind == BFLOAT16) return;
  round_inputs(in, m.n_in, m.kind != INT8);
  in.whole_sum = 0;
  for (long i = 0; i < m.n_in / 32; i++) in.whole_sum += in.sum[i];
  if (m.kind == INT8) return;
  bool halves = m.group == 32;
  long n_scales = m.n_in / (halves ? 32 : BLOCK);
  for (long r = 0; r < ROWS; r++)
    for (long i = 0; i < n_scales; i++) {
      in.tiled_scale[r * n_scales + i] = in.scale[halves ? i / 2 : i];
      in.tiled_sum[r * n_scales + i] = halves ? in.sum[i] : in.sum[2 * i] + in.sum[2 * i + 1];
    }
}

// Compute the outputs of rows n to n + ROWS - 1 of a matrix.
void rows(const Matrix& m, Input& in, long n, float* y) {
  switch (m.kind) {
    case FLOAT32: return dots((const float*)m.weight + n * m.n_in, in.x.data(), m.n_in, y);
    case BFLOAT16: return dots((const uint16_t*)m.weight + n * m.n_in, in.x.data(), m.n_in, y);
    case INT8: return rows8(m, in, n, y);
    default: return rows4(m, in, n, y);
  }
}

// What a norm subtracts from every value, and what it multiplies by.
struct Moments {
  float shift, factor;
};

inline Moments moments(const Norm& norm, const float* x, long n, float eps) {
  float shift = 0, power = 0;
  if (norm.kind == MEAN_AND_VARIANCE) {
    for (long i = 0; i < n; i++) shift += x[i];
    shift /= n;
    for (long i = 0; i < n; i++) power += (x[i] - shift) * (x[i] - shift);
  } else {
    power = dot(x, x, n);
  }
  return {shift, 1.f / std::sqrt(power / n + eps)};
}

// Values first to last of a norm's output.
inline void normed(const Norm& norm, Moments found, const float* x, long first, long last, float* y) {
  for (long i = first; i < last; i++)
    y[i] = (x[i] - found.shift) * found.factor * (norm.weight ? norm.weight[i] : 1.f) + (norm.bias ? norm.bias[i] : 0.f);
}

inline float tanh_of(float x) { return 1.f - 2.f / (power_of_e(2.f * x) + 1.f); }

inline void activate(int32_t kind, float* x, long first, long last) {
  switch (kind) {
    case SILU:
      for (long i = first; i < last; i++) x[i] /= 1.f + power_of_e(-x[i]);
      return;
    case GELU:
      for (long i = first; i < last; i++) x[i] *= 0.5f * (1.f + std::erf(x[i] * 0.70710678f));
      return;
    case GELU_TANH:
      for (long i = first; i < last; i++)
        x[i] *= 0.5f * (1.f + tanh_of(0.79788456f * (x[i] + 0.044715f * x[i] * x[i] * x[i])));
      return;
    default:
      for (long i = first; i < last; i++) x[i] = std::max(x[i], 0.f) * (kind == RELU ? 1.f : x[i]);
  }
}

// A spinning barrier: between layers, waits are too short for the system's; after 2000 spins it yields.
struct Barrier {
  int n_threads;
  std::atomic<int> count{0}, round{0};
  void wait() {
    if (n_threads == 1) return;
    int mine = round.load(std::memory_order_acquire);
    if (count.fetch_add(1, std::memory_order_acq_rel) == n_threads - 1) {  // the last one: reset, then release the others
      count.store(0, std::memory_order_relaxed);
      round.store(mine + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round.load(std::memory_order_acquire) == mine;) {
#if defined(__AVX2__)
      _mm_pause();
#endif
      if (++spins > 2000) sched_yield();
    }
  }
};

// Store a key or value of one head in the cache; in 8 bits with its own scale.
inline void keep(const float* x, long H, float* p, float*) { memcpy(p, x, H * sizeof(float)); }
inline void keep(const float* x, long H, uint16_t* p, float*) {
  for (long i = 0; i < H; i++) p[i] = narrow(x[i]);
}
inline void keep(const float* x, long H, int8_t* p, float* scale) {
  float most = largest(x, H);
  *scale = std::max(most / 127.f, std::numeric_limits<float>::min());  // this argument order keeps a NaN
  for (long i = 0; i < H; i++) p[i] = (int8_t)(int32_t)std::nearbyintf(x[i] / *scale);
}

// Rotary embedding of the first n channels of one head, in place.
void turn(float* head, const float* cos, const float* sin, long n) {
  for (long i = 0; i < n / 2; i++) {
    float a = head[i], b = head[i + n / 2];
    head[i] = a * cos[i] - b * sin[i];
    head[i + n / 2] = b * cos[i] + a * sin[i];
  }
}

// Norm and rotary embedding of one head, in place; cos null: not rotated.
void position_head(const Model& m, const Norm& norm, float* head, const float* cos, const float* sin) {
  if (m.head_norm == BEFORE_ROTATION) normed(norm, moments(norm, head, m.head_dim, m.eps), head, 0, m.head_dim, head);
  if (cos) turn(head, cos, sin, m.rotated);
  if (m.head_norm == AFTER_ROTATION) normed(norm, moments(norm, head, m.head_dim, m.eps), head, 0, m.head_dim, head);
}

// Attention of one key head of one row: stores the new key and value, then computes the output of its query heads.
template <class Number>
void attend(const Model& m, const Layer& layer, float* qkv, float* out, long k, Number* keys, Number* values,
            float* key_scales, float* value_scales, long n_places, long position, const float* cos, const float* sin,
            std::vector<float>& scores) {
  constexpr bool is_coded = std::is_same<Number, int8_t>::value;
  long H = m.head_dim, R = m.n_heads / m.n_kv_heads, start = layer.window ? std::max(0L, position + 1 - layer.window) : 0;
  float *key = qkv + (m.n_heads + k) * H, *value = qkv + (m.n_heads + m.n_kv_heads + k) * H;
  keys += k * n_places * H, values += k * n_places * H;
  if (is_coded) key_scales += k * n_places, value_scales += k * n_places;
  position_head(m, layer.key, key, cos, sin);
  keep(key, H, keys + position * H, is_coded ? key_scales + position : nullptr);
  keep(value, H, values + position * H, is_coded ? value_scales + position : nullptr);
  scores.resize(position + 1);
  for (long r = 0; r < R; r++) {
    float* query = qkv + (k * R + r) * H;
    position_head(m, layer.query, query, cos, sin);
    float most = -INFINITY, sum = 0;
    for (long t = start; t <= position; t++) {
      scores[t] = dot(keys + t * H, query, H) * m.scale * (is_coded ? key_scales[t] : 1.f);
      if (m.slopes) scores[t] += m.slopes[k * R + r] * (t - position);
      if (m.softcap) scores[t] = m.softcap * tanh_of(scores[t] / m.softcap);
      most = std::max(most, scores[t]);
    }
    for (long t = start; t <= position; t++) {
      scores[t] = power_of_e(scores[t] - most);
      sum += scores[t];
    }
    if (is_coded)  // after the sum: the softmax's denominator does not include the values' scales
      for (long t = start; t <= position; t++) scores[t] *= value_scales[t];
    float* y = out + (k * R + r) * H;
    long i = 0;
    for (; i + LANES <= H; i += LANES) {
      Floats a{}, b{};
      long t = start;
      for (; t + 2 <= position + 1; t += 2) a += scores[t] * load(values + t * H + i), b += scores[t + 1] * load(values + (t + 1) * H + i);
      if (t <= position) a += scores[t] * load(values + t * H + i);
      *(Floats*)(y + i) = (a + b) / sum;
    }
    for (; i < H; i++) {
      float a = 0;
      for (long t = start; t <= position; t++) a += scores[t] * get(values[t * H + i]);
      y[i] = a / sum;
    }
  }
}

// The values of the codes 0 to 15 of a group.
inline void values_of(float scale, float zero, float* values) {
  for (int code = 0; code < 16; code++) values[code] = (code - zero) * scale;
}

// Dequantize a group of 4-bit codes, two per byte, by table lookup.
void spread4(const uint8_t* bytes, long n_bytes, const float* values, float* y) {
#if defined(__AVX512F__)
  const __m512 table = _mm512_loadu_ps(values);
  for (long i = 0; i < n_bytes; i += 8) {
    __m512i codes = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)(bytes + i)));
    codes = _mm512_or_si512(codes, _mm512_slli_epi64(codes, 28));  // high nibble to the upper 32 bits
    _mm512_storeu_ps(y + 2 * i, _mm512_permutexvar_ps(codes, table));  // uses only the lowest four bits of an index
  }
#else
  for (long i = 0; i < n_bytes; i++) y[2 * i] = values[bytes[i] & 15], y[2 * i + 1] = values[bytes[i] >> 4];
#endif
}

void spread4(const uint8_t* bytes, long n_bytes, const float* values, uint16_t* y) {
  uint16_t halves[32];
  for (int code = 0; code < 16; code++) halves[code] = halves[16 + code] = narrow(values[code]);
#if defined(__AVX512BW__)
  const __m512i table = _mm512_loadu_si512(halves), half = _mm512_set1_epi32(0x000f000f);
  for (long i = 0; i < n_bytes; i += 16) {
    __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(bytes + i)));
    codes = _mm512_and_si512(_mm512_or_si512(codes, _mm512_slli_epi32(codes, 12)), half);
    _mm512_storeu_si512(y + 2 * i, _mm512_permutexvar_epi16(codes, table));
  }
#else
  for (long i = 0; i < n_bytes; i++) y[2 * i] = halves[bytes[i] & 15], y[2 * i + 1] = halves[bytes[i] >> 4];
#endif
}

inline void put(float number, float* y) { *y = number; }
inline void put(float number, uint16_t* y) { *y = narrow(number); }

// Dequantize rows first to last of a matrix.
template <class Number>
void unpack(const Matrix& m, long first, long last, int n_threads, Number* y) {
  const uint8_t* codes = (const uint8_t*)m.weight;
#pragma omp parallel for num_threads(n_threads) schedule(static)
  for (long r = first; r < last; r++) {
    Number* out = y + (r - first) * m.n_in;
    if (m.kind == INT8) {
      float scale = widen(m.scale[r]);
      for (long i = 0; i < m.n_in; i++) put((float)(codes[r * m.n_in + i] - 128) * scale, out + i);
      continue;
    }
    long n_groups = m.n_in / m.group;
    if (m.kind == BYTES) {
      const uint16_t* scale = m.scale + r * n_groups;
      const uint8_t* zero = m.zero + r * n_groups;
      for (long first = 0; first < m.n_in; first += 32) {  // groups are multiples of 32, so 32 inputs share one
        float s = widen(scale[first / m.group]), z = zero[first / m.group];
        const uint8_t* even = codes + r * m.n_in + first / BLOCK * BLOCK + first % BLOCK / 2;
        uint8_t ordered[32];
        for (long i = 0; i < 16; i++) ordered[2 * i] = even[i], ordered[2 * i + 1] = even[32 + i];
        for (long i = 0; i < 32; i++) put((ordered[i] - z) * s, out + first + i);
      }
      continue;
    }
    for (long g = 0; g < n_groups; g++) {
      float values[16];
      values_of(widen(m.scale[r * n_groups + g]), m.zero ? m.zero[r * n_groups + g] : 8, values);
      spread4(codes + (r * m.n_in + g * m.group) / 2, m.group / 2, values, out + g * m.group);
    }
  }
}

}  // namespace

extern "C" {

// Dequantize rows first to last of a matrix to y (last - first, I), of kind FLOAT32 or BFLOAT16.
void llmctl_unpack(const Matrix* matrix, int64_t first, int64_t last, int32_t n_threads, int32_t kind, void* y) {
  if (kind == BFLOAT16) unpack(*matrix, first, last, n_threads, (uint16_t*)y);
  else unpack(*matrix, first, last, n_threads, (float*)y);
}

// Compute the logits (B, V) after one token per row, given their embeddings x (B, D), which are overwritten. keys, values: per
// layer (B, K, n_places, H), appended at `position`; for an INT8 cache also key_scales, value_scales, per layer (B, K,
// n_places). cos, sin: the position's R/2 values of every table of rotary embeddings.
void llmctl_step(const Model* model, float* x, int64_t B, void* const* keys, void* const* values, float* const* key_scales,
                 float* const* value_scales, int64_t n_places, int64_t position, const float* const* cos,
                 const float* const* sin, float* logits) {
  const Model& m = *model;
  long D = m.width, F = m.d_ff, H = m.head_dim, K = m.n_kv_heads, A = m.n_heads * H, Q = A + 2 * K * H;
  std::vector<float> qkv(B * Q + 16), attended(B * A + 16), middle(B * F + 16), part(B * D + 16);
  Barrier barrier{1};
#pragma omp parallel num_threads(m.n_threads)
  {
    long id = omp_get_thread_num(), n_threads = omp_get_num_threads();  // OpenMP may start fewer threads than requested
#pragma omp single
    barrier.n_threads = n_threads;
    std::vector<float> scores;
    std::vector<Input> inputs(B);
    std::vector<Moments> found(2 * B);
    for (Input& in : inputs) in.reserve(std::max({D, F, A}));
    auto begin = [&](long n) { return n / ROWS * id / n_threads * ROWS; };
    auto end = [&](long n) { return n / ROWS * (id + 1) / n_threads * ROWS; };
    // This thread's values of a row: as `begin` and `end`, with the remainder.
    auto from = [&](long n) { return n * id / n_threads; };
    auto to = [&](long n) { return n * (id + 1) / n_threads; };
    // Compute this thread's share of the outputs first to first + n_outputs, and pass them to `use` with their index from 0.
    auto each = [&](const Matrix& w, long first, long n_outputs, auto use) {
      float y[ROWS];
      auto pass = [&](long b, long n, long r) { use(b, n + r, w.bias ? y[r] + w.bias[first + n + r] : y[r]); };
      for (long n = begin(n_outputs); n < end(n_outputs); n += ROWS)
        for (long b = 0; b < B; b++) {
          rows(w, inputs[b], first + n, y);
          for (long r = 0; r < ROWS; r++) pass(b, n, r);
        }
      if (n_outputs % ROWS && id == n_threads - 1)  // the remainder: compute the last ROWS outputs, use only the new ones
        for (long b = 0; b < B; b++) {
          rows(w, inputs[b], first + n_outputs - ROWS, y);
          for (long r = ROWS - n_outputs % ROWS; r < ROWS; r++) pass(b, n_outputs - ROWS, r);
        }
    };
    auto take = [&](const Matrix& w, const float* values, const Norm& norm) {
      for (long b = 0; b < B; b++) {
        const float* row = values + b * w.n_in;
        if (norm.kind)
          normed(norm, moments(norm, row, w.n_in, m.eps), row, 0, w.n_in, inputs[b].x.data());
        else
          memcpy(inputs[b].x.data(), row, w.n_in * sizeof(float));
        prepare(w, inputs[b]);
      }
    };
    const Norm none{NONE, nullptr, nullptr};
    // Replace rows (B, n) by their norm; all threads must have written them, and wait for each other in between.
    auto norm_rows = [&](const Norm& norm, float* rows_, long n, long stride) {
      barrier.wait();
      for (long b = 0; b < B; b++) found[b] = moments(norm, rows_ + b * stride, n, m.eps);
      barrier.wait();
      for (long b = 0; b < B; b++) normed(norm, found[b], rows_ + b * stride, from(n), to(n), rows_ + b * stride);
    };
    // Add what a part returns to x: directly, or after its norm; then the norm of the sum.
    auto join = [&](const Matrix& w, const Norm& output, const Norm& sum) {
      if (!output.kind) {
        each(w, 0, D, [&](long b, long n, float y) { x[b * D + n] += m.residual_scale * y; });
      } else {
        each(w, 0, D, [&](long b, long n, float y) { part[b * D + n] = y; });
        norm_rows(output, part.data(), D, D);
        for (long b = 0; b < B; b++)
          for (long i = from(D); i < to(D); i++) x[b * D + i] += m.residual_scale * part[b * D + i];
      }
      if (sum.kind) norm_rows(sum, x, D, D);
      barrier.wait();
    };
    for (long l = 0; l < m.n_layers; l++) {
      const Layer& layer = m.layers[l];
      take(layer.qkv, x, layer.attention);
      each(layer.qkv, 0, Q, [&](long b, long n, float y) { qkv[b * Q + n] = y; });
      if (m.head_norm == ALL_HEADS) {
        norm_rows(layer.query, qkv.data(), A, Q);
        norm_rows(layer.key, qkv.data() + A, K * H, Q);
      }
      barrier.wait();
      const float *cos_ = layer.rope < 0 ? nullptr : cos[layer.rope], *sin_ = layer.rope < 0 ? nullptr : sin[layer.rope];
      for (long unit = B * K * id / n_threads; unit < B * K * (id + 1) / n_threads; unit++) {
        long b = unit / K, k = unit % K, offset = b * K * n_places * H;
        float *own = qkv.data() + b * Q, *out = attended.data() + b * A;
        auto attend_to = [&](auto* all_keys, auto* all_values, float* k_scales, float* v_scales) {
          attend(m, layer, own, out, k, all_keys + offset, all_values + offset, k_scales, v_scales, n_places, position,
                 cos_, sin_, scores);
        };
        switch (m.cache_kind) {
          case INT8: attend_to((int8_t*)keys[l], (int8_t*)values[l], key_scales[l] + offset / H, value_scales[l] + offset / H); break;
          case BFLOAT16: attend_to((uint16_t*)keys[l], (uint16_t*)values[l], nullptr, nullptr); break;
          default: attend_to((float*)keys[l], (float*)values[l], nullptr, nullptr);
        }
      }
      barrier.wait();
      take(layer.out, attended.data(), none);
      if (m.parallel) {  // the feed-forward layer reads x as attention did: what attention adds waits
        each(layer.out, 0, D, [&](long b, long n, float y) { part[b * D + n] = y; });
        barrier.wait();
        take(layer.up, x, m.parallel == SHARED ? layer.attention : layer.mlp);
      } else {
        join(layer.out, layer.attention_output, layer.attention_sum);
        take(layer.up, x, layer.mlp);
      }
      float* h = middle.data();
      // First all gates, then the activation and the product with up, so that weights are read sequentially.
      each(layer.up, 0, F, [&](long b, long n, float y) { h[b * F + n] = y; });
      for (long b = 0; b < B; b++) activate(m.activation, h + b * F, begin(F), end(F));
      if (m.gated) each(layer.up, F, F, [&](long b, long n, float y) { h[b * F + n] *= y; });
      barrier.wait();
      take(layer.down, middle.data(), none);
      if (m.parallel)
        for (long b = 0; b < B; b++)
          for (long i = from(D); i < to(D); i++) x[b * D + i] += m.residual_scale * part[b * D + i];
      if (m.parallel) barrier.wait();
      join(layer.down, layer.mlp_output, layer.mlp_sum);
    }
    take(m.head, x, m.norm);
    each(m.head, 0, m.head.n_out, [&](long b, long n, float y) {
      logits[b * m.head.n_out + n] = m.logits_softcap ? m.logits_softcap * tanh_of(y / m.logits_softcap) : y;
    });
  }
}

}  // extern "C"
