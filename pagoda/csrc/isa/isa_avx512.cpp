// AVX-512 F, BW, VL and DQ.
#include <immintrin.h>

#include "kernels/std.h"

namespace pg::avx512 {
#include "isa/vec_avx512.h"
#include "kernels/all.h"
}  // namespace pg::avx512

namespace pg {
extern const Isa kIsaAvx512;
const Isa kIsaAvx512 = {"avx512", avx512::kOps};
}  // namespace pg
