/* AVX-512 on a processor without it: the C kernels' intrinsics by SIMD Everywhere (github.com/simd-everywhere/simde),
   for tests alone. -march=haswell -I SIMDE -include this file. */
#include <immintrin.h>
#define SIMDE_ENABLE_NATIVE_ALIASES
#include "simde/x86/avx512.h"
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1
#define __AVX512VBMI__ 1
#define __AVX512VNNI__ 1
#define __AVX512BF16__ 1
