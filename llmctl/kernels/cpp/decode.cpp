// One decoding step through all layers of a decoder in one call, and products of quantized weights by themselves.
//
// There is one parallel region per token. For few rows (sequences) every thread computes norms and rounded inputs
// redundantly, which is cheaper than synchronizing; for more they share the work. This file is compiled once per
// instruction set: dispatch.cpp chooses among those in a library (`VARIANT`), and without it this is the whole library.
//
// Shapes: B rows (sequences), T tokens, D width, F feed-forward, N query heads, K key heads, H head width.

#if __has_include(<omp.h>)
#include <omp.h>
#else  // without OpenMP, one thread
static int omp_get_thread_num() { return 0; }
static int omp_get_num_threads() { return 1; }
#endif
#include <sched.h>

#include "matrix.h"

#if defined(VARIANT)
#define NAME_OF(name, variant) name##_##variant
#define NAMED(name, variant) NAME_OF(name, variant)
#define EXPORTED(name) NAMED(name, VARIANT)
#else
#define EXPORTED(name) name
#endif

namespace {

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
  Matrix cross_query, cross_out;      // of attention to an encoder's output; n_out 0: there is none
  Norm attention, mlp, cross;         // of what a part reads
  Norm attention_output, mlp_output, cross_output;  // of what it adds
  Norm attention_sum, mlp_sum, cross_sum;           // of the sum
  Norm query, key;                    // of each head, or of all heads together
  int64_t window;  // attention window in tokens; 0 is full attention
  int64_t rope;    // index of the tables of cosines and sines; -1: heads are not rotated
};

struct Model {
  int64_t n_layers, width, d_ff, n_heads, n_kv_heads, head_dim, rotated;  // rotated: channels of a head
  float eps, scale, residual_scale, softcap, logits_softcap;              // caps: 0 is none
  int32_t activation, gated, parallel, head_norm;
  const Layer* layers;
  Norm norm;
  Matrix head;
};

// What a step reads and writes beside the model: one or more new tokens per row, in the order of rows and places. Rows end at
// the same place; each begins at a place of its own, before which is padding.
struct Step {
  int64_t n_rows, n_places, stop;  // stop: the place after the last token
  const int64_t* offsets;      // (B + 1,): tokens of row b are offsets[b] to offsets[b + 1]
  const int64_t* starts;       // (B,): the first place of each row, where its position is 0
  int32_t cache_kind;          // FLOAT32, BFLOAT16 or INT8
  int32_t memory_kind;         // FLOAT32 or BFLOAT16
  int32_t n_threads, n_ropes;
  void* const* keys;           // per layer (B, K, n_places, H), as values
  void* const* values;
  float* const* key_scales;    // INT8: per layer (B, K, n_places), as value_scales
  float* const* value_scales;
  const float* const* cos;     // per kind (n_places, R/2), as sin; R rotated channels
  const float* const* sin;
  const float* const* bias;    // per layer (N, n_places): added to scores, by distance; null: nothing is
  void* const* memory_keys;    // per layer (B, K, n_memory, H), as memory_values
  void* const* memory_values;
  int64_t n_memory;
  const int64_t* memory_lengths;  // (B,)
  float* x;                    // (T, D): embeddings of all T tokens; overwritten
  float* logits;               // (B, V): after the last token of each row; null: not wanted
};

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
  return {shift, 1.f / sqrtf(power / n + eps)};
}

// Values first to last of a norm's output.
inline void normed(const Norm& norm, Moments found, const float* x, long first, long last, float* y) {
  for (long i = first; i < last; i++)
    y[i] = (x[i] - found.shift) * found.factor * (norm.weight ? norm.weight[i] : 1.f) + (norm.bias ? norm.bias[i] : 0.f);
}

inline void activate(int32_t kind, float* x, long n) {
  switch (kind) {
    case SILU:
      for (long i = 0; i < n; i++) x[i] /= 1.f + power_of_e(-x[i]);
      return;
    case GELU:
      for (long i = 0; i < n; i++) x[i] *= 0.5f * (1.f + erff(x[i] * 0.70710678f));
      return;
    case GELU_TANH:
      for (long i = 0; i < n; i++)
        x[i] *= 0.5f * (1.f + tanh_of(0.79788456f * (x[i] + 0.044715f * x[i] * x[i] * x[i])));
      return;
    default:
      for (long i = 0; i < n; i++) x[i] = larger(x[i], 0.f) * (kind == RELU ? 1.f : x[i]);
  }
}

