// AVX-512 with VNNI and BF16.
#include <immintrin.h>

#include "kernels/std.h"

namespace pg::avx512_bf16 {
#include "isa/vec_avx512.h"
#include "kernels/all.h"
}  // namespace pg::avx512_bf16

namespace pg {
extern const Isa kIsaAvx512Bf16;
const Isa kIsaAvx512Bf16 = {"avx512_bf16", avx512_bf16::kOps};
}  // namespace pg
