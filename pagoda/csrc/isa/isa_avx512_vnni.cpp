// AVX-512 with VNNI, without BF16 or without the use of it.
#include <immintrin.h>

#include "kernels/std.h"

namespace pg::avx512_vnni {
#include "isa/vec_avx512.h"
#include "kernels/all.h"
}  // namespace pg::avx512_vnni

namespace pg {
extern const Isa kIsaAvx512Vnni;
const Isa kIsaAvx512Vnni = {"avx512_vnni", avx512_vnni::kOps};
}  // namespace pg
