// This machine's plain instructions: what runs everywhere.
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "kernels/std.h"

namespace pg::portable {
#include "isa/vec_portable.h"
#include "kernels/all.h"
}  // namespace pg::portable

namespace pg {
extern const Isa kIsaPortable;
const Isa kIsaPortable = {"portable", portable::kOps};
}  // namespace pg
