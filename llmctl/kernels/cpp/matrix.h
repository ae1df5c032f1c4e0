// Products of a matrix with rows of inputs: the matrix is quantized, bfloat16 or float32.
//
// Inputs of quantized weights are rounded to 8 bits in blocks of 64 (llama.cpp's Q8_0 uses blocks of 32), so that dot
// products are integer sums. A quantized weight is stored in tiles of 32 outputs, in which each 4 bytes are 4 inputs of one
// output: one instruction multiplies them by 4 inputs that are broadcast, and its sums are of different outputs, so that
// scales are vectors and nothing is summed across a register. A register of codes is used for up to 8 rows of inputs.
//
// Shapes: O outputs, I inputs, G groups of inputs with a scale, B rows.

#pragma once

#include "simd.h"

#define INLINED __attribute__((always_inline))

namespace {

constexpr long BLOCK = 64;  // inputs that are quantized with one scale
constexpr long TILE = 32;   // outputs that are stored together
constexpr long CHUNK = 4 * TILE;  // bytes of a tile's codes for 4 inputs of all outputs, or 8 if there are two codes per byte

constexpr long AHEAD = 4096;  // prefetch distance in bytes

enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, INT4 = 3, BYTES = 4 };

struct Matrix {  // O x I
  int32_t kind;
  int32_t group;          // INT4, BYTES: inputs that share a scale; 32, 64 or 128
  int64_t n_out, n_in;
  const void* weight;     // unsigned codes: two per byte for INT4, one for INT8 and BYTES, which has codes below 64
  const uint16_t* scale;  // bfloat16: (O,) for INT8, (O, G) for INT4 and BYTES
  const uint8_t* zero;    // zero points (O, G) for INT4 and BYTES; null means 8 everywhere
  const float* bias;      // (O,) or null
  const void* more[2];    // FLOAT32, BFLOAT16: where the outputs from `more_from` are, multiples of 32; null: in `weight`
  int64_t more_from[2];
};
// In tiles, weight is (O / 32, I / 4, 32, 4) for one code per byte; for two, (O / 32, I / 64, 8, 32, 4): of each 64 inputs the
// low nibbles are the first 32. scale and zero are (O / 32, G, 32). O is rounded up to a multiple of 32.

inline long rounded_up(long n) { return (n + TILE - 1) / TILE * TILE; }

// Codes of a row-major matrix to tiles; the three arrays have room for O rounded up, and zeros there.
void to_tiles(const Matrix& m, int n_threads, uint8_t* weight, uint16_t* scale, uint8_t* zero) {
  const uint8_t* codes = (const uint8_t*)m.weight;
  long n_groups = m.kind == INT8 ? 1 : m.n_in / m.group, bytes = m.kind == INT4 ? m.n_in / 2 : m.n_in;
#pragma omp parallel for num_threads(n_threads) schedule(static)
  for (long tile = 0; tile < rounded_up(m.n_out) / TILE; tile++) {
    uint8_t* out = weight + tile * TILE * bytes;
    for (long o = 0; o < smaller(TILE, m.n_out - tile * TILE); o++) {
      long row = tile * TILE + o;
      const uint8_t* p = codes + row * bytes;
      if (m.kind == INT4)
        for (long block = 0; block < m.n_in / BLOCK; block++, p += 32)
          for (long j = 0; j < 8; j++)
            for (long i = 0; i < 4; i += 2) {  // inputs 4j + i and 4j + i + 1, and those 32 later
              uint8_t first = p[2 * j + i / 2], second = p[16 + 2 * j + i / 2];
              uint8_t* to = out + (block * 8 + j) * CHUNK + 4 * o + i;
              to[0] = (uint8_t)((first & 15) | second << 4);
              to[1] = (uint8_t)((first >> 4) | (second & 240));
            }
      else
        for (long j = 0; j < m.n_in / 4; j++) memcpy(out + j * CHUNK + 4 * o, p + 4 * j, 4);
      for (long g = 0; g < n_groups; g++) {
        scale[(tile * n_groups + g) * TILE + o] = m.scale[row * n_groups + g];
        if (m.zero) zero[(tile * n_groups + g) * TILE + o] = m.zero[row * n_groups + g];
      }
    }
  }
}