// A spinning barrier: between layers, waits are too short for the system's; after 2000 spins it yields.
struct Barrier {
  int n_threads;
  int count = 0, round = 0;
  void wait() {
    if (n_threads == 1) return;
    int mine = __atomic_load_n(&round, __ATOMIC_ACQUIRE);
    if (__atomic_fetch_add(&count, 1, __ATOMIC_ACQ_REL) == n_threads - 1) {  // the last one: reset, then release the others
      __atomic_store_n(&count, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&round, mine + 1, __ATOMIC_RELEASE);
      return;
    }
    for (int spins = 0; __atomic_load_n(&round, __ATOMIC_ACQUIRE) == mine;) {
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
  *scale = larger(most / 127.f, 1.17549435e-38f);  // this argument order keeps a NaN
  for (long i = 0; i < H; i++) p[i] = (int8_t)(int32_t)nearbyintf(x[i] / *scale);
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

inline float scale_at(const int8_t*, const float* scales, long t) { return scales[t]; }
template <class Number>
inline float scale_at(const Number*, const float*, long) { return 1.f; }

// Turn scores into the numerators of their softmax, and return its denominator. bias: by distance from `position`, or null.
inline float powers(const Model& m, float* scores, long start, long stop, const float* bias, long position) {
  float most = -INFINITY, sum = 0;
  if (bias)
    for (long t = start; t < stop; t++) scores[t] += bias[position - t];
  if (m.softcap)
    for (long t = start; t < stop; t++) scores[t] = m.softcap * tanh_of(scores[t] / m.softcap);
  for (long t = start; t < stop; t++) most = larger(most, scores[t]);
  for (long t = start; t < stop; t++) {
    scores[t] = power_of_e(scores[t] - most);
    sum += scores[t];
  }
  return sum;
}

// Attention of one query head to the places start to stop of its row. bias: by distance from `position`, or null.
template <class Number>
void attend(const Model& m, const float* query, const Number* keys, const Number* values, const float* key_scales,
            const float* value_scales, long start, long stop, const float* bias, long position, float* scores, float* y) {
  constexpr bool is_coded = sizeof(Number) == 1;
  long H = m.head_dim;
  for (long t = start; t < stop; t++) scores[t] = dot(keys + t * H, query, H) * m.scale * scale_at(keys, key_scales, t);
  float sum = powers(m, scores, start, stop, bias, position);
  if (is_coded)  // after the sum: the softmax's denominator does not include the values' scales
    for (long t = start; t < stop; t++) scores[t] *= scale_at(values, value_scales, t);
  long i = 0;
  for (; i + LANES <= H; i += LANES) {
    Floats a{}, b{};
    long t = start;
    for (; t + 2 <= stop; t += 2) a += scores[t] * load(values + t * H + i), b += scores[t + 1] * load(values + (t + 1) * H + i);
    if (t < stop) a += scores[t] * load(values + t * H + i);
    *(Floats*)(y + i) = (a + b) / sum;
  }
  for (; i < H; i++) {
    float a = 0;
    for (long t = start; t < stop; t++) a += scores[t] * get(values[t * H + i]);
    y[i] = a / sum;
  }
}

// Norm and position of a token's query heads first to last, and with `has_key` of key head k, which is stored with its value.
template <class Number>
void place_heads(const Model& m, const Step& s, long l, long b, long place, float* qkv, long first, long last, long k, bool has_key) {
  constexpr bool is_coded = sizeof(Number) == 1;
  const Layer& layer = m.layers[l];
  long H = m.head_dim, angle = (place - s.starts[b]) * (m.rotated / 2), at = (b * m.n_kv_heads + k) * s.n_places + place;
  const float *cos = layer.rope < 0 ? nullptr : s.cos[layer.rope] + angle, *sin = layer.rope < 0 ? nullptr : s.sin[layer.rope] + angle;
  for (long r = first; r < last; r++) position_head(m, layer.query, qkv + r * H, cos, sin);
  if (!has_key) return;
  float *key = qkv + (m.n_heads + k) * H, *value = qkv + (m.n_heads + m.n_kv_heads + k) * H;
  position_head(m, layer.key, key, cos, sin);
  keep(key, H, (Number*)s.keys[l] + at * H, is_coded ? s.key_scales[l] + at : nullptr);
  keep(value, H, (Number*)s.values[l] + at * H, is_coded ? s.value_scales[l] + at : nullptr);
}

// Self-attention of one key head of one row with one new token: stores the key and value, then computes the output of its
// query heads.
template <class Number>
void attend_to_cache(const Model& m, const Step& s, long l, long b, long k, float* qkv, float* out, float* scores) {
  constexpr bool is_coded = sizeof(Number) == 1;
  const Layer& layer = m.layers[l];
  long H = m.head_dim, R = m.n_heads / m.n_kv_heads, place = s.stop - 1, first = (b * m.n_kv_heads + k) * s.n_places;
  long start = larger((long)s.starts[b], layer.window ? place + 1 - (long)layer.window : 0L);
  Number *keys = (Number*)s.keys[l] + first * H, *values = (Number*)s.values[l] + first * H;
  float *key_scales = is_coded ? s.key_scales[l] + first : nullptr, *value_scales = is_coded ? s.value_scales[l] + first : nullptr;
  place_heads<Number>(m, s, l, b, place, qkv, k * R, (k + 1) * R, k, true);
  for (long r = k * R; r < (k + 1) * R; r++) {
    const float* bias = s.bias[l] ? s.bias[l] + r * s.n_places : nullptr;
    attend(m, qkv + r * H, keys, values, key_scales, value_scales, start, place + 1, bias, place, scores, out + r * H);
  }
}

constexpr long QUERIES = 4 * LANES / 8, COLUMNS = 2 * LANES;  // of a product of floats whose sums fit into registers

// c (R, n) = a (R, depth) times b (depth, n): R rows of a and c, and n <= COLUMNS columns; b and c have room for COLUMNS.
template <long R>
void outer(const float* a, long a_stride, const float* b, long b_stride, long depth, float* c, long c_stride) {
  Floats sums[R][2] = {};
  for (long i = 0; i < depth; i++) {
    Floats first = load(b + i * b_stride), second = load(b + i * b_stride + LANES);
#pragma GCC unroll 8
    for (long r = 0; r < R; r++) {
      float x = a[r * a_stride + i];
      sums[r][0] += x * first;
      sums[r][1] += x * second;
    }
  }
#pragma GCC unroll 8
  for (long r = 0; r < R; r++) {
    *(Floats*)(c + r * c_stride) = sums[r][0];
    *(Floats*)(c + r * c_stride + LANES) = sums[r][1];
  }
}

// A thread's scratch for the attention of many tokens: of one key head of one row, the keys transposed and the values.
struct Context {
  long row = -1, head = -1, stride = 0;
  Array<float> keys;    // (H, stride)
  Array<float> values;  // (stride, H rounded up)
  Array<float> scores, sums;
};

inline long columns_of(long n) { return (n + COLUMNS - 1) / COLUMNS * COLUMNS; }

// Self-attention of query head n of row b, for all its new tokens; keys and values are in the cache.
template <class Number>
void attend_together(const Model& m, const Step& s, long l, long b, long n, const float* qkv, long Q, float* out, Context& c) {
  constexpr bool is_coded = sizeof(Number) == 1;
  const Layer& layer = m.layers[l];
  long H = m.head_dim, k = n / (m.n_heads / m.n_kv_heads), at = (b * m.n_kv_heads + k) * s.n_places;
  long n_tokens = s.offsets[b + 1] - s.offsets[b], first_place = s.stop - n_tokens, wide = columns_of(H), A = m.n_heads * H;
  // Only what the window of the first token reaches.
  long begin = larger((long)s.starts[b], layer.window ? first_place + 1 - (long)layer.window : 0L), S = s.stop - begin;
  if (c.row != b || c.head != k) {
    c.row = b, c.head = k, c.stride = columns_of(S);
    c.keys.resize(H * c.stride), c.values.resize(c.stride * wide);
    c.scores.resize(QUERIES * c.stride), c.sums.resize(QUERIES * wide);
    const Number *keys = (const Number*)s.keys[l] + at * H, *values = (const Number*)s.values[l] + at * H;
    const float *key_scales = is_coded ? s.key_scales[l] + at + begin : nullptr, *value_scales = is_coded ? s.value_scales[l] + at + begin : nullptr;
    keys += begin * H, values += begin * H;
    memset(c.keys.data(), 0, H * c.stride * sizeof(float)), memset(c.values.data(), 0, c.stride * wide * sizeof(float));
    for (long t = 0; t < S; t++)
      for (long i = 0; i < H; i++) c.values[t * wide + i] = get(values[t * H + i]) * scale_at(values, value_scales, t);
    for (long first = 0; first < S; first += LANES)
      for (long i = 0; i < H; i++)
        for (long t = first; t < smaller(first + LANES, S); t++) c.keys[i * c.stride + t] = get(keys[t * H + i]) * scale_at(keys, key_scales, t);
  }
  const float* bias = s.bias[l] ? s.bias[l] + n * s.n_places : nullptr;
  for (long first = 0; first < n_tokens; first += QUERIES) {
    long count = smaller(QUERIES, n_tokens - first), last_place = first_place + first + count - 1;
    long low = layer.window ? larger(begin, first_place + first + 1 - (long)layer.window) - begin : 0;
    low = low / COLUMNS * COLUMNS;
    long high = columns_of(last_place + 1 - begin);
    const float* queries = qkv + first * Q + n * H;
    for (long t = low; t < high; t += COLUMNS) {
      if (count == QUERIES) outer<QUERIES>(queries, Q, c.keys.data() + t, c.stride, H, c.scores.data() + t, c.stride);
      else
        for (long r = 0; r < count; r++) outer<1>(queries + r * Q, Q, c.keys.data() + t, c.stride, H, c.scores.data() + r * c.stride + t, c.stride);
    }
    float denominators[QUERIES];
    for (long r = 0; r < count; r++) {
      long place = first_place + first + r, start = layer.window ? larger(begin, place + 1 - (long)layer.window) - begin : 0, stop = place + 1 - begin;
      float* scores = c.scores.data() + r * c.stride;
      for (long t = start; t < stop; t++) scores[t] *= m.scale;
      denominators[r] = powers(m, scores, start, stop, bias, place - begin);
      for (long t = low; t < start; t++) scores[t] = 0;
      for (long t = stop; t < high; t++) scores[t] = 0;
    }
    for (long i = 0; i < wide; i += COLUMNS) {
      const float *values = c.values.data() + low * wide + i, *scores = c.scores.data() + low;
      if (count == QUERIES) outer<QUERIES>(scores, c.stride, values, wide, high - low, c.sums.data() + i, wide);
      else
        for (long r = 0; r < count; r++) outer<1>(scores + r * c.stride, c.stride, values, wide, high - low, c.sums.data() + r * wide + i, wide);
    }
    for (long r = 0; r < count; r++)
      for (long i = 0; i < H; i++) out[(first + r) * A + n * H + i] = c.sums[r * wide + i] / denominators[r];
  }
}

// Attention of one key head's queries of one row to an encoder's output.
template <class Number>
void attend_to_memory(const Model& m, const Step& s, long l, long b, long k, float* queries, float* out, float* scores) {
  long H = m.head_dim, R = m.n_heads / m.n_kv_heads, first = (b * m.n_kv_heads + k) * s.n_memory * H;
  const Number *keys = (const Number*)s.memory_keys[l] + first, *values = (const Number*)s.memory_values[l] + first;
  for (long r = k * R; r < (k + 1) * R; r++) {
    attend(m, queries + r * H, keys, values, nullptr, nullptr, 0, s.memory_lengths[b], nullptr, 0, scores, out + r * H);
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

// Dequantize rows first to last of a row-major matrix.
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
    for (long g = 0; g < n_groups; g++) {
      float scale = widen(m.scale[r * n_groups + g]);
      uint8_t zero = m.zero ? m.zero[r * n_groups + g] : 8;
      if (m.kind == BYTES) {
        const uint8_t* p = codes + r * m.n_in + g * m.group;
        for (long i = 0; i < m.group; i++) put((float)(p[i] - zero) * scale, out + g * m.group + i);
        continue;
      }
      float values[16];
      values_of(scale, zero, values);
      spread4(codes + (r * m.n_in + g * m.group) / 2, m.group / 2, values, out + g * m.group);
    }
  }
}

// y[i] += factor * part[i]
inline void add(float* y, const float* part, float factor, long n) {
  for (long i = 0; i < n; i++) y[i] += factor * part[i];
}

}  // namespace

extern "C" {

#if !defined(VARIANT)
const char* llmctl_variant() { return "native"; }
#endif

// Dequantize rows first to last of a row-major matrix to y (last - first, I), of kind FLOAT32 or BFLOAT16.
void EXPORTED(llmctl_unpack)(const Matrix* matrix, int64_t first, int64_t last, int32_t n_threads, int32_t kind, void* y) {
  if (kind == BFLOAT16) unpack(*matrix, first, last, n_threads, (uint16_t*)y);
  else unpack(*matrix, first, last, n_threads, (float*)y);
}

// Bring a row-major quantized matrix into tiles.
void EXPORTED(llmctl_tiles)(const Matrix* matrix, int32_t n_threads, uint8_t* weight, uint16_t* scale, uint8_t* zero) {
  to_tiles(*matrix, n_threads, weight, scale, zero);
}

// Multiply rows x (B, I) by a quantized matrix in tiles: y (B, O), without the bias.
void EXPORTED(llmctl_product)(const Matrix* matrix, const float* x, int64_t B, int32_t n_threads, float* y) {
  const Matrix& m = *matrix;
  Inputs in;
  in.reserve(B, m.n_in, false);
#pragma omp parallel num_threads(n_threads)
  {
#pragma omp for schedule(static)
    for (long b = 0; b < B; b++) in.round_row(b, x + b * m.n_in);
    Array<float> tile(B * TILE);
#pragma omp for schedule(static)
    for (long first = 0; first < m.n_out; first += TILE) {
      long count = smaller(TILE, (long)m.n_out - first);
      product(m, in, B, first, count, tile.data());
      for (long b = 0; b < B; b++) memcpy(y + b * m.n_out + first, tile.data() + b * TILE, count * sizeof(float));
    }
  }
}

// Compute the logits after one more token per row, or after several.
void EXPORTED(llmctl_step)(const Model* model, const Step* step) {
  const Model& m = *model;
  const Step& s = *step;
  long B = s.n_rows, T = s.offsets[B], D = m.width, F = m.d_ff, H = m.head_dim, K = m.n_kv_heads, A = m.n_heads * H, Q = A + 2 * K * H;
  long most = larger(larger(D, F), A);
  bool is_single = true;  // one token in every row
  for (long b = 0; b < B; b++) is_single &= s.offsets[b + 1] == b + 1;
  float* x = s.x;
  Array<float> qkv(T * Q + 16), attended(T * A + 16), middle(T * (m.gated ? 2 : 1) * F + 16), part(T * D + 16), last(B * D + 16);
  Inputs shared;
  Barrier barrier{1};
#pragma omp parallel num_threads(s.n_threads)
  {
    long id = omp_get_thread_num(), n_threads = omp_get_num_threads();  // OpenMP may start fewer threads than requested
#pragma omp single
    {
      barrier.n_threads = n_threads;
      shared.reserve(T, most, true);
    }
    Inputs own;
    bool is_shared = T >= 2 * n_threads;
    if (!is_shared) own.reserve(T, most, true);
    Inputs& in = is_shared ? shared : own;
    Context context;
    long n_inputs = T;  // rows of the next products
    Array<float> scores(larger(s.n_places, s.n_memory) + 16), tile(T * TILE);
    Array<Moments> found(T);
    // This thread's part of n items.
    auto from = [&](long n) { return n * id / n_threads; };
    auto to = [&](long n) { return n * (id + 1) / n_threads; };
    // This thread's part of n outputs: whole tiles.
    auto begin = [&](long n) { return rounded_up(n) / TILE * id / n_threads * TILE; };
    auto end = [&](long n) { return smaller(n, rounded_up(n) / TILE * (id + 1) / n_threads * TILE); };
    // Compute this thread's share of the outputs first to first + n_outputs, and pass them to `use` with their row, their
    // index from 0 and their count; first is a multiple of TILE.
    auto each = [&](const Matrix& w, long first, long n_outputs, auto use) {
      for (long n = begin(n_outputs); n < end(n_outputs); n += TILE) {
        long count = smaller(TILE, end(n_outputs) - n);
        product(w, in, n_inputs, first + n, count, tile.data());
        for (long b = 0; b < n_inputs; b++) {
          float* y = tile.data() + b * TILE;
          if (w.bias) add(y, w.bias + first + n, 1.f, count);
          use(b, n, count, y);
        }
      }
    };
    // Prepare the inputs of a product; all threads must have written the values.
    auto take = [&](const Matrix& w, const float* values, const Norm& norm) {
      in.n = w.n_in;
      for (long b = is_shared ? from(n_inputs) : 0; b < (is_shared ? to(n_inputs) : n_inputs); b++) {
        const float* row = values + b * w.n_in;
        float* y = in.x.data() + b * w.n_in;
        if (norm.kind)
          normed(norm, moments(norm, row, w.n_in, m.eps), row, 0, w.n_in, y);
        else
          memcpy(y, row, w.n_in * sizeof(float));
        prepare(w, in, b);
      }
      if (is_shared) barrier.wait();
    };
    const Norm none{NONE, nullptr, nullptr};
    // Replace rows (T, n) by their norm; all threads must have written them, and wait for each other in between.
    auto norm_rows = [&](const Norm& norm, float* rows_, long n, long stride) {
      barrier.wait();
      for (long b = 0; b < T; b++) found[b] = moments(norm, rows_ + b * stride, n, m.eps);
      barrier.wait();
      for (long b = 0; b < T; b++) normed(norm, found[b], rows_ + b * stride, from(n), to(n), rows_ + b * stride);
    };
    // Add what a part returns to x: directly, or after its norm; then the norm of the sum.
    auto join = [&](const Matrix& w, const Norm& output, const Norm& sum) {
      if (!output.kind) {
        each(w, 0, D, [&](long b, long n, long count, const float* y) { add(x + b * D + n, y, m.residual_scale, count); });
      } else {
        each(w, 0, D, [&](long b, long n, long count, const float* y) { memcpy(part.data() + b * D + n, y, count * 4); });
        norm_rows(output, part.data(), D, D);
        for (long b = 0; b < T; b++)
          add(x + b * D + from(D), part.data() + b * D + from(D), m.residual_scale, to(D) - from(D));
      }
      if (sum.kind) norm_rows(sum, x, D, D);
      barrier.wait();
    };
    auto units = [&](auto use) {  // this thread's rows and key heads
      for (long unit = from(B * K); unit < to(B * K); unit++) use(unit / K, unit % K);
    };
    for (long l = 0; l < m.n_layers; l++) {
      const Layer& layer = m.layers[l];
      take(layer.qkv, x, layer.attention);
      each(layer.qkv, 0, Q, [&](long b, long n, long count, const float* y) { memcpy(qkv.data() + b * Q + n, y, count * 4); });
      if (m.head_norm == ALL_HEADS) {
        norm_rows(layer.query, qkv.data(), A, Q);
        norm_rows(layer.key, qkv.data() + A, K * H, Q);
      }
      barrier.wait();
      auto self_attention = [&](auto number) {
        using Number = decltype(number);
        if (is_single)
          return units([&](long b, long k) {
            attend_to_cache<Number>(m, s, l, b, k, qkv.data() + b * Q, attended.data() + b * A, scores.data());
          });
        long R = m.n_heads / K;
        for (long b = 0; b < B; b++) {
          long first = s.offsets[b], n_tokens = s.offsets[b + 1] - first;
          for (long i = from(n_tokens); i < to(n_tokens); i++)
            for (long k = 0; k < K; k++)
              place_heads<Number>(m, s, l, b, s.stop - n_tokens + i, qkv.data() + (first + i) * Q, k * R, (k + 1) * R, k, true);
        }
        barrier.wait();
        context.row = -1;  // keys and values of another layer
        for (long unit = from(B * m.n_heads); unit < to(B * m.n_heads); unit++) {
          long b = unit / m.n_heads, first = s.offsets[b];
          if (s.offsets[b + 1] == first) continue;  // a row of padding so far, which may start after `stop`
          attend_together<Number>(m, s, l, b, unit % m.n_heads, qkv.data() + first * Q, Q, attended.data() + first * A, context);
        }
      };
      switch (s.cache_kind) {
        case INT8: self_attention(int8_t()); break;
        case BFLOAT16: self_attention(uint16_t()); break;
        default: self_attention(float());
      }
      barrier.wait();
      take(layer.out, attended.data(), none);
      if (m.parallel) {  // the feed-forward layer reads x as attention did: what attention adds waits
        each(layer.out, 0, D, [&](long b, long n, long count, const float* y) { memcpy(part.data() + b * D + n, y, count * 4); });
        barrier.wait();
        take(layer.up, x, m.parallel == SHARED ? layer.attention : layer.mlp);
      } else {
        join(layer.out, layer.attention_output, layer.attention_sum);
        if (layer.cross_query.n_out) {
          take(layer.cross_query, x, layer.cross);
          each(layer.cross_query, 0, A, [&](long b, long n, long count, const float* y) { memcpy(qkv.data() + b * Q + n, y, count * 4); });
          barrier.wait();
          for (long b = 0; b < B; b++) {
            long first = s.offsets[b] * K, n_units = (s.offsets[b + 1] - s.offsets[b]) * K;
            for (long unit = first + from(n_units); unit < first + to(n_units); unit++) {
              float *queries = qkv.data() + unit / K * Q, *out = attended.data() + unit / K * A;
              if (s.memory_kind == BFLOAT16) attend_to_memory<uint16_t>(m, s, l, b, unit % K, queries, out, scores.data());
              else attend_to_memory<float>(m, s, l, b, unit % K, queries, out, scores.data());
            }
          }
          barrier.wait();
          take(layer.cross_out, attended.data(), none);
          join(layer.cross_out, layer.cross_output, layer.cross_sum);
        }
        take(layer.up, x, layer.mlp);
      }
      float* h = middle.data();
      if (!m.gated || F % TILE == 0) {
        // First all gates, then the activation and the product with up, so that weights are read sequentially.
        each(layer.up, 0, F, [&](long b, long n, long count, float* y) {
          activate(m.activation, y, count);
          memcpy(h + b * F + n, y, count * 4);
        });
        if (m.gated)
          each(layer.up, F, F, [&](long b, long n, long count, const float* y) {
            for (long i = 0; i < count; i++) h[b * F + n + i] *= y[i];
          });
      } else {  // a tile has gates and ups
        float* both = h + T * F;
        each(layer.up, 0, 2 * F, [&](long b, long n, long count, const float* y) {
          for (long i = 0; i < count; i++) (n + i < F ? h + b * F + n : both + b * F + n - F)[i] = y[i];
        });
        barrier.wait();
        for (long b = 0; b < T; b++) {
          activate(m.activation, h + b * F + from(F), to(F) - from(F));
          for (long i = from(F); i < to(F); i++) h[b * F + i] *= both[b * F + i];
        }
      }
      barrier.wait();
      take(layer.down, h, none);
      if (m.parallel) {
        for (long b = 0; b < T; b++)
          add(x + b * D + from(D), part.data() + b * D + from(D), m.residual_scale, to(D) - from(D));
        barrier.wait();
      }
      join(layer.down, layer.mlp_output, layer.mlp_sum);
    }
    if (s.logits) {
#pragma omp single
      for (long b = 0; b < B; b++)
        if (s.offsets[b + 1] > s.offsets[b]) memcpy(last.data() + b * D, x + (s.offsets[b + 1] - 1) * D, D * sizeof(float));
      n_inputs = B;
      take(m.head, is_single ? x : last.data(), m.norm);
      long V = m.head.n_out;
      each(m.head, 0, V, [&](long b, long n, long count, const float* y) {
        float* out = s.logits + b * V + n;
        for (long i = 0; i < count; i++) out[i] = m.logits_softcap ? m.logits_softcap * tanh_of(y[i] / m.logits_softcap) : y[i];
      });
    }
  }
}

}  // extern "C"
