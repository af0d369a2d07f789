// What the kernels may use besides the vector interface. No standard templates here: the same inline function built
// for two instruction sets would be merged by the linker.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "call.h"
#include "checks.h"
#include "ops.h"
