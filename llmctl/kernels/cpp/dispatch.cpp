// The library's functions for the instruction set of the CPU at hand: decode.cpp is compiled once for each (`HAS_...`).

#include <cstdint>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

struct Matrix;
struct Model;
struct Step;

#define FUNCTIONS(variant)                                                                                     \
  extern "C" void llmctl_unpack_##variant(const Matrix*, int64_t, int64_t, int32_t, int32_t, void*);           \
  extern "C" void llmctl_tiles_##variant(const Matrix*, int32_t, uint8_t*, uint16_t*, uint8_t*);               \
  extern "C" void llmctl_product_##variant(const Matrix*, const float*, int64_t, int32_t, float*);             \
  extern "C" void llmctl_step_##variant(const Model*, const Step*);                                            \
  static const Functions variant##_functions = {#variant, llmctl_unpack_##variant, llmctl_tiles_##variant,     \
                                                llmctl_product_##variant, llmctl_step_##variant};

namespace {
struct Functions {
  const char* name;
  void (*unpack)(const Matrix*, int64_t, int64_t, int32_t, int32_t, void*);
  void (*tiles)(const Matrix*, int32_t, uint8_t*, uint16_t*, uint8_t*);
  void (*product)(const Matrix*, const float*, int64_t, int32_t, float*);
  void (*step)(const Model*, const Step*);
};
}  // namespace

FUNCTIONS(base)
#if defined(HAS_avx2)
FUNCTIONS(avx2)
#endif
#if defined(HAS_avxvnni)
FUNCTIONS(avxvnni)
#endif
#if defined(HAS_avx512vnni)
FUNCTIONS(avx512vnni)
#endif
#if defined(HAS_dotprod)
FUNCTIONS(dotprod)
#endif

namespace {
const Functions& choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#define HAS(feature) __builtin_cpu_supports(feature)
  bool has_avx2 = HAS("avx2") && HAS("fma") && HAS("bmi2");
  bool has_avx512 = has_avx2 && HAS("avx512f") && HAS("avx512bw") && HAS("avx512vl") && HAS("avx512dq") && HAS("avx512cd");
#if defined(HAS_avx512vnni)
  if (has_avx512 && HAS("avx512vnni")) return avx512vnni_functions;
#endif
#if defined(HAS_avxvnni)
  if (has_avx2 && HAS("avxvnni")) return avxvnni_functions;
#endif
#if defined(HAS_avx2)
  if (has_avx2) return avx2_functions;
#endif
#elif defined(__aarch64__) && defined(HAS_dotprod)
#if defined(__linux__)
  if (getauxval(AT_HWCAP) & (1UL << 20)) return dotprod_functions;  // HWCAP_ASIMDDP
#else
  return dotprod_functions;  // every Mac with an arm64 processor has it
#endif
#endif
  return base_functions;
}
const Functions& chosen = choose();
}  // namespace

extern "C" {
const char* llmctl_variant() { return chosen.name; }
const char* llmctl_source() { return SOURCE; }  // which sources this was compiled from
void llmctl_unpack(const Matrix* m, int64_t first, int64_t last, int32_t n_threads, int32_t kind, void* y) {
  chosen.unpack(m, first, last, n_threads, kind, y);
}
void llmctl_tiles(const Matrix* m, int32_t n_threads, uint8_t* weight, uint16_t* scale, uint8_t* zero) {
  chosen.tiles(m, n_threads, weight, scale, zero);
}
void llmctl_product(const Matrix* m, const float* x, int64_t B, int32_t n_threads, float* y) {
  chosen.product(m, x, B, n_threads, y);
}
void llmctl_step(const Model* model, const Step* step) { chosen.step(model, step); }
}