// B rows of inputs, as float32 and, for quantized weights, in 8 bits.
struct Inputs {
  long n = 0;  // of a row
  Array<float> x;               // (B, n), unless only its codes are needed
  Array<int8_t> codes;          // (B, n)
  Array<float> scale;           // (B, n / 64)
  Array<int32_t> negative_sum;  // (B, n / 32): of codes
  Array<float> sum;             // (B,): of what the codes stand for
  void reserve(long B, long n_, bool has_floats) {
    n = n_;
    if (has_floats) x.resize(B * n + 64);
    codes.resize(B * n + 64), scale.resize(B * (n / BLOCK) + 16), sum.resize(B);
    negative_sum.resize(B * (n / 32) + 16);
  }
  void round_row(long b) { round_row(b, x.data() + b * n); }
  void round_row(long b, const float* from) {
    float whole = 0;
    for (long block = 0; block < n / BLOCK; block++) {
      const float* p = from + block * BLOCK;
      float most = largest(p, BLOCK), factor = most / 127.f, inverse = most == 0 ? 0.f : 127.f / most;
      int8_t* q = codes.data() + b * n + block * BLOCK;
      for (long i = 0; i < BLOCK; i++) q[i] = (int8_t)(int32_t)nearbyintf(p[i] * inverse);
      int32_t first = 0, second = 0;
      for (long i = 0; i < 32; i++) first += q[i], second += q[i + 32];
      scale[b * (n / BLOCK) + block] = factor;
      int32_t* sums = negative_sum.data() + b * (n / 32) + 2 * block;
      sums[0] = -first, sums[1] = -second;
      whole += factor * (first + second);
    }
    sum[b] = whole;
  }
};

// Products of R rows of float inputs, n apart, with C rows of a matrix: y[r * stride + c].
template <long R, long C, class Number>
void dots(const Number* w, const float* x, long n, float* y, long stride) {
  Floats sums[R][C] = {};
  long i = 0;
  for (; i + LANES <= n; i += LANES) {
    Floats row[C];
#pragma GCC unroll 8
    for (long c = 0; c < C; c++) {
      row[c] = load(w + c * n + i);
      __builtin_prefetch(w + (C + c) * n + i);  // hardware does not foresee the step to the next C rows
    }
#pragma GCC unroll 8
    for (long r = 0; r < R; r++) {
      Floats inputs = load(x + r * n + i);
#pragma GCC unroll 8
      for (long c = 0; c < C; c++) sums[r][c] += row[c] * inputs;
    }
  }
  for (long r = 0; r < R; r++)
    for (long c = 0; c < C; c++) {
      float sum = total(sums[r][c]);
      for (long j = i; j < n; j++) sum += get(w[c * n + j]) * x[r * n + j];
      y[r * stride + c] = sum;
    }
}

// Rows of inputs and of a matrix that are multiplied together: registers hold their sums.
#if defined(__AVX512F__)
constexpr long FLOAT_ROWS = 6, COLUMN_ROWS = 4;
#else
constexpr long FLOAT_ROWS = 3, COLUMN_ROWS = 4;
#endif

// Outputs first to first + count of a float matrix, for B rows.
template <class Number>
void float_tile(const Matrix& m, const float* x, long B, long first, long count, float* y) {
  const Number* w = (const Number*)m.weight + first * m.n_in;
  for (long i = 0; i < 2; i++)
    if (m.more[i] && first >= m.more_from[i]) w = (const Number*)m.more[i] + (first - m.more_from[i]) * m.n_in;
  long n = m.n_in, c = 0;
  if (B > 2) {  // fewer: row by row, sequential memory access
    for (; c + COLUMN_ROWS <= count; c += COLUMN_ROWS) {
      const Number* rows = w + c * n;
      float* out = y + c;
      long b = 0;
      for (; b + FLOAT_ROWS <= B; b += FLOAT_ROWS) dots<FLOAT_ROWS, COLUMN_ROWS>(rows, x + b * n, n, out + b * TILE, TILE);
      for (; b + 4 <= B; b += 4) dots<4, COLUMN_ROWS>(rows, x + b * n, n, out + b * TILE, TILE);
      for (; b + 2 <= B; b += 2) dots<2, COLUMN_ROWS>(rows, x + b * n, n, out + b * TILE, TILE);
      for (; b < B; b++) dots<1, COLUMN_ROWS>(rows, x + b * n, n, out + b * TILE, TILE);
    }
  }
  for (; c < count; c++)
    for (long b = 0; b < B; b++) y[b * TILE + c] = dot(w + c * n, x + b * n, n);
}

