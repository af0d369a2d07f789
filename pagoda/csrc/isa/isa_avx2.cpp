// AVX2, FMA and F16C.
#include <immintrin.h>

#include "kernels/std.h"

namespace pg::avx2 {
#include "isa/vec_avx2.h"
#include "kernels/all.h"
}  // namespace pg::avx2

namespace pg {
extern const Isa kIsaAvx2;
const Isa kIsaAvx2 = {"avx2", avx2::kOps};
}  // namespace pg