#if defined(INTEGERS)
constexpr long WORDS = INTEGERS / 4;  // outputs of a register

#if defined(FOURS) && !defined(SIGNED_CODES)
constexpr bool IS_SIGNED = false;  // whether 128 is subtracted from codes of 8 bits before they are multiplied
#else
constexpr bool IS_SIGNED = true;
#endif

#if defined(FOURS)
#define UNROLL_INPUTS _Pragma("GCC unroll 8")
#else  // GCC would mix unrolled steps and store registers in between: 0.76 of the speed for 4 bits, 0.86 for 8 (AVX2)
#define UNROLL_INPUTS _Pragma("GCC unroll 1")
#endif

#if !defined(FOURS)
// Add the products of codes (4 inputs of each output) to int16 sums of pairs, which `flushed` adds to int32 sums.
template <int KIND>
inline Int add_codes(Int parts, Int codes, Int inputs, bool is_first) {
  Int pairs = KIND == INT8 ? pairs8(int_magnitude(codes), int_signed(inputs, codes)) : pairs8(codes, inputs);
  return is_first ? pairs : add16(parts, pairs);
}
// Additions before a flush: int16 holds 8 times 2 products of 15 and 127, twice 2 of 63 and 127, once 2 of 128 and 127.
template <int KIND>
constexpr long LONGEST = KIND == INT4 ? 8 : KIND == BYTES ? 2 : 1;
inline Int flushed(Int sums, Int parts) { return add32(sums, pairs16(parts, int_all(0x00010001))); }
#endif

// GROUP: 32, 64 (or a multiple of it), or 0 for one scale per output.
template <int KIND, int GROUP, long R, long OUTS>
void tile_part(const Matrix& m, long tile, long offset, const Inputs& in, long b, float* y) {
  constexpr long V = OUTS / WORDS, PARTS = KIND == INT4 ? 2 : 1;
  constexpr bool is_grouped = GROUP != 0, halves = GROUP == 32;
  long n = m.n_in, n_blocks = n / BLOCK, n_groups = is_grouped ? n / m.group : 1;
  const uint8_t* codes = (const uint8_t*)m.weight + tile * TILE * (n / PARTS) + 4 * offset;
  const uint16_t* scale = m.scale + tile * n_groups * TILE + offset;
  const uint8_t* zero = is_grouped && m.zero ? m.zero + tile * n_groups * TILE + offset : nullptr;
  const int8_t* q = in.codes.data() + b * n;
  const float* x_scale = in.scale.data() + b * n_blocks;
  const int32_t* negative = in.negative_sum.data() + b * (n / 32);
  long blocks_per_group = is_grouped ? larger(1L, (long)m.group / BLOCK) : 1;
  Real results[R][V];
#pragma GCC unroll 8
  for (long r = 0; r < R; r++)
#pragma GCC unroll 8
    for (long v = 0; v < V; v++) results[r][v] = real_zero();
  for (long block = 0; block < n_blocks; block++) {
    Int sums[R][V];
    auto clear = [&](long half, long n_halves) INLINED {  // sums begin with what the zero points subtract
      if (!is_grouped) {
#pragma GCC unroll 8
        for (long r = 0; r < R; r++)
#pragma GCC unroll 8
          for (long v = 0; v < V; v++) sums[r][v] = int_zero();
        return;
      }
      long group = halves ? 2 * block + half : block / blocks_per_group;
      Int zeros[V];
#pragma GCC unroll 8
      for (long v = 0; v < V; v++) zeros[v] = zero ? widen_codes(zero + group * TILE + v * WORDS) : int_all(8);
#pragma GCC unroll 8
      for (long r = 0; r < R; r++) {
        const int32_t* s = negative + r * (n / 32) + 2 * block + half;
        Int inputs = int_all(n_halves == 2 ? s[0] + s[1] : s[0]);
#pragma GCC unroll 8
        for (long v = 0; v < V; v++) sums[r][v] = times_small(zeros[v], inputs);
      }
    };
    // Multiply 32 inputs.
    auto add_half = [&](long half) INLINED {
      const uint8_t* p = codes + (block * (KIND == INT4 ? 8 : 16) + (KIND == INT4 ? 0 : 8 * half)) * CHUNK;
      const int8_t* inputs = q + block * BLOCK + 32 * half;
#if !defined(FOURS)
      constexpr long STEPS = LONGEST<KIND>;
#else
      constexpr long STEPS = 8;
#endif
      UNROLL_INPUTS
      for (long first = 0; first < 8; first += STEPS) {
#if !defined(FOURS)
        Int parts[R][V];
#pragma GCC unroll 8
        for (long r = 0; r < R; r++)
#pragma GCC unroll 8
          for (long v = 0; v < V; v++) parts[r][v] = int_zero();
#endif
        UNROLL_INPUTS
        for (long j = first; j < first + STEPS; j++) {
          Int w[V];
#pragma GCC unroll 8
          for (long v = 0; v < V; v++) {
            const uint8_t* from = p + j * CHUNK + v * INTEGERS;
            if (KIND != INT4 || half == 0) __builtin_prefetch(from + AHEAD);
            Int bytes = int_load(from);
            w[v] = KIND == INT4 ? (half ? high_nibbles(bytes) : low_nibbles(bytes)) : bytes;
#if !defined(FOURS) || defined(SIGNED_CODES)
            if (KIND == INT8) w[v] = flip_top_bits(w[v]);
#endif
          }
#pragma GCC unroll 8
          for (long r = 0; r < R; r++) {
            int32_t word;
            memcpy(&word, inputs + r * n + 4 * j, 4);
            Int x = int_all(word);
#pragma GCC unroll 8
            for (long v = 0; v < V; v++) {
#if defined(FOURS)
              sums[r][v] = add_fours(sums[r][v], w[v], x);
#else
              parts[r][v] = add_codes<KIND>(parts[r][v], w[v], x, STEPS == 1);
#endif
            }
          }
        }
#if !defined(FOURS)
#pragma GCC unroll 8
        for (long r = 0; r < R; r++)
#pragma GCC unroll 8
          for (long v = 0; v < V; v++) sums[r][v] = flushed(sums[r][v], parts[r][v]);
#endif
      }
    };
    auto scaled = [&](long half) INLINED {
      Real scales[V];
      long group = halves ? 2 * block + half : block / blocks_per_group;
#pragma GCC unroll 8
      for (long v = 0; v < V; v++) scales[v] = is_grouped ? widen_scales(scale + group * TILE + v * WORDS) : real_zero();
#pragma GCC unroll 8
      for (long r = 0; r < R; r++) {
        Real inputs = real_all(x_scale[r * n_blocks + block]);
#pragma GCC unroll 8
        for (long v = 0; v < V; v++) {
          Real whole = real(sums[r][v]);
          results[r][v] = plus_product(is_grouped ? times(whole, scales[v]) : whole, inputs, results[r][v]);
        }
      }
    };
    if (halves) {
      clear(0, 1), add_half(0), scaled(0);
      clear(1, 1), add_half(1), scaled(1);
    } else {
      clear(0, 2), add_half(0), add_half(1), scaled(0);
    }
  }
#pragma GCC unroll 8
  for (long r = 0; r < R; r++)
#pragma GCC unroll 8
    for (long v = 0; v < V; v++) {
      if (!is_grouped) {
        Real shift = real_all(IS_SIGNED ? 0.f : -128.f * in.sum[b + r]);
        results[r][v] = times(plus_product(shift, real_all(1.f), results[r][v]), widen_scales(scale + v * WORDS));
      }
      real_store(y + r * TILE + offset + v * WORDS, results[r][v]);
    }
}

// As many outputs and rows at a time as registers hold the sums of.
#if INTEGERS == 64
constexpr long OUTS = 32, MOST_ROWS = 8;
#elif defined(FOURS)
constexpr long OUTS = 16, MOST_ROWS = 4;
#else
constexpr long OUTS = 16, MOST_ROWS = 3;
#endif

template <int KIND, int GROUP>
void coded_tile(const Matrix& m, const Inputs& in, long B, long tile, float* y) {
  for (long offset = 0; offset < TILE; offset += OUTS) {
    long b = 0;
    for (; b + MOST_ROWS <= B; b += MOST_ROWS) tile_part<KIND, GROUP, MOST_ROWS, OUTS>(m, tile, offset, in, b, y + b * TILE);
    for (; b + 4 <= B; b += 4) tile_part<KIND, GROUP, 4, OUTS>(m, tile, offset, in, b, y + b * TILE);
    for (; b + 2 <= B; b += 2) tile_part<KIND, GROUP, 2, OUTS>(m, tile, offset, in, b, y + b * TILE);
    for (; b < B; b++) tile_part<KIND, GROUP, 1, OUTS>(m, tile, offset, in, b, y + b * TILE);
  }
}
#else  // plain loops
template <int KIND, int>
void coded_tile(const Matrix& m, const Inputs& in, long B, long tile, float* y) {
  constexpr bool is_grouped = KIND != INT8;
  long n = m.n_in, n_groups = is_grouped ? n / m.group : 1;
  const uint8_t* codes = (const uint8_t*)m.weight + tile * TILE * (KIND == INT4 ? n / 2 : n);
  for (long b = 0; b < B; b++) {
    float* out = y + b * TILE;
    for (long o = 0; o < TILE; o++) out[o] = 0;
    for (long half = 0; half < n / 32; half++) {  // groups are multiples of 32 inputs
      long group = is_grouped ? half * 32 / m.group : 0, negative = in.negative_sum[b * (n / 32) + half];
      const int8_t* q = in.codes.data() + b * n + 32 * half;
      const uint8_t* p = codes + (KIND == INT4 ? half / 2 * 8 : half * 8) * CHUNK;
      float scale = in.scale[b * (n / BLOCK) + half / 2];
      for (long o = 0; o < TILE; o++) {
        long at = (tile * n_groups + group) * TILE + o;
        int32_t sum = (int32_t)negative * (!is_grouped ? 128 : m.zero ? m.zero[at] : 8);
        for (long j = 0; j < 8; j++)
          for (long i = 0; i < 4; i++) {
            int32_t code = p[j * CHUNK + 4 * o + i];
            sum += (KIND != INT4 ? code : half % 2 ? code >> 4 : code & 15) * q[4 * j + i];
          }
        out[o] += (float)sum * scale * widen(m.scale[at]);
      }
    }
  }
}
#endif

// Round a row to what a kind of matrix multiplies.
inline void prepare(const Matrix& m, Inputs& in, long b) {
  if (m.kind != FLOAT32 && m.kind != BFLOAT16) in.round_row(b);
}

// Outputs first to first + count (at most 32; first is a multiple of 32) of B rows, without the bias: y (B, 32).
void product(const Matrix& m, const Inputs& in, long B, long first, long count, float* y) {
  switch (m.kind) {
    case FLOAT32: return float_tile<float>(m, in.x.data(), B, first, count, y);
    case BFLOAT16: return float_tile<uint16_t>(m, in.x.data(), B, first, count, y);
    case INT8: return coded_tile<INT8, 0>(m, in, B, first / TILE, y);
    case INT4: return m.group == 32 ? coded_tile<INT4, 32>(m, in, B, first / TILE, y) : coded_tile<INT4, 64>(m, in, B, first / TILE, y);
    default: return m.group == 32 ? coded_tile<BYTES, 32>(m, in, B, first / TILE, y) : coded_tile<BYTES, 64>(m, in, B, first / TILE, y);
  }
}

}  // namespace
